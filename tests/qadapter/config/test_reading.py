"""Config files of all kinds are found by a name or a path, read and refused in one way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from qadapter.config.continual import continuals, load_continual
from qadapter.config.customization import customizations, load_customization
from qadapter.config.experiment import load_experiment, profiles
from qadapter.config.reading import names_in
from qadapter.config.sweep import SWEEP_FOLDER, expand, load_sweep
from qadapter.errors import QAdapterError
from qadapter.files.yaml_text import read_yaml

KINDS: list[tuple[str, Callable[[str], Any], list[str]]] = [
    ("profile", load_experiment, profiles()),
    ("sweep", load_sweep, names_in(SWEEP_FOLDER)),
    ("sequence", load_continual, continuals()),
    ("customization", load_customization, customizations()),
]


@pytest.mark.parametrize(("kind", "load", "known"), KINDS, ids=[kind for kind, *_ in KINDS])
def test_every_kind_is_found_and_refused_alike(
    kind: str, load: Callable[[str], Any], known: list[str], tmp_path: Path
) -> None:
    def refused(name: Path | str) -> str:
        with pytest.raises(QAdapterError) as caught:
            load(str(name))
        return str(caught.value)

    assert "smoke" in known
    listed = ", ".join(known)
    named = f"Known are {listed}; the path of a .yaml file is accepted too."
    assert refused("smok") == f"there is no {kind} 'smok', did you mean 'smoke'? {named}"
    assert refused("xyzzy") == f"there is no {kind} 'xyzzy'. {named}"
    file = tmp_path / "mine.yaml"
    found = refused(file)
    assert found == f"there is no file {str(file)!r}; give the path of a {kind}, or one of these names: {listed}"
    twice = "is not YAML: the key 'seeds' stands twice, in line 1 and in line 3"
    contents = {
        "seeds: [0]\nzzz: {b: 1}\nseeds: [1]": twice,
        "a: [": "is not YAML",
        "- 1": "contains list; expected a mapping",
        "": "contains NoneType; expected",
    }
    for content, message in contents.items():
        file.write_text(content)
        assert f"{file} {message}" in refused(file)
    file.write_bytes(b"\xff\xfe\x00")
    assert "is not YAML" in refused(file)
    file.write_text("zzz: 1")
    first, *problems = refused(file).splitlines()
    overrides = " and its overrides" if kind == "profile" else ""
    assert first == f"{len(problems)} problems in mine.yaml{overrides}:"
    assert any(line.startswith("  zzz: unknown key") for line in problems)
    assert any(line.endswith(": is required") for line in problems)


def test_a_key_stands_once_in_its_mapping() -> None:
    """PyYAML takes the last one: the first of two sections of a profile would be dropped without a word."""
    for text in ("{a: 1, a: 2}", "x:\n- {b: 1, 'b': 2}", "a: 1\nb: &k {c: 1}\nd: {<<: *k, e: 1, e: 1}"):
        with pytest.raises(yaml.YAMLError, match="stands twice"):
            read_yaml(text)
    assert read_yaml("a: {x: 1}\nb: {x: 2}\n1: y\n'1': z") == {"a": {"x": 1}, "b": {"x": 2}, 1: "y", "1": "z"}
    assert read_yaml("a: &k {x: 1}\nb: {<<: *k, x: 2}") == {"a": {"x": 1}, "b": {"x": 2}}  # a merged key is replaced


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[1e-4, 3E5, 1.5e2]", [1e-4, 3e5, 150.0]),
        ("[010, 1:30, 08]", ["010", "1:30", "08"]),
        ("[0, -7, 0x1F]", [0, -7, 31]),
    ],
)
def test_numbers_are_those_of_yaml_1_2(text: str, value: Any) -> None:
    """In YAML 1.1 `1e-4` is a text, `010` is 8 and `1:30` is 90."""
    assert read_yaml(text) == value
    assert [type(one) for one in read_yaml(text)] == [type(one) for one in value]


def test_a_sweep_takes_numbers_with_an_exponent(tmp_path: Path) -> None:
    """As texts they had no number to be named after."""
    content = yaml.safe_load((SWEEP_FOLDER / "smoke.yaml").read_text(encoding="utf-8"))
    content |= {"groups": {"sft": {"method": "sft", "one_at_a_time": {"learning_rate": ["1e-4", "1e-2"]}}}}
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump(content).replace("'1e-4'", "1e-4").replace("'1e-2'", "1e-2"), encoding="utf-8")
    variants = expand(load_sweep(str(file)), load_experiment("smoke"))
    assert [one.name for one in variants] == ["sft", "sft lr=0.0001", "sft lr=0.01"]


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("training.max_steps=true", "training.max_steps"),
        ("training.learning_rate=on", "training.learning_rate"),
        ("seeds=[0, yes]", "seeds"),
        ("evaluation.retention.limits={toy_facts: true}", "evaluation.retention.limits"),
    ],
)
def test_a_truth_is_no_number(override: str, key: str) -> None:
    """They were trained for one step, with the learning rate 1, and measured on one item."""
    with pytest.raises(QAdapterError, match=rf"\n  {key}: expected a number, not true or false"):
        load_experiment("smoke", [override])


def test_what_can_be_a_truth_stays_one() -> None:
    experiment = load_experiment("smoke", ["training.bf16=on", "system_metrics=off"])
    assert (experiment.training.bf16, experiment.system_metrics) == (True, False)
