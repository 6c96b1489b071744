"""README, docs and CONTRIBUTING name only what exists: commands, targets, files, modules, keys and public names."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest
import yaml
from prefect.events import EventTrigger

from flows.commands.table import COMMANDS as PIPELINE_COMMANDS
from qadapter.command.options import TrainOptions
from qadapter.command.parser import COMMANDS as LIBRARY_COMMANDS
from qadapter.config.experiment import Experiment
from qadapter.config.sources import Source
from qadapter.config.sweep import Sweep
from tests.support.paths import PROJECT_ROOT

RECIPES = "CONTRIBUTING.md"  # its files are invented; tests of the tables follow it to the letter
PAGES = {
    str(page.relative_to(PROJECT_ROOT)): page.read_text(encoding="utf-8")
    for page in [
        *(PROJECT_ROOT / name for name in ("README.md", RECIPES, "SECURITY.md")),
        *sorted((PROJECT_ROOT / "docs").rglob("*.md")),
    ]
}
FOLDERS = r"qadapter|tasks|flows|configs|tests|docs|benchmarks|examples|installing|\.ci|\.github"
# Tags, events and resources that look like modules.
NOT_MODULES = {"revision", "dtype", "quantization", "adapter_digest", "base_digest", "preferences", "champion", "model"}


def commands_of(text: str) -> Iterator[str]:
    """Lines of blocks and pieces of inline code."""
    fence = re.compile(r"^ *```.*?^ *```", flags=re.M | re.S)
    for block in fence.findall(text):
        yield from block.splitlines()
    prose = fence.sub("", text)
    yield from (line for line in prose.splitlines() if line.startswith("    "))
    yield from re.findall(r"`([^`\n]+)`", prose)


def fenced_yaml(page: str) -> list[str]:
    return re.findall(r"^```yaml\n(.*?)^```", PAGES[page], flags=re.M | re.S)


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str) -> None:
    prose = re.sub(r"^ *```.*?^ *```", "", PAGES[page], flags=re.M | re.S)
    generated = {"config.md", "commands.md"}  # by docs/site/hooks.py
    for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", prose):
        file = (PROJECT_ROOT / page).parent / target
        assert file.exists() or file.name in generated, f"{page} links to {target}"


def test_the_site_has_every_page() -> None:
    nav = re.findall(r"[\w/-]+\.md", (PROJECT_ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    written = {page.removeprefix("docs/") for page in PAGES if page.startswith("docs/")}
    assert sorted(nav) == sorted({*written, "reference/config.md", "reference/commands.md"})


@pytest.mark.parametrize("page", PAGES)
def test_every_make_target_exists(page: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (PROJECT_ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M))
    found = (re.match(r"\s*(?:\$ )?(?:.* && )?make ([a-z][a-z-]*)", line) for line in commands_of(PAGES[page]))
    assert {match[1] for match in found if match} <= targets


@pytest.mark.parametrize("page", PAGES)
def test_every_subcommand_exists(page: str) -> None:
    known = {*LIBRARY_COMMANDS, *PIPELINE_COMMANDS, "eval"}
    found = (re.match(r"\s*(?:\$ )?(?:.* -m )?qadapter ([a-z][a-z-]*)", line) for line in commands_of(PAGES[page]))
    assert {match[1] for match in found if match} <= known


@pytest.mark.parametrize("page", [page for page in PAGES if page != RECIPES])
def test_every_file_it_names_exists(page: str) -> None:
    named = set(re.findall(rf"(?<![\w./…-])((?:{FOLDERS})/[\w./*<>-]*\w/?)(?![\w…])", PAGES[page]))
    for path in sorted(named):
        pattern = re.sub(r"<\w+>", "*", path)
        assert list(PROJECT_ROOT.glob(pattern.rstrip("/"))), f"{page} names {path}"


@pytest.mark.parametrize("page", [page for page in PAGES if page != RECIPES])
def test_every_module_it_names_exists(page: str) -> None:
    for dotted in sorted(set(re.findall(r"(?<![\w./-])((?:qadapter|tasks|flows)(?:\.\w+)+)", PAGES[page]))):
        parts = dotted.split(".")
        if parts[1] in NOT_MODULES or parts[-1] in ("py", "md", "yaml"):
            continue
        folder = PROJECT_ROOT / parts[0]
        rest = parts[1:]
        while rest and (folder / rest[0]).is_dir():
            folder /= rest.pop(0)
        if not rest:
            continue
        module = folder / f"{rest[0]}.py"
        if not module.exists():  # a public name of the package
            stub = folder / "__init__.pyi"
            module, rest = (stub if stub.exists() else folder / "__init__.py"), ["", *rest]
        source = module.read_text(encoding="utf-8")
        assert all(re.search(rf"\b{name}\b", source) for name in rest[1:]), f"{page} names {dotted}"


@pytest.mark.parametrize("page", [page for page in PAGES if page != RECIPES and fenced_yaml(page)])
def test_every_yaml_block_is_valid(page: str) -> None:
    for block in fenced_yaml(page):
        content = yaml.safe_load(block)
        if block.startswith("# prefect.yaml"):
            deployments = yaml.safe_load((PROJECT_ROOT / "prefect.yaml").read_text(encoding="utf-8"))["deployments"]
            assert all(content.keys() <= deployment.keys() for deployment in deployments)
        elif set(content) == {"trigger"}:
            EventTrigger.model_validate(content["trigger"])
        elif "base" in content:
            TrainOptions.model_validate(content)
        elif "fields" in content:
            Source.model_validate({"path": "votes.csv", **content})
        else:
            experiment_with(content)


def experiment_with(sections: dict[str, Any]) -> Experiment:
    """The smoke profile with these sections laid over it, validated as a whole."""
    smoke = yaml.safe_load((PROJECT_ROOT / "configs/smoke.yaml").read_text(encoding="utf-8"))

    def laid(below: Any, above: Any) -> Any:
        if not (isinstance(below, dict) and isinstance(above, dict)):
            return deepcopy(above)
        return {key: laid(below.get(key), above[key]) if key in above else below[key] for key in {**below, **above}}

    return Experiment.model_validate(laid(smoke, sections))


def test_every_situation_is_held_by_a_test() -> None:
    page = PAGES["docs/situations.md"]
    rows = [line for line in page.splitlines() if line.startswith("| ")][2:]
    assert len(rows) >= 27
    named = [re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row) for row in rows]
    assert all(named)
    for file, test in {entry for row in named for entry in row}:
        tree = ast.parse((PROJECT_ROOT / file).read_text(encoding="utf-8"))
        tests = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
        assert test in tests, f"{file} has no {test}"


def test_the_groups_of_the_sweeps_page_are_valid() -> None:
    sweep = yaml.safe_load((PROJECT_ROOT / "configs/sweep/smoke.yaml").read_text(encoding="utf-8"))
    (block,) = re.findall(r"^    dpo:\n(?:    .*\n)+", PAGES["docs/sweep.md"], flags=re.M)
    groups = yaml.safe_load(re.sub(r"^ {4}", "", block, flags=re.M))
    Sweep.model_validate({**sweep, "groups": groups})


def test_the_reference_has_every_public_name() -> None:
    stub = ast.parse((PROJECT_ROOT / "qadapter/__init__.pyi").read_text(encoding="utf-8"))
    public = {
        f"{node.module}.{alias.name}" for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    shown = re.findall(r"^::: (\S+)$", PAGES["docs/reference/api.md"], flags=re.M)
    assert sorted(shown) == sorted(public)


def test_one_version_everywhere() -> None:
    version = re.search(r'^version = "(.+)"$', (PROJECT_ROOT / "pyproject.toml").read_text("utf-8"), flags=re.M)
    assert version
    citation = yaml.safe_load((PROJECT_ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == version[1]
    changelog = (PROJECT_ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## \[(\d[^\]]*)\]", changelog, flags=re.M)[0] == version[1]
