"""A sweep: the schema of `configs/sweep/*.yaml`, and the settings to train and measure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from qadapter.config.base import Name, NonNegative, Positive, Seed, Settings, refuse_repeats
from qadapter.config.experiment import PROFILE_FOLDER, Experiment, load_experiment
from qadapter.config.methods import MethodName
from qadapter.config.reading import read_named, refuse_without_effect
from qadapter.errors import QAdapterError
from qadapter.methods.table import METHODS, NAMES, method_named

SWEEP_FOLDER = PROFILE_FOLDER / "sweep"
PARALLEL_EFFICIENCY = 0.85  # stages side by side on two cores share caches, the database and Prefect's server

Value = bool | float | str | None


class Group(Settings):
    """A group of settings of one method.

    Attributes:
        method: the method's name.
        tuning: whether the group is the method's hyper-parameter search, which has the same size for every method.
            Otherwise it is an ablation, which is reported separately and not used to compare methods.
        centre: settings of the centre; others are the profile's, or with a `preset` the preset's.
        one_at_a_time: setting → values. Variants: the centre, and the centre with one setting changed.
        combine: setting → values. Variants: every combination. A value of null is the centre's.
        alpha_0_at_inference: further values of α0 with which the centre's trained adapter is measured.
    """

    method: MethodName
    tuning: bool = False
    centre: dict[str, Value] = Field({})
    one_at_a_time: dict[str, tuple[Value, ...]] = Field({})
    combine: dict[str, tuple[Value, ...]] = Field({})
    alpha_0_at_inference: tuple[NonNegative, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Group:
        if self.one_at_a_time and self.combine:
            raise ValueError("one_at_a_time and combine exclude each other; give one of them")
        method = method_named(self.method)
        if self.alpha_0_at_inference and not method.moves_alpha_0:
            having = " and ".join(other.name for other in METHODS if other.moves_alpha_0)
            raise ValueError(f"alpha_0_at_inference is for {having}; {self.method} has no α0")
        for part in ("centre", "one_at_a_time", "combine"):
            if unknown := [knob for knob in getattr(self, part) if knob not in method.swept]:
                raise ValueError(f"{part} names {unknown}; {self.method} has {', '.join(method.swept)}")
        for knob, values in (self.one_at_a_time | self.combine).items():
            refuse_repeats(knob, values)
        refuse_repeats("alpha_0_at_inference", self.alpha_0_at_inference)
        return self

    def changes(self) -> list[dict[str, Value]]:
        """The changes of each of the group's settings, the centre first."""
        found = [dict(self.centre)] if not self.combine else []
        for knob, values in self.one_at_a_time.items():
            found += [{**self.centre, knob: value} for value in values]
        if self.combine:
            for values in product(*self.combine.values()):
                given = {knob: value for knob, value in zip(self.combine, values, strict=True) if value is not None}
                found.append({**self.centre, **given})
        return [change for place, change in enumerate(found) if change not in found[:place]]


class Sweep(Settings):
    """A sweep.

    Attributes:
        name: part of titles and of the report's key.
        profile: the experiment to vary: a name in `configs/`, or a YAML file.
        seeds: every setting is trained once per seed.
        confirm_seeds: further seeds, with which only the chosen setting of each tuned method is trained: the one with
            the best trade on the half of the held-out items that chooses (`qadapter.report.sweep.halves`).
        domains: the profile's domains to sweep.
        settings: changes to the experiment for all settings, by dotted key, such as `parallel`.
        groups: the groups of settings.
        seconds: times measured on two cores, used by `--plan` only: `base` (everything computed once), `dial`
            (measuring a trained adapter again), and per method the training and measuring of one adapter.
    """

    name: Name
    profile: str
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)]
    confirm_seeds: tuple[Seed, ...] = ()
    domains: Annotated[tuple[Name, ...], Field(min_length=1)]
    settings: dict[str, Any] = Field({})
    groups: dict[Name, Group] = Field(min_length=1)
    seconds: dict[Literal["base", "dial"] | MethodName, Positive]

    @model_validator(mode="after")
    def _check(self) -> Sweep:
        refuse_repeats("seeds", (*self.seeds, *self.confirm_seeds))
        refuse_repeats("domains", self.domains)
        problems = list(self._contradictions())
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _contradictions(self) -> Iterator[str]:
        tuned = {name: group for name, group in self.groups.items() if group.tuning}
        for method in NAMES:
            if len(own := [name for name, group in tuned.items() if group.method == method]) > 1:
                yield f"groups {own} are both the tuning of {method}; keep one and set tuning to false in the others"
        if self.confirm_seeds and not tuned:
            yield "confirm_seeds train the chosen setting of each tuned method, and no group has tuning: true"
        efforts = {group.method: len(group.changes()) for group in tuned.values()}
        if len(set(efforts.values())) > 1:
            counts = ", ".join(f"{method} {effort}" for method, effort in efforts.items())
            yield f"every method needs the same number of tuning settings; given are {counts}"
        if lacking := {"base", "dial", *(group.method for group in self.groups.values())} - set(self.seconds):
            yield f"seconds: {sorted(lacking)} are missing"


@dataclass(frozen=True)
class Variant:
    """One setting to measure.

    Attributes:
        name: the name everywhere: the family and the changed settings.
        family: the method; for the Q-Adapter its objective.
        method: the method's name.
        groups: the groups that contain it.
        tuning: whether one of these groups is the method's tuning.
        experiment: the sweep's experiment with this setting.
        alpha_0: α0 at inference, where it differs from that in training.
        trained_as: the variant whose trained adapter is measured; itself, unless α0 is changed at inference.
    """

    name: str
    family: str
    method: str
    groups: tuple[str, ...]
    tuning: bool
    experiment: Experiment
    alpha_0: float | None
    trained_as: str


def load_sweep(sweep: str) -> Sweep:
    """Read a sweep.

    Args:
        sweep: a name in `configs/sweep/`, or a YAML file.

    Raises:
        QAdapterError: unknown sweep or key, wrong type, or contradiction. The message lists every problem with its
            path.
    """
    return read_named(Sweep, "sweep", sweep, SWEEP_FOLDER)


def merged_overrides(sweep: Sweep, profile: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A sweep's changes to its profile: seeds, settings, domains, and the removal of sources that become unused.

    Args:
        sweep: the sweep.
        profile: a profile's name or file.
        overrides: the user's overrides, which take precedence.

    Raises:
        QAdapterError: the profile cannot be read or lacks one of the domains, or a change has no effect.
    """
    changes = {**sweep.settings, **overrides}
    refuse_without_effect(f"sweep {sweep.name}", changes, {"methods.run": "the groups of a sweep name its methods"})
    experiment = load_experiment(profile, changes)
    if unknown := [name for name in sweep.domains if name not in experiment.domains]:
        known = ", ".join(experiment.domains)
        raise QAdapterError(f"sweep {sweep.name}: domains {unknown} are not in the profile {profile!r}; it has {known}")
    domains = {name: experiment.domains[name] for name in sweep.domains}
    used = {domain.source for domain in domains.values()}
    if experiment.helpful_sft:
        used.add(experiment.helpful_sft.source)
    if experiment.pretraining:
        used |= set(experiment.pretraining.corpus_sources)
    if experiment.built_benchmarks:
        used |= set(experiment.built_benchmarks.sources.values())
    return {
        "seeds": list(sweep.seeds),
        **changes,
        "run_domains": None,
        "domains": {name: domain.model_dump() for name, domain in domains.items()},
        "sources": {name: source.model_dump() for name, source in experiment.sources.items() if name in used},
    }


def expand(sweep: Sweep, experiment: Experiment) -> list[Variant]:
    """List every setting of a sweep once, in the order of its groups; a setting of two groups belongs to both.

    Args:
        sweep: what to vary.
        experiment: the sweep's experiment, with its overrides.

    Raises:
        QAdapterError: a method does not accept one of its values.
    """
    found: dict[str, Variant] = {}
    for group_name, group in sweep.groups.items():
        own = []
        for change in group.changes():
            varied = _with_settings(experiment, group.method, change, f"groups.{group_name}")
            key = varied.methods.of(group.method).model_dump_json() + group.method
            if group.tuning and key in own:
                raise QAdapterError(
                    f"groups.{group_name}: {change} is a setting that the group has already, so {group.method} "
                    "would be tuned over fewer than the other methods."
                )
            own.append(key)
            if key in found:
                _join(found, key, group_name, group.tuning)
                continue
            family, name = _names(group.method, change, varied)
            if taken := next((old for old in found.values() if old.name == name), None):
                raise QAdapterError(
                    f"groups.{group_name}: two different settings are named {name!r}; the other one is of groups."
                    f"{taken.groups[0]}. Leave one of them out."
                )
            found[key] = Variant(name, family, group.method, (group_name,), group.tuning, varied, None, name)
        centre = found[own[0]]
        for alpha_0 in group.alpha_0_at_inference:
            key = f"{own[0]}·{alpha_0}"
            if key in found:
                _join(found, key, group_name, tuning=False)
                continue
            name = f"{centre.name}, then α0={_short(alpha_0)}"
            found[key] = Variant(
                name, centre.family, group.method, (group_name,), False, centre.experiment, alpha_0, centre.name
            )
    return list(found.values())


def _join(found: dict[str, Variant], key: str, group: str, tuning: bool) -> None:
    old = found[key]
    found[key] = Variant(**{**vars(old), "groups": (*old.groups, group), "tuning": old.tuning or tuning})


def _with_settings(experiment: Experiment, method: str, change: Mapping[str, Value], where: str) -> Experiment:
    """The experiment with other settings of one method; equal settings compare equal, however they were given."""
    section = experiment.methods.of(method)
    start = {} if "preset" in change else section.model_dump()
    try:
        changed = type(section).model_validate({**start, **change})
    except ValidationError as error:
        problems = "; ".join(f"{problem['loc'][0]}: {problem['msg']}" for problem in error.errors())
        raise QAdapterError(f"{where}: {problems} (given: {dict(change)})") from error
    if changed.learning_rate == experiment.training.learning_rate:
        changed = changed.model_copy(update={"learning_rate": None})
    return experiment.model_copy(update={"methods": experiment.methods.changed(method, changed)})


def _names(method: str, change: Mapping[str, Value], varied: Experiment) -> tuple[str, str]:
    """Family and name of a setting; the name has the values as they were understood (`"1e-4"` is a number)."""
    family = method_named(method).family_of(change)
    labels = {knob.name: knob.label for knob in method_named(method).knobs if knob.label}
    settings = varied.methods.of(method).model_dump()
    settings["learning_rate"] = settings["learning_rate"] or varied.training.learning_rate
    given = [
        f"{labels[knob]}={_short(settings[knob])}"
        for knob, value in change.items()
        if knob in labels and value is not None
    ]
    return family, " ".join([family, *given])


def _short(value: float) -> str:
    """As few digits as tell a number from every other one."""
    short = f"{value:g}"
    return short if float(short) == value else repr(float(value))


def estimate_hours(sweep: Sweep, variants: list[Variant], experiment: Experiment) -> float:
    """Estimate a sweep's duration in hours without any cached stage, from its `seconds`."""
    of_seed = sum(sweep.seconds["dial" if v.alpha_0 is not None else v.method] for v in variants)
    confirming = sum(sweep.seconds[method] for method in {v.method for v in variants if v.tuning})
    trained = of_seed * len(experiment.seeds) + confirming * len(sweep.confirm_seeds)
    seconds = trained * len(experiment.domains)
    parallel = experiment.parallel
    speed = 1.0 if parallel == 1 else parallel * PARALLEL_EFFICIENCY
    return (sweep.seconds["base"] + seconds / speed) / 3600
