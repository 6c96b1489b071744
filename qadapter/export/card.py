"""The model card: a README made of what was measured."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qadapter.export.facts import NOT_STATED, Facts, Measurement
from qadapter.files.shown import visible

CARD = "README.md"


@dataclass(frozen=True)
class Exported:
    """What was made of a policy.

    Attributes:
        format: `merged`, `lora` or `gguf`; `adapter` for the adapter itself.
        scale: factor that is folded into the weights.
        kl: KL(policy ‖ export) per token in nats, where it is an approximation.
        file: the GGUF file's name.
        rank: largest rank of a LoRA's layers; 0 where it is not known.
    """

    format: str
    scale: float = 1.0
    kl: float | None = None
    file: str = ""
    rank: int = 0


def write_card(folder: Path, facts: Facts, exported: Exported, title: str = "") -> None:
    """Write `README.md`; its title is the folder's name unless another is given."""
    (folder / CARD).write_text(card_text(title or folder.name, facts, exported), encoding="utf-8")


def card_text(name: str, facts: Facts, exported: Exported) -> str:
    """The card as Markdown, with the front matter that the hub reads.

    Args:
        name: title.
        facts: what is known.
        exported: what lies beside the card.
    """
    head: dict[str, Any] = {
        "base_model": facts.base,
        "library_name": "transformers" if exported.format == "merged" else "peft",
        "pipeline_tag": "text-generation",
        "tags": [tag for tag in ("q-adapter" if facts.method == "q-adapter" else facts.method, "preference") if tag],
    }
    if exported.format == "gguf":
        head["library_name"] = "gguf"
    if facts.base_licence != NOT_STATED and not facts.base_licence.startswith("see "):
        head["license"] = facts.base_licence
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---",
        f"# {visible(name)}",
        _summary(facts, exported),
        "## Measured",
        *_measured(facts),
        "## Load it",
        _loading(facts, exported),
        "## Made from",
        _table(
            ("", "what", "sha256", "licence"),
            [
                ("base", facts.base, _short(facts.base_digest), facts.base_licence),
                *(("data", one.name, _short(one.digest), one.licence) for one in facts.data),
            ],
        ),
        "A licence is what the base's or the data's own card states; `not stated` is not a permission.",
        "## Settings",
        _table(("setting", "value"), [(key, _value(value)) for key, value in facts.settings.items()]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _summary(facts: Facts, exported: Exported) -> str:
    kinds = {
        "adapter": "An adapter",
        "merged": "An ordinary checkpoint: the base with an adapter merged into its weights",
        "lora": "A LoRA adapter with its scale folded in",
        "gguf": "A GGUF file: the base with an adapter merged into its weights",
    }
    text = f"{kinds[exported.format]}, of the base `{visible(facts.base)}`"
    text += f", trained with the method `{facts.method}`." if facts.method else "."
    text += f" Its dial stands at `{facts.dial or 'scale=1'}` (0 is the base, 1 the policy as trained)."
    if exported.kl is not None:
        text += (
            f" **This is an approximation**: no weights are the policy itself. They are the adapter at scale "
            f"{exported.scale:.4g}, with a KL(policy ‖ this) of {exported.kl:.4g} nats per token."
        )
    elif exported.format != "adapter":
        text += " It is the policy itself, to rounding."
    return text


def _measured(facts: Facts) -> Iterable[str]:
    if not facts.learnt and not facts.forgotten:
        why = f" ({facts.split})" if facts.split else ""
        yield f"Nothing was measured of this policy{why}. `qadapter score` and `qadapter eval` measure it."
        return
    if facts.split:
        yield f"Measured on {facts.split}."
    for title, rows in (("What was learnt", facts.learnt), ("What was forgotten", facts.forgotten)):
        if rows:
            yield _table((title, "value", "95 % interval", "base", "items"), [_row(row) for row in rows])
        else:
            yield f"{title}: not measured."


def _row(one: Measurement) -> tuple[str, ...]:
    known = one.low is not None and one.high is not None
    return (
        one.label,
        f"{one.value:.4g}",
        f"{one.low:.4g} to {one.high:.4g}" if known else "–",
        "–" if one.of_base is None else f"{one.of_base:.4g}",
        "–" if one.items is None else str(one.items),
    )


def _loading(facts: Facts, exported: Exported) -> str:
    base = json.dumps(visible(facts.base), ensure_ascii=False)
    code = {
        "merged": (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            'model = AutoModelForCausalLM.from_pretrained("FOLDER")\n'
            'tokenizer = AutoTokenizer.from_pretrained("FOLDER")'
        ),
        "adapter": (
            "from qadapter import QAdapterForCausalLM\n\n"
            f'policy = QAdapterForCausalLM.from_pretrained("FOLDER", {base})  # its dial is loaded with it'
        ),
        "lora": (
            "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
            f"base = AutoModelForCausalLM.from_pretrained({base})\n"
            'model = PeftModel.from_pretrained(base, "FOLDER")'
        ),
        "gguf": "",
    }[exported.format]
    text = f"```python\n{code}\n```" if code else f"```console\n$ llama-cli -m {exported.file or 'FILE.gguf'}\n```"
    if exported.format == "lora":
        rank = exported.rank or facts.settings.get("adapter.r", 16)
        text += (
            f"\n\n```console\n$ vllm serve {visible(facts.base)} --enable-lora --lora-modules policy=FOLDER "
            f"--max-lora-rank {rank}\n```"
        )
    return text


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    rows = list(rows)
    if not rows:
        return ""
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(visible(cell).replace("|", r"\|") for cell in line) + " |" for line in lines)


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _short(digest: str) -> str:
    return f"`{digest[:16]}…`" if digest else "–"
