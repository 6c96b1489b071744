"""Where `qadapter train --report-to` puts its curves: stand-ins of two trackers write down what they are given."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from qadapter.command.parser import main
from qadapter.training.trainer import QAdapterTrainer
from tests.qadapter.command.test_situations import TRAIN, write_base, write_rows
from tests.support import templates

_TRACKIO = """
import json
from pathlib import Path
from trackio import context_vars
__version__ = "0.21.1"
config, _run = {}, [None]
def _write(what):
    with (Path(__file__).parent.parent / "told.jsonl").open("a") as file:
        file.write(json.dumps([_run[0], what]) + "\\n")
def init(name=None, **_):
    _run[0] = name
def log(metrics):
    _write({name: value for name, value in metrics.items() if name in ("train/loss", "train/global_step", "eval/loss")})
def finish():
    _run[0] = None
"""


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose told.jsonl gets what trackio is told, and TensorBoard's writers their folders."""
    place = tmp_path / "trackers"
    for name, files in {
        "trackio": {
            "__init__": _TRACKIO,
            "context_vars": "class current_space_id:\n    def get():\n        return None\n",
        },
        "tensorboard": {"__init__": ""},
    }.items():
        (place / name).mkdir(parents=True)
        for file, text in files.items():
            (place / name / f"{file}.py").write_text(text)
        for module in [one for one in sys.modules if one == name or one.startswith(f"{name}.")]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setitem(sys.modules, name, None)  # so that what the test leaves there is taken back
        monkeypatch.delitem(sys.modules, name)

    class SummaryWriter:
        def __init__(self, log_dir: str) -> None:
            Path(log_dir).mkdir(parents=True, exist_ok=True)
            self.file = Path(log_dir, "scalars.jsonl")

        def add_scalar(self, name: str, value: float, step: int) -> None:
            with self.file.open("a") as file:
                file.write(json.dumps([name, step]) + "\n")

        def add_text(self, *_: Any) -> None: ...

        def flush(self) -> None: ...

        def close(self) -> None: ...

    torch_module = ModuleType("torch.utils.tensorboard")
    torch_module.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", torch_module)
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    monkeypatch.syspath_prepend(str(place))
    return place


def test_curves_outlive_the_training_and_a_stop_in_one_run(
    told: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in step 3 of 4, resumed, evaluated on held-out pairs; then trained anew in the same folder."""
    write_base(tmp_path / "base", templates.OTHER_END)
    write_rows(tmp_path / "rows.jsonl", 9)
    out = tmp_path / "adapter"
    command = ["train", "--base", str(tmp_path / "base"), "--data", str(tmp_path / "rows.jsonl"), "--output", str(out)]
    command += [*TRAIN, *"--heldout 3 --max-steps 4 --save-steps 2 --logging-steps 1 --answers 0".split()]
    command += ["--report-to", "trackio", "--report-to", "tensorboard"]
    step = QAdapterTrainer.training_step

    def stop_in_step_3(trainer: Any, *arguments: Any, **options: Any) -> Any:
        if trainer.state.global_step == 2:
            raise KeyboardInterrupt
        return step(trainer, *arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(QAdapterTrainer, "training_step", stop_in_step_3)
        assert main(command) == 130
    assert main([*command, "--resume"]) == 0

    def runs() -> dict[str, list[dict[str, float]]]:
        found: dict[str, list[dict[str, float]]] = {}
        for line in (told / "told.jsonl").read_text().splitlines():
            run, metrics = json.loads(line)
            found.setdefault(run, []).append(metrics)
        return found

    [(name, curve)] = runs().items()
    assert [row["train/global_step"] for row in curve if "train/loss" in row] == [1, 2, 3, 4]
    assert sum("eval/loss" in row for row in curve) == 1
    [board] = (out / "tensorboard").iterdir()
    assert board.name == name
    scalars = [json.loads(line) for line in (board / "scalars.jsonl").read_text().splitlines()]
    assert [number for of, number in scalars if of == "train/loss"] == [1, 2, 3, 4]
    assert [number for of, number in scalars if of == "eval/loss"] == [4]
    assert not (out / "checkpoints").exists()

    def started() -> str:
        """The folder's name and when its settings were written, to the second."""
        return time.strftime("adapter %Y-%m-%d %H.%M.%S", time.localtime((out / "train.yaml").stat().st_mtime))

    assert name == started()
    assert main([*command, "--overwrite"]) == 0
    assert set(runs()) == {name, started()}
