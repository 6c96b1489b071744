"""A sequence of preferences: the schema of `configs/continual/*.yaml`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from qadapter.config.base import Name, Positive, Seed, Settings, refuse_repeats
from qadapter.config.budget import Budget, Share
from qadapter.config.experiment import PROFILE_FOLDER, Experiment
from qadapter.config.reading import names_in, read_named, refuse_without_effect
from qadapter.errors import QAdapterError
from qadapter.methods.table import SUBJECT

CONTINUAL_FOLDER = PROFILE_FOLDER / "continual"

Way = Literal["continued", "composed", "retrained", "replayed"]
WAYS: tuple[Way, ...] = get_args(Way)
TAKEN = frozenset({"kept", "retention"})
"""Names beside those of the domains, in `matrix.json` and among the metrics of a step."""


class Continual(Settings):
    """Preferences that arrive one after the other, and the ways to take up the next one.

    Attributes:
        name: part of titles and of the report's key.
        profile: the experiment: a name in `configs/`, or a YAML file. The method is the Q-Adapter.
        domains: the profile's domains, in the order in which they arrive; all on one base.
        seeds: every way is run once per seed.
        ways: `continued`: one adapter, trained on with the new pairs alone. `composed`: one adapter per preference,
            trained from the base, and the policy is their weighted sum. `retrained`: one adapter, trained from the base
            on all pairs so far, with as many steps per preference. `replayed`: one adapter, trained on with the new
            pairs and a share of each earlier preference's.
        budget: of `composed`: how much the chosen weights may cost the base.
        weights: of `composed`: what is tried for the new preference's adapter, besides 0.
        factors: of `composed`: what is tried as a factor on the weights of all earlier adapters.
        old_share: of `replayed`: the share of each earlier preference's pairs.
        settings: changes to the experiment, by dotted key, such as `parallel`.
    """

    name: Name
    profile: str
    domains: Annotated[tuple[Name, ...], Field(min_length=2)]
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0,)
    ways: Annotated[tuple[Way, ...], Field(min_length=1)] = WAYS
    budget: Budget = Budget(max_forgetting=0.02)
    weights: Annotated[tuple[Positive, ...], Field(min_length=1)] = (0.25, 0.5, 0.75, 1.0)
    factors: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1.0, 0.75)
    old_share: Share = 0.25
    settings: dict[str, Any] = Field({})

    @model_validator(mode="after")
    def _check(self) -> Continual:
        for name in ("domains", "seeds", "ways", "weights", "factors"):
            refuse_repeats(name, getattr(self, name))
        if taken := sorted(TAKEN & set(self.domains)):
            raise ValueError(f"domains names {taken[0]!r}, which is what the report calls the retention; rename it")
        return self

    def overrides(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """What changes in the profile: seeds, settings, domains and the method; the user's changes come before ours.

        Args:
            given: the user's.

        Raises:
            QAdapterError: one of them has no effect.
        """
        changes = {**self.settings, **given}
        decided = {
            "methods.run": f"every way of a sequence trains {SUBJECT.name}",
            "run_domains": "`domains` of the sequence names them in their order",
        }
        refuse_without_effect(f"continual {self.name}", changes, decided)
        return {
            "seeds": list(self.seeds),
            **changes,
            "run_domains": list(self.domains),
            "methods.run": [SUBJECT.name],
        }

    def check(self, experiment: Experiment) -> None:
        """Refuse what the ways cannot do with an experiment.

        Raises:
            QAdapterError: domains on different bases, or adapters that cannot be composed.
        """
        if problems := list(self._problems(experiment)):
            raise QAdapterError(f"continual {self.name}: " + "; ".join(problems))

    def _problems(self, experiment: Experiment) -> Iterator[str]:
        bases = {name: domain.base for name, domain in experiment.domains.items()}
        if len(set(bases.values())) > 1:
            told = ", ".join(f"{name} on {base}" for name, base in bases.items())
            yield f"a sequence has one base, and its domains are on several ({told}); set domains.<name>.base alike"
        if self.budget.max_over_refusals is not None:
            yield "budget.max_over_refusals has no effect, because no over-refusal is measured in a sequence; remove it"
        if "composed" in self.ways:
            choice: Any = experiment.methods.of(SUBJECT.name)
            start, end = (1.0 if value is None else value for value in (choice.alpha_0, choice.alpha_tilde))
            if choice.preset != "residual" or start != end:
                yield (
                    "`composed` adds up adapters whose Q is a difference to the base: set "
                    f"methods.{SUBJECT.name}.preset to residual with α0 = α̃, or leave composed out of ways"
                )


def continuals() -> list[str]:
    """Names of the files in `configs/continual/`."""
    return names_in(CONTINUAL_FOLDER)


def load_continual(sequence: str) -> Continual:
    """Read a sequence by its name in `configs/continual/` or by its path.

    Raises:
        QAdapterError: the file is missing or invalid. The message lists every problem with its path.
    """
    return read_named(Continual, "sequence", sequence, CONTINUAL_FOLDER)
