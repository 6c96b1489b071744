"""One process of the two-process test of the trainer: trains two steps and writes what came out (rank 0)."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from test_qadapter_trainer import adapter_state, make_trainer, pairs


def main(out: str, objective: str, per_process: int) -> None:
    torch.set_num_threads(1)
    trainer = make_trainer(
        Path(out) / "run",
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
        save_file(adapter_state(trainer) | logged | world, Path(out) / "result.safetensors")
    trainer.save_model(str(Path(out) / "adapter"))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
