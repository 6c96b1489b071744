"""What a method is: the record that each method's file fills in, and the parts that it is made of.

The code of a method's file is part of its trainings' cache keys. The file imports this module, `qadapter.config.base`
and what it trains with; never the table or the whole schema, or a new method would re-train all others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from qadapter.config.base import Positive, Settings

if TYPE_CHECKING:
    from transformers import Trainer

    from qadapter.config.training import OptimizerSettings
    from qadapter.training.adapt import Job

Marker = str | tuple[int, Literal[0, 1, 2], int]
Group = Literal["Q-Adapter", "baselines", "preference losses", "RL", "regularised", "guided"]


class MethodSettings(Settings):
    """What every method's section of a config has: a learning rate of its own; None for the experiment's."""

    learning_rate: Positive | None = None

    def misfit(self, training: OptimizerSettings) -> str:
        """Why these settings and the experiment's `training` cannot be used together; empty if they can."""
        return ""


S = TypeVar("S", bound=MethodSettings)


@dataclass(frozen=True)
class Knob:
    """A setting of a method that a sweep can vary or a sweep's report shows.

    Attributes:
        name: the field of the method's settings.
        label: in names of a sweep's settings (`dpo β=1`) and above its columns; empty for a setting that is not a
            number: it belongs to the setting's family.
        words: in sentences.
        swept: whether a sweep may vary it; otherwise its value is only recorded.
    """

    name: str
    label: str = ""
    words: str = ""
    swept: bool = True


LEARNING_RATE = Knob("learning_rate", "lr", "learning rate")


@dataclass(frozen=True)
class Look:
    """Colour (`#rrggbb`) and matplotlib marker in every figure; (4, 1, 0) is a star with four points."""

    colour: str
    marker: Marker


@dataclass(frozen=True)
class PairsPlan:
    """What `make plan` knows of a domain's training pairs: how many, and the tokens of one prompt + reply."""

    pairs: int
    tokens_per_sequence: float


@dataclass(frozen=True)
class Work:
    """The work of a stage, for `make plan`: optimiser steps (0: none), tokens, and passes per token."""

    steps: int
    tokens: float
    passes: float


@dataclass(frozen=True)
class Need:
    """Something that is made of the base and a domain's training pairs before a method trains: a stage of its own.

    Methods, seeds and a sweep's settings whose needs are equal share one stage.

    Attributes:
        name: of the stage; the training finds its folder under this name in `Job.needs`.
        settings: all that the result depends on besides base, seed and data.
        reads: what of the pairs counts: their distinct `prompts`, so that domains with the same prompts share the
            result, or the `pairs` themselves.
        make: a function at the top of a module of `qadapter`, whose code the stage's key is made of. It is called as
            `make(base, pairs_file, model=…, settings=…, batch_size=…, seed=…, out=…, scratch=…)`, with the batch size
            of evaluations, and fills the folder `out`; `scratch` survives a kill. The following two ask for more.
        work: from `settings` and the pairs to the work.
        needs: other needs, made before; `make` gets `needs`, their folders by name.
        takes: what else `make` gets. `lora` is the adapter's shape, `training` the domain's training settings (both are
            in the stage's key), `heldout_file` the pairs that no training sees.
        trains: whether it is a training, which runs in several processes where trainings do.
        shared: whether several processes can share its work (`qadapter.progress.kept`), as they share evaluations.
    """

    name: str
    settings: Settings
    reads: Literal["prompts", "pairs"]
    make: Callable[..., None]
    work: Callable[[Any, PairsPlan], Work]
    needs: tuple[Need, ...] = ()
    takes: tuple[Literal["lora", "training", "heldout_file"], ...] = ()
    trains: bool = False
    shared: bool = False


def no_needs(_: Any) -> tuple[Need, ...]:
    """The needs of a method that trains on the pairs alone."""
    return ()


@dataclass(frozen=True, eq=False)
class Method(Generic[S]):
    """One method.

    Attributes:
        name: in configs, tables, figures and MLflow.
        settings: its section, `methods.<name>`.
        train: trains the adapter; a function at the top of the method's own file. Examples and the trainer's arguments
            come together, from `Job.on_pairs` or `Job.on_conversations`, so that every method gets the same budget.
        passes: forward passes' worth of work per trained token, for the plan: a forward pass 1, a backward pass
            through the frozen layers 1.
        knobs: its settings that a sweep may vary, in the order of their columns.
        look: in the figures.
        group: the kind of method that it is, under which reports with many methods list it.
        strength: the field of its settings that sets how strongly it leaves the base, if it has one; the report says
            its value.
        needs: from its settings to the stages that it needs.
        by_default: whether it runs where a config names no methods.
        takes_single: whether it trains on single replies with a label (`pairing: none`) as well as on pairs.
        refuses: settings of `training` that it cannot follow (`eval_steps`, `group_by_length`, fields of `trainer`),
            each with the reason; an experiment with both is refused when it is read.
        moves_alpha_0: whether its trained adapter can be measured with another α0 at inference.
        family: from a sweep's changes of its settings to the family that the setting is shown in; None: its name.
        families: the looks of its families; none: its name with `look`.
    """

    name: str
    settings: type[S]
    train: Callable[[Job, S], Trainer]
    passes: float
    knobs: tuple[Knob, ...]
    look: Look
    group: Group
    strength: str | None = None
    needs: Callable[[S], tuple[Need, ...]] = no_needs
    by_default: bool = False
    takes_single: bool = False
    refuses: Mapping[str, str] = field(default_factory=dict)
    moves_alpha_0: bool = False
    family: Callable[[Mapping[str, Any]], str] | None = None
    families: Mapping[str, Look] = field(default_factory=dict)

    @property
    def attribute(self) -> str:
        """The name of its section as a Python attribute."""
        return self.name.replace("-", "_")

    @property
    def module(self) -> str:
        """Dotted name of its file, whose code its trainings' keys are made of."""
        return self.train.__module__

    @property
    def swept(self) -> tuple[str, ...]:
        """Names of the settings that a sweep may vary."""
        return tuple(knob.name for knob in self.knobs if knob.swept)

    def family_of(self, change: Mapping[str, Any]) -> str:
        """The family of one of a sweep's settings, given what it changes."""
        return self.family(change) if self.family else self.name

    def looks(self) -> Mapping[str, Look]:
        """Family → look, in a sweep's figure."""
        return self.families or {self.name: self.look}
