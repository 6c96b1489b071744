"""Which test file goes to which test process: files that share an expensive session fixture go to the same one."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from xdist.scheduler import LoadFileScheduling

from tests.support.paths import PROJECT_ROOT

_FAMILIES = {
    "the harness": re.compile(r"\b(harness: None|prefect_client: )"),
    "real runs": re.compile(r"\b(prefect_server: Server|undisturbed: Undisturbed)\b"),
}
"""Parameters by which a file is seen to use a Prefect server that all files of a test process share."""


@cache
def family_of(file: str) -> str | None:
    """The shared server that a file's tests use.

    Args:
        file: the test file, relative to the project.
    """
    text = (PROJECT_ROOT / file).read_text(encoding="utf-8")
    return next((name for name, parameters in _FAMILIES.items() if parameters.search(text)), None)


class SharedServers(LoadFileScheduling):
    """`--dist loadfile` that keeps the files of a family in one test process, as long as others have other work."""

    def __init__(self, config: Any, log: Any = None) -> None:
        super().__init__(config, log)
        self._homes: dict[str, Any] = {}

    def _assign_work_unit(self, node: Any) -> None:
        """Move the first file that suits a test process to the front, where the next one is taken from."""
        chosen = next((file for file in self.workqueue if self._suits(file, node)), None)
        if chosen is not None:
            self.workqueue.move_to_end(chosen, last=False)
        if family := family_of(next(iter(self.workqueue))):
            self._homes.setdefault(family, node)
        super()._assign_work_unit(node)

    def _suits(self, file: str, node: Any) -> bool:
        family = family_of(file)
        return family is None or self._homes.get(family, node) is node
