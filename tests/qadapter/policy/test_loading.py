"""One way to load: what a checkpoint says is what is loaded, or one sentence says why not."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qadapter.config.experiment import load_experiment
from qadapter.config.model import LoraSettings, ModelSettings
from qadapter.errors import QAdapterError
from qadapter.policy.base import fit_tokenizer, load_config, load_network, load_tokenizer
from qadapter.policy.checkpoint import refuse_own_adapter
from qadapter.policy.loading import check_pretrained, load_base
from qadapter.policy.model import QAdapterForCausalLM
from qadapter.policy.objective import Objective
from qadapter.preferences.render import RenderError
from qadapter.preferences.tokenize import prompt_ids
from qadapter.training.adapt import lora_config
from qadapter.training.config import QAdapterConfig
from qadapter.training.trainer import QAdapterTrainer
from tests.support.tiny_chat import byte_tokenizer
from tests.support.tiny_gguf import write_gguf
from tests.support.tiny_models import VOCABULARY, lora, tiny_model

ROOT = Path(__file__).parents[3]
SETTINGS = ModelSettings(pretrained="base")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "base"
    tiny_model().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def changed(plain: Path, tmp_path: Path) -> Callable[..., Path]:
    """Makes a copy of the base with other tensors, or other values in its config."""

    def make(tensors: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None, **config: object) -> Path:
        folder = tmp_path / f"changed_{len(list(tmp_path.iterdir()))}"
        shutil.copytree(plain, folder)
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
        if tensors is not None:
            held = {
                name: value.contiguous() for name, value in tensors(load_file(folder / "model.safetensors")).items()
            }
            save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make


def tokens() -> Tensor:
    return torch.randint(6, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))


def refusal(folder: str | Path, **settings: object) -> str:
    with pytest.raises(QAdapterError) as caught:
        load_base(folder, SETTINGS.model_copy(update=settings))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- one way -------------------------------------------------------------------------------------------------------


def test_nothing_is_loaded_elsewhere():
    """Every `from_pretrained` of the libraries stands in `qadapter/policy/base.py`; PEFT's own is not used at all."""
    pattern = re.compile(
        r"(?<!QAdapterForCausalLM)(?<!GuidedForCausalLM)\.from_pretrained\(|\bpeft_model\.load_adapter\(|model\.load_adapter\("
    )
    found = {
        str(file.relative_to(ROOT))
        for room in ("qadapter", "tasks", "flows")
        for file in (ROOT / room).rglob("*.py")
        if pattern.search(file.read_text(encoding="utf-8"))
    }
    card = "qadapter/export/card.py"  # it writes such lines into model cards
    assert found - {card} == {"qadapter/policy/base.py"}


# ---- tensors -------------------------------------------------------------------------------------------------------


def test_tensors_that_are_missing_left_over_or_of_another_shape(changed: Callable[..., Path]):
    half = changed(lambda held: {name: value for name, value in held.items() if "layers.1." not in name})
    message = refusal(half)
    assert (
        "9 tensors are missing (model.layers.1.input_layernorm.weight, model.layers.1.mlp.down_proj.weight" in message
    )
    compiled = changed(lambda held: {f"_orig_mod.{name}": value for name, value in held.items()})
    message = refusal(compiled)
    assert "21 tensors are missing" in message
    assert "21 tensors fit nowhere (_orig_mod.lm_head.weight" in message
    extra = changed(lambda held: {**held, "model.layers.9.mlp.up_proj.weight": torch.zeros(48, 32)})
    assert "1 tensors fit nowhere (model.layers.9.mlp.up_proj.weight)" in refusal(extra)
    narrow = changed(lambda held: {name: value[:2] if "q_proj" in name else value for name, value in held.items()})
    assert "2 tensors have another shape (model.layers.0.self_attn.q_proj.weight" in refusal(narrow)


def test_tied_and_derived_tensors_are_not_missing(tmp_path: Path, changed: Callable[..., Path]):
    tied = tiny_model(tie_word_embeddings=True)
    tied.save_pretrained(tmp_path / "tied")
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    loaded = load_network(tmp_path / "tied")
    assert torch.equal(loaded(tokens()).logits, tied(tokens()).logits)
    old = changed(lambda held: {**held, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)})
    assert torch.equal(load_network(old)(tokens()).logits, tiny_model()(tokens()).logits)


def test_another_head_starts_new_and_the_body_is_whole(plain: Path, changed: Callable[..., Path]):
    from transformers import AutoModelForSequenceClassification as Classifier

    network, _ = load_base(plain, SETTINGS, Classifier, num_labels=1)
    assert network.score.out_features == 1
    assert torch.equal(network.model.norm.weight, tiny_model().model.norm.weight)
    half = changed(lambda held: {name: value for name, value in held.items() if "layers.1." not in name})
    with pytest.raises(QAdapterError, match="9 tensors are missing"):
        load_base(half, SETTINGS, Classifier, num_labels=1)


def test_the_head_takes_one_product_of_all_rows(plain: Path):
    """Torch multiplies a slice [B, 1, H] row by row with a frozen weight, as many copies of it; oneDNN makes them."""
    network = load_network(plain).requires_grad_(False)
    shapes: list[tuple[tuple[int, ...], bool]] = []
    network.get_output_embeddings().register_forward_hook(
        lambda _, given, __: shapes.append((tuple(given[0].shape), given[0].is_contiguous()))
    )
    prompts = torch.arange(1, 16).reshape(3, 5)
    network.generate(prompts, max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert shapes == [((3, 1, network.config.hidden_size), True)] * 2


def test_products_of_fewer_bits(plain: Path):
    """bfloat16 has 8 bits: a factor is off by at most 2^-9 of itself, so a product of two by less than 2^-7.9."""
    a, b = torch.randn(256, 256), torch.randn(256, 256)
    exact, bound = a.double() @ b.double(), 2**-7.9 * (a.double().abs() @ b.double().abs())
    try:
        network, _ = load_base(plain, SETTINGS.model_copy(update={"matmul_precision": "medium"}))
        assert torch.get_float32_matmul_precision() == "medium"
        rounded, logits = a @ b, network(tokens()).logits
        assert rounded.dtype == logits.dtype == torch.float32
        assert bool(((rounded.double() - exact).abs() <= bound).all())
    finally:
        network, _ = load_base(plain, SETTINGS)
    assert torch.get_float32_matmul_precision() == "highest"
    assert torch.equal(network(tokens()).logits, tiny_model()(tokens()).logits)
    with pytest.raises(QAdapterError, match="matmul_precision is for pretrained models"):
        load_experiment("smoke", {"model.matmul_precision": "medium"})


# ---- quantisation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 4])
def test_a_bitsandbytes_checkpoint_is_what_it_was(bits: int, plain: Path, tmp_path: Path):
    """Not the numbers of its packed bytes: the logits are those of the model that was saved."""
    how = {"load_in_8bit": True} if bits == 8 else {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32}
    packed = AutoModelForCausalLM.from_pretrained(plain, quantization_config=BitsAndBytesConfig(**how))
    packed.save_pretrained(tmp_path / "packed")
    byte_tokenizer().save_pretrained(tmp_path / "packed")
    network, _ = load_base(tmp_path / "packed", SETTINGS)
    for model in (network, packed):  # in eval mode 4-bit layers repack themselves for a kernel that needs wider ones
        model.train()
    assert "bitsandbytes" in type(network.model.layers[0].mlp.up_proj).__module__
    assert torch.equal(network(tokens()).logits, packed(tokens()).logits)
    policy = QAdapterForCausalLM.from_base(network, lora(), Objective.preset("residual"))
    assert any(parameter.requires_grad for parameter in policy.parameters())
    assert "is quantised already (by bitsandbytes)" in refusal(tmp_path / "packed", quantization="int8")


def test_an_fp8_checkpoint_is_read_with_its_scales(changed: Callable[..., Path]):
    """Each matrix is kept as 8-bit floats and one factor: within 1/16 of each weight, not 448 times it."""

    def packed(held: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for name, value in held.items():
            if "proj" in name:
                scale = (value.abs().max() / 448).reshape(1, 1)
                found |= {name: (value / scale).to(torch.float8_e4m3fn), f"{name}_scale_inv": scale}
            else:
                found[name] = value
        return found

    method = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    network, _ = load_base(changed(packed, quantization_config=method), SETTINGS)
    for name, weight in tiny_model().named_parameters():
        torch.testing.assert_close(network.get_parameter(name), weight, rtol=1 / 16, atol=2e-3)


@pytest.mark.parametrize(
    ("method", "package"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False}, "pip install optimum"),
        ({"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm"}, "pip install gptqmodel"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}}, "compressed-tensors"),
    ],
    ids=lambda value: value.get("quant_method") if isinstance(value, dict) else "",
)
def test_a_quantisation_needs_its_package(method: dict[str, Any], package: str, changed: Callable[..., Path]):
    message = refusal(changed(quantization_config=method))
    assert "cannot be loaded without a package" in message
    assert package in message


def test_an_unknown_quantisation_is_not_ignored(changed: Callable[..., Path]):
    message = refusal(changed(quantization_config={"quant_method": "nonesuch"}))
    assert "is quantised by 'nonesuch', which transformers does not know" in message
    for without in ({}, {"quant_method": None}):
        assert "names no quant_method" in refusal(changed(quantization_config=without))
    # its tensors are plain: bitsandbytes reads them, and fails at the first text
    assert "cannot read a text (" in refusal(changed(quantization_config={"load_in_8bit": True}))


def test_packed_weights_without_their_scales(changed: Callable[..., Path]):
    """Integers are no weights: read as such they are whole numbers, in any precision."""

    def packed(held: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: (value * 127 / value.abs().max()).to(torch.int8) if "q_proj" in name else value
            for name, value in held.items()
        }

    for dtype in ("float32", "bfloat16"):
        assert "2 matrices of whole numbers (model.layers.0.self_attn.q_proj.weight" in refusal(
            changed(packed), dtype=dtype
        )
    eighth = changed(lambda held: {name: value.to(torch.float8_e4m3fn).float() for name, value in held.items()})
    assert load_network(eighth).dtype == torch.float32  # rounded, but weights


# ---- files ---------------------------------------------------------------------------------------------------------


def test_files_that_are_no_model(plain: Path, changed: Callable[..., Path], tmp_path: Path):
    truncated = changed()
    weights = truncated / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    assert "could not be loaded (Error while deserializing header" in refusal(truncated)
    assert "nonesuch" in refusal(changed(model_type="nonesuch"))
    pickled = changed()
    (pickled / "model.safetensors").unlink()
    torch.save(tiny_model().state_dict(), pickled / "pytorch_model.bin")
    assert "safetensors" in refusal(pickled)
    assert f"There is no folder {tmp_path}/nowhere" in refusal(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "is no model: it has no config.json" in refusal(tmp_path / "empty")
    assert "is a file of unknown kind" in refusal(plain / "config.json")
    broken = changed()
    (broken / "config.json").write_text("{")
    assert "could not be loaded" in refusal(broken)
    assert "'vocab_size': TypeError: Field 'vocab_size' expected int" in refusal(changed(vocab_size="x"))
    assert "could not be loaded (The checkpoint you are trying to load has model type" in refusal(changed(model_type=3))


def test_a_base_that_brings_an_adapter(changed: Callable[..., Path]):
    """transformers would put it onto the base unasked."""
    both = changed()
    saved_adapter(both)
    assert "holds an adapter too" in refusal(both)
    network = tiny_model()
    network._hf_peft_config_loaded = True
    with pytest.raises(QAdapterError, match="holds an adapter too"):
        refuse_own_adapter(network, "someone/model")


@pytest.mark.parametrize("value", ["x", [2, "x"], True, 1.5], ids=str)
def test_ends_that_are_no_token_ids(value: object, changed: Callable[..., Path]):
    folder = changed()
    file = folder / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": value}))
    assert "expected a token id, or a list of them" in refusal(folder)


def test_tokenizers_that_are_missing_or_broken(changed: Callable[..., Path]):
    without = changed()
    for file in without.glob("*token*"):
        file.unlink()
    assert "could not be loaded (its tokenizer)" in refusal(without)
    broken = changed()
    (broken / "chat_template.jinja").write_text("{% for message in messages %}{{ message.content }")
    assert "the chat template of" in (message := refusal(broken))
    assert "is broken (line 1" in message
    for value, reason in (
        ({"model_max_length": "x"}, "could not be loaded (its tokenizer)"),
        ({"split_special_tokens": True}, "splits special tokens in texts"),
    ):
        odd = changed()
        file = odd / "tokenizer_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **value}))
        assert reason in refusal(odd)


def test_no_code_runs_unasked(changed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch):
    """Transformers would ask `[y/N]` where nothing is said; here nothing is asked, and nothing runs."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    folder = changed(
        model_type="custom",
        auto_map={"AutoConfig": "code.CustomConfig", "AutoModelForCausalLM": "code.CustomModel"},
    )
    (folder / "code.py").write_text(f"open({str(folder / 'ran')!r}, 'w').write('x')\n")
    assert "brings code of its own" in refusal(folder)
    with pytest.raises(QAdapterError, match="none of it was run"):
        load_config(folder)
    with pytest.raises(QAdapterError, match="trust_remote_code"):
        QAdapterForCausalLM.from_pretrained(saved_adapter(folder.parent / "adapter"), folder)
    assert not (folder / "ran").exists()


def saved_adapter(folder: Path) -> Path:
    QAdapterForCausalLM.from_base(tiny_model(), lora(), Objective.preset("residual")).save_pretrained(folder)
    return folder


def test_preflight_reads_no_weights(plain: Path, changed: Callable[..., Path]):
    settings = ModelSettings(pretrained=str(plain))
    check_pretrained(settings, [], lora_config(LoraSettings()))
    with pytest.raises(QAdapterError, match=r"lora names layers .*q_prj, did you mean 'q_proj'\?"):
        check_pretrained(settings, [], lora_config(LoraSettings(target_modules=("q_prj",))))
    with pytest.raises(QAdapterError, match=r"model\.pretrained: .*an rwkv model|model\.pretrained: .*rwkv"):
        check_pretrained(ModelSettings(pretrained=str(changed(model_type="rwkv"))), [])


def test_a_padding_token_without_embedding_is_replaced():
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    model = tiny_model()
    assert tokenizer.pad_token_id >= VOCABULARY
    fit = fit_tokenizer(tokenizer, model)
    assert fit.pad_token == fit.eos_token
    assert fit.pad_token_id < VOCABULARY
    assert tokenizer.pad_token == "[PAD]"  # the one given is as it was
    assert fit_tokenizer(byte_tokenizer(), model).pad_token == "<pad>"
    with pytest.raises(RenderError, match=rf"token id {VOCABULARY}, but the base has only {VOCABULARY} embeddings"):
        prompt_ids(fit, [{"role": "user", "content": "a[PAD]"}])
    assert prompt_ids(fit, [{"role": "user", "content": "a"}])


def test_the_trainer_pads_with_an_embedding(tmp_path: Path):
    """`[PAD]` was added to the tokenizer and not to the model: batches hold ids that the base has."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    rows = [{"prompt": "a", "chosen": "b" * length, "rejected": "c"} for length in (1, 9)]
    trainer = QAdapterTrainer(
        model=tiny_model(),
        args=QAdapterConfig(output_dir=str(tmp_path), use_cpu=True, max_steps=1, report_to="none"),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=lora(),
    )
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(2)])
    assert int(batch["input_ids"].max()) < VOCABULARY


# ---- GGUF ----------------------------------------------------------------------------------------------------------


def test_a_gguf_file_is_a_base(tmp_path: Path):
    held = write_gguf(tmp_path / "tiny.gguf")
    for place in (tmp_path / "tiny.gguf", tmp_path):
        network, tokenizer = load_base(place, SETTINGS)
        assert torch.equal(network.model.embed_tokens.weight, held["token_embd"])
        assert torch.equal(network.model.layers[0].mlp.up_proj.weight, held["blk.0.ffn_up"])
        assert tokenizer("a")["input_ids"][-1] == tokenizer.convert_tokens_to_ids("a")
    assert network.config.name_or_path == str(tmp_path)
    ids = torch.arange(4, 12)[None]
    policy = QAdapterForCausalLM.from_base(network, lora(), Objective.preset("residual"))
    policy.train()
    policy.q_and_base_logits(ids)[0].square().mean().backward()
    assert any(parameter.grad is not None for parameter in policy.parameters())
    policy.save_pretrained(tmp_path / "adapter")
    again = QAdapterForCausalLM.from_pretrained(tmp_path / "adapter")  # from the base that it names
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, policy.eval()(input_ids=ids).logits)
        # a merged base is an ordinary folder
        whole = policy.peft_model.merge_and_unload()
        whole.save_pretrained(tmp_path / "whole")
        assert torch.equal(load_network(tmp_path / "whole")(ids).logits, whole(ids).logits)


def test_gguf_files_that_cannot_be_read(tmp_path: Path):
    write_gguf(tmp_path / "odd.gguf", "nonesuch")
    assert "odd.gguf" in (message := refusal(tmp_path / "odd.gguf"))
    assert "nonesuch" in message
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "cut.gguf").write_bytes(b"GGUF")
    assert "could not be loaded" in refusal(tmp_path / "empty")
    write_gguf(tmp_path / "second.gguf")
    assert "holds several GGUF files (odd.gguf, second.gguf)" in refusal(tmp_path)
    assert "There is no file" in refusal(tmp_path / "third.gguf")
    with pytest.raises(QAdapterError, match="could not be loaded"):
        load_tokenizer(tmp_path / "odd.gguf")
