"""Config files of all kinds are found by a name or a path, read and refused in one way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qadapter.config.continual import continuals, load_continual
from qadapter.config.customization import customizations, load_customization
from qadapter.config.experiment import load_experiment, profiles
from qadapter.config.reading import names_in
from qadapter.config.sweep import SWEEP_FOLDER, load_sweep
from qadapter.errors import QAdapterError

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
    contents = {"a: [": "is not YAML", "- 1": "contains list; expected a mapping", "": "contains NoneType; expected"}
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
