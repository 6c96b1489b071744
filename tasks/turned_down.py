"""A champion that forgot more than its budget: the same adapter with a smaller dial, as a version of its own."""

from __future__ import annotations

from dataclasses import dataclass

from prefect import task
from prefect.logging import get_run_logger

from qadapter.config.customization import Customization
from qadapter.files.artifacts import digest_tree
from qadapter.preferences.ledger import RECORDS
from tasks.candidate import LEDGER, SHOWN, base_digest, config_of, digest_of, learnt_by, registry_of
from tasks.dialled import Dialled
from tasks.evaluate import Evaluation
from tasks.preferences import Seen
from tasks.stages.context import RunContext
from tasks.stages.stage_run import StageResult
from tasks.tracking.registry import Candidate, Version
from tasks.train import Base

_FROM_THE_CHAMPION = ("data_digest", "ledger", "ledger_digest", "data_source", "data_pairs", "base", "customization")


@dataclass(frozen=True)
class TurnedDown:
    """A champion at a smaller dial.

    Attributes:
        champion: the version that forgot too much.
        before: where its dial stood.
        dialled: how the new value was chosen.
        adapter: the adapter with the new dial.
        row: the measurements at the new dial.
        why: by how much the budget was exceeded.
    """

    champion: Version
    before: str
    dialled: Dialled
    adapter: StageResult
    row: Evaluation
    why: list[str]

    def sentence(self) -> str:
        """What was done."""
        return f"the dial was turned down from {self.before}: {self.dialled.choice['sentence']}"


@task(task_run_name="register-turned-down")
def register_turned_down(context: RunContext, customization: Customization, turned: TurnedDown, base: Base) -> Version:
    """Register the champion's adapter at its smaller dial; the caller moves the alias."""
    from qadapter.policy.files import read_policy

    champion, registry = turned.champion, registry_of(customization)
    folder = turned.adapter.path / "adapter"
    adapter_digest, run_id = digest_tree(folder), turned.row.adaptation.run_id
    config = config_of(customization, context.experiment)
    numbers = {**turned.row.adaptation.output.metrics(), **turned.row.retention.output.metrics()}
    learnt = learnt_by(champion, registry)
    candidate = Candidate(
        key=digest_of({"adapter": adapter_digest, "turned_down_from": str(champion.number)}),
        run_id=run_id,
        passed=True,
        reasons=[turned.sentence(), *turned.why],
        parent=champion.number,
        facts={
            **{name: champion.tags[name] for name in _FROM_THE_CHAMPION if name in champion.tags},
            "data_fingerprint": Seen.read(customization).fingerprint,
            "base_digest": base_digest(base, context.experiment.model),
            "config_digest": digest_of(config),
            "adapter_digest": adapter_digest,
            "dial": str(read_policy(folder).dial),
            "turned_down": turned.before,
        },
        metrics={name: value for name, value in numbers.items() if name.startswith(SHOWN)},
        config=config,
        origin=f"Version {champion.number} with its dial turned down.",
    )

    def log_model() -> str:
        from tasks.tracking.models import log_served_model

        if learnt is not None:
            context.tracker.log_file(run_id, learnt / RECORDS, LEDGER)
        known = str(context.tracker.call("get_run", run_id).info.run_id)  # not a ticket from an outage of MLflow
        return log_served_model(
            known, base=base.location, adapter=folder, model=base.settings(context.experiment.model)
        )

    version = registry.register(candidate, log_model)
    get_run_logger().info("registered as version %d of %s", version.number, customization.model_name)
    return version
