"""Ask one adapter the same question at several settings of its dial, from the new preference to the old model.

python examples/one_adapter.py out "What colour is a leaf?"

With the objective `residual`, α0 = α̃ = 1 is the adapter as trained, and larger values come closer to the base.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from transformers import AutoTokenizer

from qadapter import QAdapterForCausalLM, generate_replies


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a reply for each setting, then the base's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", help="folder that a training wrote")
    parser.add_argument("prompt")
    parser.add_argument("--dials", type=float, nargs="+", default=[1.0, 2.0, 8.0])
    parser.add_argument("--max-new-tokens", type=int, default=100)
    given = parser.parse_args(arguments)

    policy = QAdapterForCausalLM.from_pretrained(given.adapter)  # its files name the base
    tokenizer = AutoTokenizer.from_pretrained(given.adapter, padding_side="left")

    def reply() -> str:
        prompts = [[{"role": "user", "content": given.prompt}]]
        (text,) = generate_replies(policy, tokenizer, prompts, max_new_tokens=given.max_new_tokens, batch_size=1)
        return text

    for dial in given.dials:
        policy.config.alpha_0 = policy.config.alpha_tilde = dial
        print(f"dial {dial:g}: {reply()}")
    with policy.disable_adapter():
        print(f"base: {reply()}")


if __name__ == "__main__":
    main()
