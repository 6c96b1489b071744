"""A recurring customization: the schema of `configs/customize/*.yaml`.

It refers to a profile for everything that does not change from week to week (base, method, training, evaluation), and
sets where preferences arrive, how they are mixed, and what a candidate must achieve to be promoted.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from qadapter.config.base import Name, Seed, Settings
from qadapter.config.budget import Budget
from qadapter.config.curve import CurveSettings
from qadapter.config.experiment import PROFILE_FOLDER, Experiment, load_experiment
from qadapter.config.reading import names_in, read_named
from qadapter.config.sources import Source
from qadapter.errors import QAdapterError
from qadapter.gate.rules import Gate
from qadapter.judging.plan import judge_of
from qadapter.judging.table import NO_JUDGE
from qadapter.methods.table import SUBJECT

CONFIG_FOLDER = PROFILE_FOLDER / "customize"
PREFERENCES = "preferences"
"""Name of the growing source among the experiment's sources."""


class Mix(Settings):
    """The data of a re-training.

    Attributes:
        rows: `all` pairs, or `new` (and changed) ones with a sample of the others. The first training reads all.
        old_share: share of the other pairs in that sample.
    """

    rows: Literal["all", "new"] = "all"
    old_share: Annotated[float, Field(ge=0, le=1)] = 0.25


class Customization(Settings):
    """A recurring customization.

    Attributes:
        name: the name in logs and events.
        model_name: the registered model's name; each model has its own history.
        profile: a profile in `configs/`, or a YAML file: base, training and evaluation. The method is the Q-Adapter.
        overrides: changes to the profile's settings.
        data: folder for `{data}` in the profile's paths, where it has no toy world.
        domain: the profile's domain whose base and style are used.
        source: where preferences arrive: a folder, a growing file, a URL, or a hub data set. A relative path starts at
            the workspace; `{data}` is the toy world (whose preferences never change), or `data`.
        seed: the seed of the trainings.
        start: where a candidate's training starts: `champion`, whose adapter is trained on, or `base`: a new adapter
            learns all pairs each time (docs/continual.md compares both).
        mix, gate: see `Mix` and `qadapter.gate.rules.Gate`.
        budget: how much a candidate may forget: its dial is then chosen under it after the training, and the gate
            judges that policy, on the half of the items that the dial was not chosen on; None: candidates are judged
            as trained. A check compares the champion with it as well.
        turn_down: whether a check that finds the champion beyond the budget turns its dial down: it registers the same
            adapter with a smaller dial that stays within the budget, and promotes it.
    """

    name: Name
    model_name: Name
    profile: str
    overrides: dict[str, Any] = Field({})
    data: str | None = None
    domain: Name
    source: Source
    seed: Seed = 0
    start: Literal["champion", "base"] = Field("champion", exclude_if=lambda value: value == "champion")
    mix: Mix = Mix()
    gate: Gate = Gate()
    budget: Budget | None = None
    turn_down: bool = False

    @model_validator(mode="after")
    def _check(self) -> Customization:
        if self.turn_down and self.budget is None:
            raise ValueError("turn_down needs a budget that says how much may be forgotten; add budget")
        if self.source.heldout >= 1 and not (self.source.heldout_path or self.source.heldout_split):
            raise ValueError(
                f"source.heldout is {self.source.heldout:g} prompts, and where a source grows or shrinks a number "
                "moves prompts from one side to the other: give a share below 1, or held-out files (heldout_path)"
            )
        if self.source.judge_pairs:
            raise ValueError("source.judge_pairs has no effect: no pairs of a growing source are set apart; remove it")
        return self

    def experiment(self) -> Experiment:
        """The profile reduced to the Q-Adapter and one domain, whose preferences come from `source`.

        Raises:
            QAdapterError: the profile cannot be read or does not have the domain, or the budget limits what it does not
                measure.
        """
        whole = load_experiment(self.profile, self.overrides)
        if self.domain not in whole.domains:
            raise QAdapterError(
                f"domain is {self.domain!r}, but the profile {self.profile!r} has {', '.join(whole.domains)}; name one"
            )
        fields = whole.model_dump(mode="json", by_alias=True)
        used = set(whole.pretraining.corpus_sources if whole.pretraining else ())
        used |= {whole.helpful_sft.source} if whole.helpful_sft else set()
        used |= set(whole.built_benchmarks.sources.values() if whole.built_benchmarks else ())
        fields["sources"] = {name: source for name, source in fields["sources"].items() if name in used}
        fields["sources"][PREFERENCES] = self.source.model_dump(mode="json")
        fields["domains"] = {self.domain: {**fields["domains"][self.domain], "source": PREFERENCES}}
        fields["methods"]["run"] = [SUBJECT.name]
        fields["seeds"] = [self.seed]
        if self.budget is not None and whole.evaluation.curve is None:
            fields["evaluation"]["curve"] = CurveSettings(points=9).model_dump()
        judge = judge_of(whole, self.domain)
        if judge and judge.training:  # its training pairs are not set apart in a growing source
            fields["evaluation"]["adaptation"]["judge"] = NO_JUDGE
        reduced = Experiment.model_validate(fields)
        if self.budget is not None and (unmeasured := reduced.unmeasured_of(self.budget)):
            raise QAdapterError(f"budget: {unmeasured}")
        return reduced


def customizations() -> list[str]:
    """Names of the files in `configs/customize/`."""
    return names_in(CONFIG_FOLDER)


def load_customization(config: str) -> Customization:
    """Read a customization by its name in `configs/customize/` or by its path.

    Raises:
        QAdapterError: the file is missing or invalid. The message lists every problem with its key.
    """
    return read_named(Customization, "customization", config, CONFIG_FOLDER)
