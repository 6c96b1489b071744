"""Train an adapter on preference pairs of one's own, and see whether it prefers the chosen reply of unseen pairs.

python examples/own_pairs.py --base path/or/hub-id --pairs pairs.jsonl --output out

Each line of pairs.jsonl is {"prompt": "…", "chosen": "…", "rejected": "…"}, or any layout of docs/data.md.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

from peft import LoraConfig
from transformers import AutoTokenizer

from qadapter import QAdapterConfig, QAdapterTrainer


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, save, and print the accuracy on one pair in five, which are held out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--pairs", required=True, type=Path)
    parser.add_argument("--output", required=True)
    parser.add_argument("--epochs", type=float, default=3)
    given = parser.parse_args(arguments)

    rows = [json.loads(line) for line in given.pairs.read_text(encoding="utf-8").splitlines() if line.strip()]
    random.Random(0).shuffle(rows)
    heldout = len(rows) // 5
    trainer = QAdapterTrainer(
        model=given.base,
        args=QAdapterConfig(
            given.output,
            objective="residual",
            num_train_epochs=given.epochs,
            learning_rate=3e-4,
            per_device_train_batch_size=4,
            save_strategy="no",
        ),
        train_dataset=rows[heldout:],
        eval_dataset=rows[:heldout],
        processing_class=AutoTokenizer.from_pretrained(given.base),
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    trainer.save_model(given.output)
    for when, measured in (("before", before), ("after", after)):
        print(f"{when}: {measured['eval_rewards/accuracies']:.2f} of {heldout} held-out pairs prefer the chosen reply")
    print(f"adapter: {given.output}")


if __name__ == "__main__":
    main()
