"""The settings of each method."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from qadapter.config.base import Count, NonNegative, Positive, Settings, refuse_repeats

Method = Literal["q-adapter", "sft", "dpo", "replay"]


METHODS: tuple[Method, ...] = ("q-adapter", "sft", "dpo", "replay")


class QAdapterSettings(Settings):
    """The method's own knobs (`qadapter/policy/objective.py`); None takes the preset's value.

    `paper` is the paper's table.
    """

    preset: Literal["paper", "published-code", "residual"] = "paper"
    alpha_tilde: Positive | None = None
    alpha_0: NonNegative | None = None
    beta: NonNegative | None = None
    gamma: Annotated[float, Field(gt=0, le=1)] | None = None
    preference_scale: Positive | None = None
    shift_mask: bool | None = None
    learning_rate: Positive | None = None


class SFTSettings(Settings):
    """SFT on the chosen replies."""

    learning_rate: Positive | None = None


class DPOSettings(Settings):
    """DPO with the base as reference."""

    beta: Positive = 0.1
    learning_rate: Positive | None = None


class ReplaySettings(Settings):
    """SFT on the chosen replies and on the base's own answers to the same prompts, one to one."""

    learning_rate: Positive | None = None
    max_new_tokens: Count
    temperature: NonNegative = 0.0


class MethodSettings(Settings):
    """Every method's own settings; `run` says which of them run."""

    run: tuple[Method, ...] = METHODS
    q_adapter: QAdapterSettings = Field(QAdapterSettings(), alias="q-adapter")
    sft: SFTSettings = SFTSettings()
    dpo: DPOSettings = DPOSettings()
    replay: ReplaySettings

    @model_validator(mode="after")
    def _check(self) -> MethodSettings:
        refuse_repeats("run", self.run)
        return self

    def of(self, method: Method) -> QAdapterSettings | SFTSettings | DPOSettings | ReplaySettings:
        """The settings of one method."""
        sections: dict[Method, QAdapterSettings | SFTSettings | DPOSettings | ReplaySettings] = {
            "q-adapter": self.q_adapter,
            "sft": self.sft,
            "dpo": self.dpo,
            "replay": self.replay,
        }
        return sections[method]
