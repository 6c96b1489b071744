"""Every package is pinned, and has a hash of each of its files that `pip install --require-hashes` takes."""

from __future__ import annotations

import re
import tomllib

from tests.support.paths import PROJECT_ROOT


def name_of(text: str) -> str:
    return re.sub(r"[-_.]+", "-", text).lower()


def locked(file: str) -> dict[str, tuple[str, int]]:
    """Name → version and number of hashes; every line of the file is one or the other."""
    found: dict[str, tuple[str, int]] = {}
    name = ""
    for line in (PROJECT_ROOT / file).read_text(encoding="utf-8").splitlines():
        if package := re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.+!]+)(?: ; .*)? \\", line):
            name = name_of(package[1])
            assert name not in found
            found[name] = (package[2], 0)
        else:
            assert re.fullmatch(r"    --hash=sha256:[0-9a-f]{64}(?: \\)?", line), line
            found[name] = (found[name][0], found[name][1] + 1)
    assert all(hashes for _, hashes in found.values())
    return found


def pins() -> dict[str, str]:
    lines = re.findall(r"(?m)^[^#\s]*==\S+", (PROJECT_ROOT / "constraints.txt").read_text(encoding="utf-8"))
    return {name_of(line.split("==")[0]): line.split("==")[1] for line in lines}


def test_hashes_are_of_the_pinned_versions() -> None:
    found, pinned = locked("requirements.lock"), pins()
    assert len(found) > 100
    both = found.keys() & pinned.keys()
    assert {name: found[name][0] for name in both} == {name: pinned[name] for name in both}
    hardware = re.compile(r"(nvidia|cuda)-.*|triton|setuptools")  # torch's own, for the build of its index
    assert [name for name in found.keys() - pinned.keys() if not hardware.fullmatch(name)] == []


def test_every_dependency_is_locked() -> None:
    project = tomllib.loads((PROJECT_ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    asked = [*project["dependencies"], *extras["pipeline"], *extras["quantized"]]
    names = {name_of(re.match(r"[A-Za-z0-9._-]+", text)[0]) for text in asked}  # type: ignore[index]
    assert names <= locked("requirements.lock").keys()


def test_the_build_is_pinned_with_hashes() -> None:
    build = tomllib.loads((PROJECT_ROOT / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]["requires"]
    assert build == [f"setuptools=={locked('requirements-build.lock')['setuptools'][0]}"]


def test_the_image_installs_by_hash() -> None:
    steps = re.findall(r"pip install ([^\\\n&]*)", (PROJECT_ROOT / "Dockerfile").read_text(encoding="utf-8"))
    assert [step.split()[0] for step in steps] == ["--require-hashes", "--require-hashes", "--no-build-isolation"]
