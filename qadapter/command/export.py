"""`qadapter export`: a policy as what other programs load, with a model card."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from qadapter.command.opened import base_place, note, open_adapters, training_record
from qadapter.command.options import ExportOptions
from qadapter.errors import QAdapterError
from qadapter.export.card import Exported, write_card
from qadapter.export.exactness import Shares, shares_of
from qadapter.export.facts import Facts
from qadapter.export.folder import require_converter, write_checkpoint, write_gguf, write_lora
from qadapter.export.hub import check_repository, hub_token, push_folder
from qadapter.export.known import read_facts
from qadapter.export.nearest import Nearest, nearest_scale
from qadapter.files.artifacts import atomic_folder, storage_errors
from qadapter.policy.model import QAdapterForCausalLM
from qadapter.preferences.building import Choices
from qadapter.preferences.pair import PreferencePair, load_pairs
from qadapter.preferences.stream import parse_files

DEFAULT_MAX_LENGTH = 512


def run(options: ExportOptions) -> None:
    """Write the folder, and send it to the hub if asked to.

    Raises:
        QAdapterError: a policy that these weights cannot be, or anything that cannot be read, written or sent.
    """
    out, first = Path(options.output).expanduser(), Path(options.adapter[0]).expanduser()
    _require_free(out, options)
    if options.push_to_hub:
        check_repository(options.push_to_hub)
        hub_token()
    converter = require_converter() if options.format == "gguf" else []
    quantized = options.quantization or training_record(first).get("quantization") or "none"
    if quantized != "none" and options.format in ("merged", "gguf"):
        raise QAdapterError(
            f"the base is loaded as {quantized}, and an adapter cannot be merged into such weights without loss; add "
            "--quantization none to export the policy on the base as it is, or use --format lora"
        )
    policy, tokenizer = open_adapters(options)
    facts = _facts(options, first, policy)
    exported, shares = Exported(options.format), Shares({})
    if options.format != "adapter":
        exported, shares = _weights(options, policy, tokenizer)
    with storage_errors(out), atomic_folder(out, replace=options.overwrite) as folder:
        if options.format == "adapter":
            policy.save_pretrained(folder)
            tokenizer.save_pretrained(str(folder))
        elif options.format == "lora":
            exported = replace(exported, rank=write_lora(policy, shares.shares, tokenizer, folder))
        elif options.format == "merged":
            write_checkpoint(policy, shares.shares, tokenizer, folder)
        else:
            exported = replace(exported, file=f"{out.name}.gguf")
            with atomic_folder(folder / "checkpoint") as checkpoint:
                write_checkpoint(policy, shares.shares, tokenizer, checkpoint)
            write_gguf(folder / "checkpoint", folder / exported.file, converter)
            shutil.rmtree(folder / "checkpoint")
        write_card(folder, facts, exported, title=out.name)
    print(f"exported: {out} ({options.format}{_distance(exported)})")
    if options.push_to_hub:
        print(f"sent: {push_folder(out, options.push_to_hub, private=not options.public)}")


def _require_free(out: Path, options: ExportOptions) -> None:
    if out.exists() and not out.is_dir():
        raise QAdapterError(f"--output {out} is a file; give a folder")
    if out.is_dir() and any(out.iterdir()) and not options.overwrite:
        raise QAdapterError(f"{out} is not empty; give another --output, or --overwrite to replace it")
    inputs = [Path(one).expanduser().resolve() for one in options.adapter]
    if options.base:
        inputs.append(Path(options.base).resolve())
    if any(one == out.resolve() or out.resolve() in one.parents for one in inputs):
        raise QAdapterError(f"--output {out} holds what is exported; give another folder")


def _facts(options: ExportOptions, first: Path, policy: QAdapterForCausalLM) -> Facts:
    """What the card says; measurements are those of the policy as it is exported, or none."""
    facts = read_facts(first, base_place(options), policy.dial)
    turned = options.alpha_0 is not None or options.alpha_tilde is not None
    if len(options.adapter) == 1 and not turned:
        return facts
    named = ", ".join(f"{name} {weight:g}" for name, weight in policy.adapter_weights.items())
    alphas = {"alpha_0": policy.config.alpha_0, "alpha_tilde": policy.config.alpha_tilde}
    return replace(
        facts,
        settings={**facts.settings, "weights": named, **({} if policy.plain else alphas)},
        learnt=(),
        forgotten=(),
        split="only its parts were",
    )


def _weights(
    options: ExportOptions, policy: QAdapterForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> tuple[Exported, Shares]:
    """Which weights to write, and what they are.

    Raises:
        QAdapterError: none are the policy, and no approximation was asked for.
    """
    shares = shares_of(policy)
    if shares.why_inexact is None:
        scale = next(iter(shares.shares.values()), 0.0)
        return Exported(options.format, scale), shares
    if not options.approximate:
        raise QAdapterError(
            f"no model's weights are this policy: {shares.why_inexact}. Add --approximate for the scale whose KL to it "
            "is smallest, set another --dial (scale=VALUE is exact where α0 = α̃ = 1), or use --format adapter"
        )
    pairs = _pairs(options)
    recorded = training_record(Path(options.adapter[0]).expanduser()).get("max_length")
    nearest = nearest_scale(
        policy,
        shares,
        tokenizer,
        [(pair.prompt, pair.chosen) for pair in pairs],
        max_length=options.max_length or recorded or DEFAULT_MAX_LENGTH,
    )
    note(
        f"no weights are this policy: {shares.why_inexact}. The nearest are at scale {_scale(shares, nearest):.4g}: "
        f"KL(policy ‖ export) {nearest.kl:.4g} nats per token, over {nearest.tokens} tokens"
    )
    return Exported(options.format, _scale(shares, nearest), nearest.kl), Shares(shares.times(nearest.scale))


def _scale(shares: Shares, nearest: Nearest) -> float:
    """For one adapter its own scale; for several the common factor on their weights."""
    (first, *others) = shares.shares.values() or (1.0,)
    return nearest.scale if others else nearest.scale * first


def _pairs(options: ExportOptions) -> list[PreferencePair]:
    """The pairs at whose chosen replies the distance is measured.

    Raises:
        QAdapterError: there are none.
    """
    heldout = Path(options.adapter[0]).expanduser() / "data" / "heldout.jsonl"
    if options.data is not None:
        files = options.located(options.data, options.split)
        choices = Choices.of(options)
        pairs = parse_files(files, domain=options.domain, max_chars=options.max_chars, choices=choices).pairs
    else:
        pairs = load_pairs(heldout) if heldout.is_file() else []
    if not pairs:
        raise QAdapterError("--approximate measures a distance on pairs, and there are none here; give --data")
    return list(pairs[: options.limit])


def _distance(exported: Exported) -> str:
    kl = "" if exported.kl is None else f", KL to the policy {exported.kl:.4g} nats per token"
    return f", scale {exported.scale:.4g}{kl}" if exported.format != "adapter" else ""
