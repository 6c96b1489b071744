"""What a user can get wrong, at the command: exit code 2, one sentence, and nothing written; or the right number."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qadapter.command.parser import main
from tests.qadapter.command.test_situations import TRAIN, write_base, write_rows
from tests.support import templates

Change = Callable[[Path], object]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, six rows, and an adapter trained with every setting that the cases ask for."""
    root = tmp_path_factory.mktemp("cases")
    write_base(root / "base", templates.OTHER_END)
    write_rows(root / "rows.jsonl")
    flags = "--lora-alpha 0.5 --lora use_rslora=true --trainer optim=sgd,max_grad_norm=0.5,group_by_length=true "
    flags += "--model attn_implementation=eager --max-steps 2 --logging-steps 1"
    data = ["--base", str(root / "base"), "--data", str(root / "rows.jsonl"), "--output", str(root / "out")]
    assert main(["train", *data, *TRAIN, *flags.split()]) == 0
    return root


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line with which a command is refused."""
    capsys.readouterr()
    assert main(arguments) == 2, arguments
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said.splitlines()[-1].removeprefix("error: ")


def edit(file: str, **values: Any) -> Change:
    def change(base: Path) -> None:
        content = json.loads((base / file).read_text())
        (base / file).write_text(json.dumps({**content, **values}))

    return change


def tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Change:
    def changed(base: Path) -> None:
        file = base / "model.safetensors"
        held = {name: value.contiguous() for name, value in change(load_file(file)).items()}
        save_file(held, file, metadata={"format": "pt"})

    return changed


def lacking_shard(base: Path) -> None:
    held = load_file(base / "model.safetensors")
    (base / "model.safetensors").rename(base / "model-00001-of-00002.safetensors")
    index = dict.fromkeys(held, "model-00001-of-00002.safetensors")
    index["lm_head.weight"] = "model-00002-of-00002.safetensors"
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def without_layer(held: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in held.items() if "layers.1." not in name}


def no_tokenizer(base: Path) -> None:
    for file in [*base.glob("*token*"), *base.glob("chat_template*")]:
        file.unlink()


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False}
BASES: dict[str, tuple[Change, str]] = {
    "truncated": (lambda b: (b / "model.safetensors").write_bytes(b"\x10\0\0"), "could not be loaded"),
    "empty file": (lambda b: (b / "model.safetensors").write_bytes(b""), "could not be loaded"),
    "no tensor": (tensors(lambda _: {}), "tensors are missing"),
    "half a model": (tensors(without_layer), "9 tensors are missing (model.layers.1."),
    "compiled": (tensors(lambda held: {f"_orig_mod.{n}": v for n, v in held.items()}), "fit nowhere (_orig_mod."),
    "no head": (
        tensors(lambda h: {n: v for n, v in h.items() if "lm_head" not in n}),
        "1 tensors are missing (lm_head",
    ),
    "shard missing": (lacking_shard, "model-00002-of-00002.safetensors"),
    "not a number": (tensors(lambda h: {n: v * torch.nan for n, v in h.items()}), "NaN or infinite logits"),
    "other vocabulary": (edit("config.json", vocab_size=300), "have another shape"),
    "unknown type": (edit("config.json", model_type="nonesuch"), "nonesuch"),
    "encoder": (edit("config.json", model_type="bert"), "is an encoder"),
    "gptq": (edit("config.json", quantization_config=GPTQ), "cannot be loaded without a package: "),
    "odd quantisation": (edit("config.json", quantization_config={"quant_method": "x"}), "quantised by 'x'"),
    "config is no object": (lambda b: (b / "config.json").write_text("[]"), "could not be loaded"),
    "heads": (edit("config.json", num_attention_heads=5), "could not be loaded"),
    "no tokenizer": (no_tokenizer, "could not be loaded (its tokenizer)"),
    "broken tokenizer": (lambda b: (b / "tokenizer.json").write_text("{"), "(its tokenizer)"),
    "broken template": (
        lambda b: (b / "chat_template.jinja").write_text("{% for m in messages %}"),
        "is broken (line 1",
    ),
    "raising template": (
        lambda b: (b / "chat_template.jinja").write_text("{{ raise_exception('Tools are needed.') }}"),
        "the chat template refuses these messages: Tools are needed.",
    ),
    "broken generation config": (lambda b: (b / "generation_config.json").write_text("{"), "cannot be read"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BASES)
def test_a_base_that_is_not_what_it_says(
    name: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, expected = BASES[name]
    base = shutil.copytree(place / "base", tmp_path / "base")
    change(base)
    data = ["--data", str(place / "rows.jsonl"), "--output", str(tmp_path / "out")]
    assert expected in refusal(capsys, "train", "--base", str(base), *data, *TRAIN)
    # rows are rendered once the data are there; all else is said before a file is written
    assert not (tmp_path / "out").exists() or name == "raising template"


FLAGS: dict[str, str] = {
    "--target-modules q_prj": "did you mean 'q_proj'?",
    "--target-modules ,": "--target-modules",
    "--lora-alpha 0": "--lora-alpha: Input should be greater than 0",
    "--lora-alpha 1e300": "--lora-alpha: Input should be less than or equal to 1000000",
    "--lora-alpha nan": "--lora-alpha: Input should be a finite number",
    "--lora bias=all": "lora has bias='all', which changes the base",
    "--lora init_lora_weights=pissa": "init_lora_weights='pissa'",
    "--lora modules_to_save=[nrm]": "modules to save that llama does not have: nrm",
    "--trainer neftune_noise_alpha=5": "--trainer.neftune_noise_alpha: cannot be set: NEFTune adds noise",
    "--trainer label_smoothing_factor=0.1": "have no labels to smooth",
    "--trainer optim=nonesuch": "is not a valid OptimizerNames",
    "--model experts_implementation=eager": "has no experts",
    "--model attn_implementation=flash_attention_2": "FlashAttention2",
    "--alpha-tilde 1e-42": "--alpha-tilde: Input should be greater than or equal to",
    "--alpha-0 1e40": "--alpha-0: Input should be less than or equal to 1000000000",
    "--learning-rate inf": "--learning-rate: Input should be a finite number",
    "--epochs 1e308": "--epochs: Input should be less than or equal to 1000000",
    "--seed -1": "--seed: Input should be greater than or equal to 0",
    "--seed 4294967296": "--seed: Input should be less than 4294967296",
    "--max-length 1": "--max-length: Input should be greater than or equal to 2",
    "--quantization int8 --dtype float8": "--dtype: Input should be",
    '--chat-template-kwargs {"messages":1}': "messages is set by the renderer",
    "--max-length 300": "",  # more than the context: short pairs are fine
}


@pytest.mark.slow
@pytest.mark.parametrize("flags", FLAGS)
def test_a_flag_that_is_wrong(flags: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--base", str(place / "base"), "--data", str(place / "rows.jsonl"), "--output", str(tmp_path / "out")]
    if not FLAGS[flags]:
        assert main(["train", *data, *TRAIN, *flags.split()]) == 0
        return
    assert FLAGS[flags] in refusal(capsys, "train", *data, *TRAIN, *flags.split())
    assert not (tmp_path / "out").exists()


POLICIES: dict[str, str] = {
    "--temperature 1e-40": "--temperature: expected 0 (greedy), or from 0.001 to 1000",
    "--alpha-tilde 1e-42": "--alpha-tilde: Input should be greater than or equal to",
    "--alpha-0 1e40": "--alpha-0: Input should be less than or equal to",
    "--weights 1e39": "The weight of adapter",
    "--weights nan": "--weights",
    "--weights 1,2": "--weights has 2 numbers for 1 adapters",
    "--max-new-tokens 1000000000000": "do not fit into the model's context of 256",
    "--model attn_implementation=fast": "--model.attn_implementation: Specified",
}


@pytest.mark.slow
@pytest.mark.parametrize("flags", POLICIES)
def test_a_policy_asked_with_absurd_numbers(flags: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["generate", "--adapter", str(place / "out"), "--prompt", "a"]
    assert POLICIES[flags] in refusal(capsys, *asked, *flags.split())


def test_the_bases_own_decoding_settings_are_not_used(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Penalties, beams and suppressed tokens of its `generation_config.json` are no part of what was trained."""
    other = shutil.copytree(place / "base", tmp_path / "other")
    settings = {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "num_beams": 3, "do_sample": True, "top_k": 2}
    settings |= {"suppress_tokens": list(range(100, 250)), "min_new_tokens": 6, "max_time": 1e-9, "stop_strings": ["a"]}
    edit("generation_config.json", **settings)(other)
    asked = ["generate", "--adapter", str(place / "out"), "--prompt", "a", "--compare-base", "--max-new-tokens", "6"]
    said = []
    for base in (place / "base", other):
        capsys.readouterr()
        assert main([*asked, "--base", str(base)]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    assert "base: " in said[0]


def test_what_was_asked_for_is_what_was_trained(place: Path, tmp_path: Path) -> None:
    """The fraction of alpha, the fields of LoraConfig and of TrainingArguments, and how the base was loaded."""
    out = place / "out"
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["lora_alpha"], config["use_rslora"], config["r"]) == (0.5, True, 2)
    moved = load_file(out / "adapter_model.safetensors")
    # two steps of SGD with a gradient of norm 1/2 at most, at learning rates 3e-4 and below: AdamW would move by 3e-4
    # in each of thousands of places
    steps = torch.cat([value.flatten() for name, value in moved.items() if "lora_B" in name])
    assert 0 < float(steps.norm()) <= 2 * 3e-4 * 0.5
    record = (out / "train.yaml").read_text()
    assert all(text in record for text in ("optim: sgd", "use_rslora: true", "attn_implementation: eager"))
    # the record is its own config: the same settings make the same adapter
    again = ["train", "--config", str(out / "train.yaml"), "--output", str(tmp_path / "again")]
    assert main(again) == 0
    for name, value in load_file(tmp_path / "again" / "adapter_model.safetensors").items():
        assert torch.equal(value, moved[name]), name


@pytest.mark.slow
def test_a_folder_that_is_no_adapter_of_this_base(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An adapter of another base, one without its modules, and records that cannot be read."""
    other = shutil.copytree(place / "base", tmp_path / "other")
    held = load_file(other / "model.safetensors")
    wide = {n: torch.cat([v, v]) if "embed" in n or "lm_head" in n else v for n, v in held.items()}
    save_file(wide, other / "model.safetensors", metadata={"format": "pt"})
    edit("config.json", vocab_size=len(wide["lm_head.weight"]))(other)
    adapter = shutil.copytree(place / "out", tmp_path / "adapter")
    asked = ["generate", "--adapter", str(adapter), "--prompt", "a", "--max-new-tokens", "2"]
    assert main([*asked, "--base", str(other)]) == 0  # layers of the same shape: the vocabulary is the base's own
    edit("config.json", intermediate_size=8)(other)
    assert "does not fit" in refusal(capsys, *asked, "--base", str(other))
    for name, value, expected in (
        ("target_modules", None, "does not fit"),
        ("target_modules", ["nonesuch"], "nonesuch"),
        ("r", 0, "r` should be a positive integer"),
        ("peft_type", "PREFIX_TUNING", "is 'PREFIX_TUNING', which is not supported"),
        ("lora_alpha", "much", "lora_alpha='much'"),
    ):
        shutil.rmtree(adapter)
        shutil.copytree(place / "out", adapter)
        edit("adapter_config.json", **{name: value})(adapter)
        assert expected in refusal(capsys, *asked)
    shutil.rmtree(adapter)
    shutil.copytree(place / "out", adapter)
    for text in ("model: {attn_implementation: someone/kernel}\n", "model: 3\n", "dtype: float8\n", "{"):
        (adapter / "train.yaml").write_text(text)
        assert "does not say how to load the base" in refusal(capsys, *asked)
    (adapter / "train.yaml").unlink()
    (adapter / "q_adapter.json").write_text("{}")
    assert "cannot be read" in refusal(capsys, *asked)


@pytest.mark.slow
def test_a_token_beyond_the_embeddings_ends_nothing(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`<extra>` is in the tokenizer and not in the model: its row and its prompt are set aside, the rest goes on."""
    from transformers import AutoTokenizer

    base = shutil.copytree(place / "base", tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(base)
    rows = write_rows(tmp_path / "rows.jsonl")
    content = rows.read_text().splitlines()
    content[0] = content[0].replace("Fruit 0?", "<extra>?")
    rows.write_text("\n".join(content) + "\n")
    out = tmp_path / "out"
    assert main(["train", "--base", str(base), "--data", str(rows), "--output", str(out), *TRAIN]) == 0
    (left,) = [json.loads(line) for line in (out / "unused.jsonl").read_text().splitlines()]
    assert left["reason"] == "the tokenizer makes token id 264, but the base has only 264 embeddings"
    capsys.readouterr()
    asked = ["generate", "--adapter", str(out), "--prompt", "a", "--prompt", "<extra>", "--max-new-tokens", "2"]
    assert main(asked) == 0
    assert "1 of 2 prompts could not be asked" in capsys.readouterr().err


def test_a_tokenizer_without_an_end(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No end-of-sequence and no padding token: it trains, and replies run to their limit."""
    base = shutil.copytree(place / "base", tmp_path / "base")
    (base / "chat_template.jinja").unlink(missing_ok=True)
    edit("tokenizer_config.json", eos_token=None, pad_token=None, chat_template=None)(base)
    (base / "special_tokens_map.json").unlink(missing_ok=True)
    edit("config.json", eos_token_id=None, pad_token_id=None)(base)
    edit("generation_config.json", eos_token_id=None, pad_token_id=None)(base)
    out = tmp_path / "out"
    data = ["--data", str(place / "rows.jsonl"), "--output", str(out)]
    assert main(["train", "--base", str(base), *data, *TRAIN]) == 0
    capsys.readouterr()
    asked = ["generate", "--adapter", str(out), "--prompt", "a", "--prompt", "another one", "--max-new-tokens", "3"]
    assert main(asked) == 0
