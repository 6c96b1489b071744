"""One of two processes of `test_qadapter_distributed.py`: does a piece of training and writes what came out."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from qadapter.policy.model import QAdapterForCausalLM
from qadapter.policy.objective import BatchTotals, Objective, batch_totals
from qadapter.preferences.tokenize import collate_pairs, encode_pair
from tests.qadapter.training.test_qadapter_trainer import TOKENIZER, adapter_state, make_trainer, pairs
from tests.support.tiny_models import lora, moved, tiny_model


def train(out: Path, objective: str, per_process: int) -> None:
    """Two optimiser steps and an evaluation whose 6 pairs do not divide by the processes' batches."""
    trainer = make_trainer(
        out / "run",
        pairs(8),
        objective=objective,
        per_device_train_batch_size=per_process,
        gradient_accumulation_steps=2,
        eval_dataset=pairs(6),
        per_device_eval_batch_size=2,
        max_steps=2,
        optim="sgd",
        learning_rate=0.05,
        max_grad_norm=0.0,
        ddp_backend="gloo" if "LOCAL_RANK" in os.environ else None,
    )
    trainer.train()
    metrics = trainer.evaluate()
    if trainer.is_world_process_zero():
        history = [e for e in trainer.state.log_history if "loss" in e]
        names = ("loss", "rewards/chosen", "rewards/accuracies", "loss/regularization", "kl/base")
        logged = {name: torch.tensor([entry[name] for entry in history]) for name in names}
        del logged["rewards/accuracies"]  # which of two rewards is larger is rounding where both are 0, at the start
        logged |= {f"eval_{name}": torch.tensor([metrics[f"eval_{name}"]]) for name in names}
        world = {"world": torch.tensor(trainer.accelerator.num_processes)}
        save_file(adapter_state(trainer) | logged | world, out / "result.safetensors")
    trainer.save_model(str(out / "adapter"))


def sharded_gradient(out: Path) -> None:
    """One backward pass of a policy whose layers are sharded (FSDP2), each process with half of the pairs."""
    import torch.distributed as dist
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    policy = gradient_policy()
    for layer in policy.peft_model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(policy, mesh=mesh)
    mine = pairs(8)[dist.get_rank() :: 2]
    loss_of(policy, mine, whole_totals(policy)).backward()
    # FSDP averages over the processes, as DDP does; the trainer's loss makes up for it in the same way
    gradients = {n: 2 * p.grad.full_tensor() for n, p in policy.named_parameters() if p.grad is not None}
    state = get_model_state_dict(policy, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    policy.save_pretrained(out / "adapter", is_main_process=dist.get_rank() == 0, state_dict=state)
    if dist.get_rank() == 0:
        save_file(gradients, out / "result.safetensors")
    dist.destroy_process_group()


def gradient_policy() -> QAdapterForCausalLM:
    torch.manual_seed(0)
    return moved(QAdapterForCausalLM.from_base(tiny_model(), lora(), Objective.preset("residual", beta=0.5))).train()


def whole_totals(policy: QAdapterForCausalLM) -> BatchTotals:
    batch = collate_pairs([encode_pair(pair, TOKENIZER, 64) for pair in pairs(8)], 0)
    return batch_totals(batch["response_mask"], policy.objective)


def loss_of(policy: QAdapterForCausalLM, some: list, totals: BatchTotals) -> Tensor:
    batch = collate_pairs([encode_pair(pair, TOKENIZER, 64) for pair in some], 0)
    loss = policy(**batch, totals=totals).loss
    assert loss is not None
    return loss


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    if sys.argv[1] == "train":
        train(folder, sys.argv[3], int(sys.argv[4]))
    else:
        sharded_gradient(folder)
