"""How a call to a server or a store is tried again: pauses that are given, and what counts as a passing fault."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt, wait_chain, wait_fixed


def retrying(
    pauses: Sequence[float],
    passes: Callable[[BaseException], bool],
    report: Callable[[BaseException, float], None] | None = None,
) -> Retrying:
    """Call something until it works: `retrying(pauses, passes)(function, *arguments)`.

    Args:
        pauses: seconds before each further attempt; after the last one the last error is raised as it is.
        passes: whether an error may be gone at the next attempt; any other is raised at once.
        report: called with the error and the seconds before the next attempt.
    """

    def before_sleep(state: RetryCallState) -> None:
        if report and state.outcome and state.next_action and (error := state.outcome.exception()):
            report(error, state.next_action.sleep)

    return Retrying(
        wait=wait_chain(*(wait_fixed(pause) for pause in pauses)) if pauses else wait_fixed(0),
        stop=stop_after_attempt(len(pauses) + 1),
        retry=retry_if_exception(passes),
        before_sleep=before_sleep,
        sleep=lambda seconds: time.sleep(seconds),
        reraise=True,
    )
