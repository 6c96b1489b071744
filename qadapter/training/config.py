"""Arguments of `QAdapterTrainer`."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from transformers import TrainingArguments

from qadapter.config.open_settings import NO_EFFECT
from qadapter.errors import QAdapterError
from qadapter.policy.objective import Objective
from qadapter.training.evaluated import larger_is_better


@dataclass
class QAdapterConfig(TrainingArguments):
    """transformers' `TrainingArguments`, the objective and what happens to the data.

    The fields of the objective are None for the value of the preset named in `objective`;
    `qadapter.policy.objective.Objective` says what each one is. Defaults that differ from `TrainingArguments`:
    `learning_rate` 3e-4 (the paper's), `logging_steps` 10, `remove_unused_columns` off (the data are pairs),
    `ddp_find_unused_parameters` off (every parameter of the adapter is used in every step), `greater_is_better` by the
    metric's name (off for losses and `kl/base`).

    Attributes:
        objective: preset to start from: `residual`, `paper` or `published-code`.
        alpha_tilde: α̃.
        alpha_0: α0.
        beta: β.
        gamma: γ.
        preference_scale: w.
        parametrization: `absolute` or `residual`.
        value: `next-state` or `current-state`.
        aggregation: `discounted-sum` or `padded-mean`.
        shift_mask: whether the positions that predict response tokens are scored.
        loss_implementation: `fused` (only response positions meet the vocabulary, in blocks; a pair's prompt is encoded
            once) or `readable` (the definition, with full logits); see `QAdapterForCausalLM`.
        max_length: most tokens of prompt + reply (paper: 512); the prompt is cut from the left. None cuts nothing.
        group_by_length: earlier name of `train_sampling_strategy="group_by_length"`.
        pad_to_multiple_of: batches are padded to a multiple of it.
        allow_truncation: train although `max_length` cuts most pairs' replies.
        thinking: of a thinking model, on or off; None leaves it to the chat template.
        thoughts: `score` the thoughts of replies, or `leave-out`; None as the tokenizer says (it scores them).
        chat_template_kwargs: further variables of the chat template. These three are saved with the tokenizer.
        model_init_kwargs: for `AutoModelForCausalLM.from_pretrained`, if the model is given by name.
    """

    objective: str = field(default="residual", metadata={"help": "residual, paper or published-code"})
    alpha_tilde: float | None = None
    alpha_0: float | None = None
    beta: float | None = None
    gamma: float | None = None
    preference_scale: float | None = None
    parametrization: str | None = None
    value: str | None = None
    aggregation: str | None = None
    shift_mask: bool | None = None
    loss_implementation: str = field(default="fused", metadata={"help": "fused or readable"})
    max_length: int | None = 512
    group_by_length: bool = False
    pad_to_multiple_of: int | None = None
    allow_truncation: bool = False
    thinking: bool | None = None
    thoughts: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    model_init_kwargs: dict[str, Any] | None = None

    learning_rate: float = 3e-4
    logging_steps: float = 10
    remove_unused_columns: bool = False
    ddp_find_unused_parameters: bool | None = False

    def __post_init__(self) -> None:
        if self.metric_for_best_model is not None and self.greater_is_better is None:
            # transformers takes what does not end with "loss" as better the larger it is: `loss/preference`, `kl/base`
            self.greater_is_better = larger_is_better(self.metric_for_best_model)
        super().__post_init__()
        if self.group_by_length:
            self.train_sampling_strategy = "group_by_length"

    def to_objective(self) -> Objective:
        """The objective these arguments describe.

        Raises:
            ValueError: an unknown preset or choice, or a number out of range.
        """
        given = {f.name: getattr(self, f.name) for f in fields(Objective) if getattr(self, f.name) is not None}
        return Objective.preset(self.objective, **given)  # type: ignore[arg-type]


def refuse_arguments(args: Any) -> None:
    """Refuse arguments of the trainer that would have no effect.

    Raises:
        QAdapterError: another class, a field that this objective cannot follow, or a `max_length` without room.
    """
    if not isinstance(args, QAdapterConfig):
        raise QAdapterError(
            f"args is {type(args).__name__}; expected QAdapterConfig, which has the objective's fields."
        )
    defaults = {
        one.name: one.default if one.default_factory is MISSING else one.default_factory()
        for one in fields(args)
        if one.name in NO_EFFECT
    }
    for name, default in defaults.items():
        if getattr(args, name) not in (default, None):
            raise QAdapterError(f"QAdapterConfig: {name} cannot be set: {NO_EFFECT[name]}. Leave it out.")
    if args.train_sampling_strategy == "batch_rebalance":
        raise QAdapterError(
            "QAdapterConfig: train_sampling_strategy is 'batch_rebalance'; expected random, sequential or "
            "group_by_length."
        )
    if args.max_length is not None and (not isinstance(args.max_length, int) or args.max_length < 2):
        raise QAdapterError(
            f"QAdapterConfig: max_length is {args.max_length!r}; expected at least 2 (one prompt token and one of a "
            "reply), or None to cut nothing."
        )
