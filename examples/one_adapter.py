"""Ask one adapter the same question at several settings of its dial, from the new preference to the old model.

python examples/one_adapter.py out "What colour is a leaf?"

0 is the base, 1 the policy as trained. `docs/method.md` says what the two kinds of dial are.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from transformers import AutoTokenizer

from qadapter import Dial, QAdapterForCausalLM, generate_replies


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a reply for each setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", help="folder that a training wrote")
    parser.add_argument("prompt")
    parser.add_argument("--dials", type=Dial.parse, nargs="+", default=[Dial("scale", s) for s in (1, 0.75, 0.5, 0)])
    parser.add_argument("--max-new-tokens", type=int, default=100)
    given = parser.parse_args(arguments)

    policy = QAdapterForCausalLM.from_pretrained(given.adapter)  # its files name the base
    tokenizer = AutoTokenizer.from_pretrained(given.adapter, padding_side="left")

    prompts = [[{"role": "user", "content": given.prompt}]]
    for dial in given.dials:
        policy.dial = dial
        (text,) = generate_replies(policy, tokenizer, prompts, max_new_tokens=given.max_new_tokens, batch_size=1)
        print(f"{dial}: {text}")


if __name__ == "__main__":
    main()
