"""Every row of the table of methods is complete, and what it names is there."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from dataclasses import replace
from typing import Any, get_args

import pytest
from matplotlib.markers import MarkerStyle

from qadapter.config.experiment import load_experiment, profiles
from qadapter.methods.method import Group, Knob, Method, MethodSettings
from qadapter.methods.table import METHODS, NAMES, SUBJECT, knobs, method_named
from qadapter.report.figures import STYLES
from tests.support.paths import PROJECT_ROOT

SECTIONS = ("## The idea", "## The formula", "## Source", "## What differs here", "## When to use it")
each_method = pytest.mark.parametrize("method", METHODS, ids=NAMES)


@each_method
def test_a_row_is_complete(method: Method[Any]) -> None:
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", method.name)
    assert method.name not in ("base", "run", "dial")  # names that tables, configs and sweeps use otherwise
    assert issubclass(method.settings, MethodSettings)
    assert method.settings.__doc__
    assert method.group in get_args(Group)
    assert method.passes >= 1
    for look in (method.look, *method.looks().values()):
        assert re.fullmatch("#[0-9A-F]{6}", look.colour)
        MarkerStyle(look.marker)  # type: ignore[arg-type]


@each_method
def test_a_methods_training_is_in_its_own_file(method: Method[Any]) -> None:
    """That file's code is in the key of its trainings, and a launched process finds the function by its name."""
    assert method.module == f"qadapter.methods.{method.attribute}"
    assert inspect.getmodule(method.settings) is sys.modules[method.module]
    assert getattr(sys.modules[method.module], method.train.__name__) is method.train
    assert sys.modules[method.module].METHOD is method  # type: ignore[attr-defined]


@each_method
def test_knobs_are_fields_of_the_settings(method: Method[Any]) -> None:
    names = [knob.name for knob in method.knobs]
    assert len(set(names)) == len(names)
    assert set(names) <= set(method.settings.model_fields)
    assert "learning_rate" in method.swept
    numbers = [knob for knob in method.knobs if knob.label]
    assert all(knob.words for knob in numbers)
    assert len({knob.label for knob in numbers}) == len(numbers)
    assert method.strength is None or method.strength in {knob.name for knob in numbers}


@each_method
def test_needs_are_stages_that_others_can_share(method: Method[Any]) -> None:
    settings = load_experiment("smoke").methods.of(method.name)
    needs = method.needs(settings)
    assert needs == method.needs(settings.model_copy())
    assert {needs: 1}[method.needs(settings)] == 1, "equal needs are one stage"
    assert len({need.name for need in needs}) == len(needs)
    for need in needs:
        assert need.make.__module__.startswith("qadapter.")
        expected = {"base", "pairs_file", "model", "settings", "batch_size", "seed", "out", "scratch", *need.takes}
        assert set(inspect.signature(need.make).parameters) == expected | ({"needs"} if need.needs else set())


@each_method
def test_a_method_has_a_page_and_runs_somewhere(method: Method[Any]) -> None:
    page = (PROJECT_ROOT / f"docs/methods/{method.name}.md").read_text(encoding="utf-8")
    assert page.startswith("# ")
    assert [line for line in page.splitlines() if line.startswith("## ")] == list(SECTIONS)
    overview = (PROJECT_ROOT / "docs/methods/README.md").read_text(encoding="utf-8")
    assert re.search(rf"^\| \[`{method.name}`\]\({method.name}\.md\) \| {method.group} \|", overview, re.MULTILINE)
    ran = any(method.name in load_experiment(profile).methods.run for profile in profiles())
    assert ran or (PROJECT_ROOT / f"tests/qadapter/methods/test_{method.attribute}.py").is_file()


def test_names_and_looks_differ() -> None:
    assert len(set(NAMES)) == len({method.attribute for method in METHODS}) == len(METHODS)
    assert len(set(STYLES.values())) == len(METHODS) + 1, "and the base"
    families = [look for method in METHODS for look in method.looks().values()]
    assert len(set(families)) == len(families)
    assert len({look.marker for look in families}) == len(families), "a print without colours tells them apart"


def test_knobs_of_one_name_have_one_label() -> None:
    """They share a column of a sweep's table."""
    for method in METHODS:
        for knob in method.knobs:
            assert knobs()[knob.name] == knob
    labels = [knob.label for knob in knobs().values() if knob.label]
    assert len(set(labels)) == len(labels)


def test_methods_by_name() -> None:
    assert [method_named(name) for name in NAMES] == list(METHODS)
    assert SUBJECT in METHODS
    with pytest.raises(KeyError, match="ppo"):
        method_named("ppo")


def test_what_runs_by_default_is_what_the_paper_compares() -> None:
    run = tuple(method.name for method in METHODS if method.by_default)
    assert run == ("q-adapter", "sft", "dpo", "replay")
    assert load_experiment("smoke").methods.run == run


def test_a_section_has_every_method_and_changes_one() -> None:
    methods = load_experiment("smoke").methods
    for method in METHODS:
        assert type(methods.of(method.name)) is method.settings
        changed = methods.changed(method.name, methods.of(method.name).model_copy(update={"learning_rate": 0.5}))
        different = [name for name in NAMES if changed.of(name) != methods.of(name)]
        assert different == [method.name]


def test_a_family_is_the_methods_name_unless_it_has_its_own() -> None:
    dpo, q_adapter = method_named("dpo"), method_named("q-adapter")
    assert dpo.family_of({"beta": 1}) == "dpo"
    assert dpo.looks() == {"dpo": dpo.look}
    assert q_adapter.family_of({"preset": "residual"}) == "residual"
    assert q_adapter.family_of({"preset": "paper", "shift_mask": True}) == "paper-shifted"
    assert q_adapter.family_of({"beta": 1}) == "q-adapter"
    assert replace(dpo, knobs=(Knob("beta", "β", swept=False),)).swept == ()


def test_the_table_and_the_schema_cost_no_torch() -> None:
    program = (
        "import sys, qadapter.methods.table, qadapter.config.experiment\n"
        "print([m for m in ('torch', 'transformers', 'peft', 'trl', 'datasets', 'matplotlib') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=PROJECT_ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout == "[]\n"
