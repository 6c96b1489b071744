"""SPIN (Chen et al., 2024): the chosen replies against the policy's own, in iterations of self-play."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from qadapter.config.base import Count, Positive, Temperature
from qadapter.methods.method import LEARNING_RATE, Knob, Look, Method, MethodSettings

if TYPE_CHECKING:
    from transformers import Trainer

    from qadapter.config.training import OptimizerSettings
    from qadapter.training.adapt import Job


class SPINSettings(MethodSettings):
    """Self-play.

    Attributes:
        beta: the paper's λ, DPO's β against the opponent.
        iterations: how often the policy becomes its own opponent; the training's steps are divided among them.
        temperature: of the opponent's replies.
        max_new_tokens: of the opponent's replies; None: as many as the longest chosen reply has. Half of
            `training.max_length` is theirs at least; prompts that leave less lose their beginning.
    """

    beta: Positive = 0.1
    iterations: Annotated[int, Field(ge=2)] = 2
    temperature: Temperature = 1.0
    max_new_tokens: Count | None = None

    def misfit(self, training: OptimizerSettings) -> str:
        """An iteration has a step at least."""
        if training.max_steps is None or self.iterations <= training.max_steps:
            return ""
        return f"iterations: {self.iterations} are more than the {training.max_steps} steps of training.max_steps"


def train(job: Job, choice: SPINSettings) -> Trainer:
    """Train on each pair's chosen reply and on replies of the opponent; the rejected replies are not seen."""
    from qadapter.training.self_play import train_against_itself

    return train_against_itself(
        job,
        METHOD.name,
        beta=choice.beta,
        iterations=choice.iterations,
        temperature=choice.temperature,
        max_new_tokens=choice.max_new_tokens,
    )


METHOD = Method(
    name="spin",
    settings=SPINSettings,
    train=train,
    passes=3.5,  # the opponent's forward pass, the adapted model's, one backward, and the opponent's own replies
    knobs=(
        Knob("beta", "β", "β"),
        Knob("iterations", "K", "number of iterations"),
        Knob("temperature", "T", "temperature"),
        LEARNING_RATE,
    ),
    look=Look("#882255", "x"),
    group="preference losses",
    strength="beta",
    refuses={
        "eval_steps": "its opponent's replies to the pairs that are set aside would change with every iteration",
        "include_num_input_tokens_seen": "it counts the tokens of its opponent's replies itself",
    },
)
