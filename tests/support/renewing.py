"""The experiment for a deployment whose runs renew their lease every three seconds, and not every 225."""

from __future__ import annotations

from prefect.concurrency import _leases

from flows.full_paper_repro import full_paper_repro

__all__ = ["full_paper_repro"]

_leases._RENEWAL_FRACTION = 0.01  # of the 300 s that a lease lasts
