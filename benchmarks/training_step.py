"""One training step: the published way, TRL's DPO, and each technique of this project on its own.

python -m benchmarks.training_step                       # both shapes, 1 and 8 pairs
python -m benchmarks.training_step --shapes body-heavy --batches 1 --threads 2
python -m benchmarks.training_step --tried               # and the techniques that were not taken
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from trl import DPOConfig, DPOTrainer

from benchmarks.measure import Measured, arguments, compare, prepare, table
from benchmarks.published import CONFIGURATIONS, published_step
from benchmarks.shapes import SHAPES, Shape, base_model, batch, lora, policy
from benchmarks.tried import compiled_pairwise_loss, one_pass_loss
from qadapter.policy.model import QAdapterForCausalLM
from qadapter.policy.objective import Objective, PairwiseLoss, pairwise_loss, scored_positions

PUBLISHED = "published code, plain"


def published_name(configuration: str) -> str:
    """What a table calls the published code in one of its configurations."""
    return f"published code, {configuration}"


def sides(shape: Shape, pairs: int, device: str, dtype: torch.dtype, tried: bool) -> dict[str, Callable[[], Tensor]]:
    """Every way to make one step's gradients on the same pairs; with `tried` also those that were not taken."""
    objective = Objective.preset("published-code", shift_mask=True)
    data = batch(shape, pairs, device)
    ours = policy(shape, device, dtype, objective).train()

    def readable() -> Tensor:
        ours.loss_implementation = "readable"
        return backward(ours, ours(**data).loss)

    def response_positions() -> Tensor:
        return backward(ours, response_positions_loss(ours, data, objective))

    def fused(share: bool) -> Tensor:
        ours.loss_implementation = "fused"
        if ours._pair_passes is not None:
            ours._pair_passes.share_prompts = share
        return backward(ours, ours(**data).loss)

    def published(configuration: str) -> Callable[[], Tensor]:
        return lambda: clear(ours, published_step(ours.peft_model, data, objective, configuration))

    def compiled() -> Tensor:
        return backward(ours, response_positions_loss(ours, data, objective, compiled_pairwise_loss()))

    fused(True)  # makes the passes and checks them
    made = {
        **{published_name(one): published(one) for one in CONFIGURATIONS},
        "this project's readable objective": readable,
        "+ response positions only": response_positions,
        "+ vocabulary in blocks (fused)": lambda: fused(False),
        "+ shared prompt = this project": lambda: fused(True),
        "TRL DPO": trl_dpo(shape, data, device, dtype),
    }
    if tried:
        made["tried: positions only, compiled"] = compiled
        made["tried: fused, base in same pass"] = lambda: backward(ours, one_pass_loss(ours, data, objective))
    return made


def clear(model: QAdapterForCausalLM, loss: Tensor) -> Tensor:
    """Drop the gradients."""
    model.zero_grad()
    return loss


def backward(model: QAdapterForCausalLM, loss: Tensor | None) -> Tensor:
    """Gradients of a loss, dropped again."""
    assert loss is not None
    loss.backward()
    return clear(model, loss.detach())


def response_positions_loss(
    ours: QAdapterForCausalLM,
    data: dict[str, Tensor],
    objective: Objective,
    loss: Callable[..., PairwiseLoss] = pairwise_loss,
) -> Tensor:
    """Full logits of the scored positions alone, with autograd through the readable objective."""
    scored = scored_positions(data["response_mask"], objective.shift_mask)
    rows, positions = scored.nonzero(as_tuple=True)
    base: Any = ours.peft_model.get_base_model()
    decoder = base.get_decoder()
    inputs = {"input_ids": data["input_ids"], "attention_mask": data["attention_mask"], "use_cache": False}
    with ours._passes.bare(len(scored)):
        base_hidden = decoder(**inputs)[0]
    hidden = decoder(**inputs)[0]
    head = ours.get_output_embeddings()
    # The readable objective wants rows: put each row's scored positions, one more for the last token, side by side.
    counts = scored.sum(1)
    width = int(counts.max())
    index = torch.zeros(len(scored), width + 1, dtype=torch.long, device=scored.device)
    slot = torch.arange(width, device=scored.device)
    filled = slot < counts[:, None]
    index[:, :-1][filled] = positions
    tokens = torch.zeros_like(index)
    tokens[:, 1:][filled] = data["input_ids"][rows, positions + 1]
    mask = torch.zeros_like(index, dtype=torch.bool)
    mask[:, 1:] = filled
    gather = index[..., None].expand(-1, -1, hidden.shape[-1])
    with torch.no_grad():
        base_logits = head(base_hidden.gather(1, gather))
    return loss(head(hidden.gather(1, gather)), base_logits, tokens, mask, objective).loss


def trl_dpo(shape: Shape, data: dict[str, Tensor], device: str, dtype: torch.dtype) -> Callable[[], Tensor]:
    """TRL's own loss on the same token ids, through its trainer."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "a": 2}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")
    trainer = DPOTrainer(
        model=base_model(shape, device, dtype),
        args=DPOConfig(
            output_dir=tempfile.mkdtemp(),
            report_to="none",
            use_cpu=device == "cpu",
            bf16=False,
            gradient_checkpointing=False,
            disable_dropout=False,
        ),
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": " a a", "rejected": " a"}]),
        processing_class=tokenizer,
        peft_config=lora(),
    )
    model: Any = trainer.model
    model.train()
    inputs = {k: data[k] for k in ("input_ids", "attention_mask")} | {"completion_mask": data["response_mask"].long()}

    def step() -> Tensor:
        loss = trainer.compute_loss(model, inputs)
        loss.backward()
        model.zero_grad()
        return loss.detach()

    return step


def main(argv: Sequence[str] | None = None) -> None:
    """Print one table for each shape and number of pairs."""
    parser = arguments(__doc__)
    parser.add_argument("--tried", action="store_true", help="also what was tried and not taken")
    options = parser.parse_args(argv)
    prepare(options)
    for name in options.shapes:
        bytes_a_pair: dict[str, float] = {}
        for pairs in sorted(options.batches):
            made = sides(SHAPES[name], pairs, options.device, getattr(torch, options.dtype), options.tried)
            expected = {side: pairs * one for side, one in bytes_a_pair.items()}
            results = compare(made, options.rounds, options.device, expected)
            bytes_a_pair |= {side: r.peak_bytes / pairs for side, r in results.items() if isinstance(r, Measured)}
            print(table(f"training step, {name}, {pairs} pair(s), T = {SHAPES[name].length}", results, PUBLISHED))


if __name__ == "__main__":
    main()
