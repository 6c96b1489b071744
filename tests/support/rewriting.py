"""The test files compiled with their assertions rewritten, before the test processes read them.

On a fresh checkout each of three test processes would do it for itself, ten seconds of CPU time each, at the same time.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from _pytest.assertion import rewrite


def rewrite_tests(config: pytest.Config, folder: Path) -> None:
    """Write what pytest's import hook looks for beside each test file; what is there and fits, stays.

    Args:
        config: pytest's, with the hook installed.
        folder: of the tests.
    """
    state = config.stash.get(rewrite.assertstate_key, None)
    if state is None:  # --assert=plain
        return
    for file in [*folder.rglob("test_*.py"), *folder.rglob("conftest.py")]:
        cache = rewrite.get_cache_dir(file)
        compiled = cache / (file.stem + rewrite.PYC_TAIL)
        if rewrite.try_makedirs(cache) and rewrite._read_pyc(file, compiled, state.trace) is None:
            source, code = rewrite._rewrite_test(file, config)
            rewrite._write_pyc(state, code, source, compiled)
