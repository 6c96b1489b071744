"""Trackers that are installed and cannot be imported: refused where they are asked for, left out where they are not."""

from __future__ import annotations

import importlib.util
import logging
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from qadapter.command.parser import main
from qadapter.config.experiment import load_experiment
from qadapter.config.trackers import leave_out_unusable, look_before_trl, why_unusable
from qadapter.errors import QAdapterError
from qadapter.planning.preflight import check_experiment
from tests.support.tiny_toy import TRAINING, make_tiny_toy

_GONE = "import a_package_that_is_gone\n"
BROKEN = {
    "wandb": {"__init__": ""},
    "trackio": {"__init__": _GONE},
    "comet_ml": {"__init__": "raise RuntimeError('old')\n"},
}


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three trackers that are found and do not work, and nothing of them in this process afterwards."""
    for name, files in BROKEN.items():
        (tmp_path / "broken" / name).mkdir(parents=True)
        for file, text in files.items():
            (tmp_path / "broken" / name / f"{file}.py").write_text(text)
        for module in [one for one in sys.modules if one == name or one.startswith(f"{name}.")]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setitem(sys.modules, name, None)  # so that what the test leaves there is taken back
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path / "broken"))
    return tmp_path / "broken"


@pytest.mark.parametrize(
    ("name", "reason"),
    [("trackio", "ModuleNotFoundError: No module named 'a_package_that_is_gone'"), ("wandb", "it has no wandb.run")],
)
def test_a_broken_tracker_is_refused_in_one_sentence(
    name: str, reason: str, broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = load_experiment("smoke", {"training.report_to": [name]})
    with pytest.raises(QAdapterError) as refused:
        check_experiment(experiment, None, fixed={}, rows=1, downloads=tmp_path, remote=False)
    assert str(refused.value) == (
        f"report_to names {name}, which is installed but cannot be imported ({reason}); repair it "
        f"(pip install --upgrade {name}) or leave it out"
    )
    command = ["train", "--base", str(tmp_path), "--data", str(tmp_path), "--output", str(tmp_path / "out")]
    assert main([*command, "--report-to", name]) == 2  # before data and base are looked at
    said = capsys.readouterr().err
    assert reason in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_imported_looks_as_if_it_were_not_there(broken: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert all(find_spec(name) is not None for name in BROKEN)
    assert why_unusable("comet_ml") == "RuntimeError: old"
    with caplog.at_level(logging.WARNING):
        leave_out_unusable()
    assert [find_spec(name) for name in BROKEN] == [None] * 3
    assert [message.split(" (")[0] for message in caplog.messages] == [
        f"{name} is installed but cannot be imported" for name in ("wandb", "trackio", "comet_ml")
    ]


def test_trl_saves_checkpoints_beside_broken_trackers(
    broken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL imports trackio for the model card of each checkpoint; it was looked at when TRL was about to be imported."""
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.delitem(sys.modules, "trl", raising=False)
    look_before_trl()
    assert find_spec("trackio") is not None
    importlib.util.find_spec("trl")
    assert [find_spec(name) for name in BROKEN] == [None] * 3
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "trackio", None)
    training = TRAINING.model_copy(update={"max_steps": 2, "save_steps": 1})
    out = make_tiny_toy(tmp_path / "toy").train("dpo", tmp_path / "out", training=training)
    assert (out / "adapter" / "adapter_model.safetensors").is_file()
