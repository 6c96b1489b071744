"""An adapter knows its base: on another one of the same shapes it is refused, and never on its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import BitsAndBytesConfig, PreTrainedModel

from qadapter.command.parser import main
from qadapter.errors import QAdapterError
from qadapter.evaluation.lm_eval.model import PolicyLM
from qadapter.policy.base import load_network
from qadapter.policy.files import load_adapter_weights
from qadapter.policy.fingerprint import FINGERPRINT_FILE, fingerprint_of, refuse_mismatch, write_fingerprint
from qadapter.policy.guided import Guide, GuidedForCausalLM
from qadapter.policy.loading import load_policy
from qadapter.policy.model import QAdapterForCausalLM
from qadapter.policy.objective import Objective
from qadapter.policy.unpacking import unpack
from qadapter.serving.policies import ServedPolicies
from tests.support.heard import Heard
from tests.support.tiny_chat import byte_tokenizer
from tests.support.tiny_gguf import write_gguf
from tests.support.tiny_models import VOCABULARY, lora, tiny_model

RESIDUAL = Objective.preset("residual")
LOADS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
    "int8": {"dtype": "bfloat16", "quantization": BitsAndBytesConfig(load_in_8bit=True)},
    "nf4": {"dtype": "bfloat16", "quantization": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")},
}
ROUNDS_TWICE = [{"float16", "bfloat16"}, {"float16", "nf4"}, {"float16", "int8"}]
"""Of float32 weights one load is rounded to bfloat16, the other to float16: changes below 0.8 % are not seen."""


def fine_tuned(base: PreTrainedModel, steps: int) -> PreTrainedModel:
    """The base with a LoRA of query and value in its weights, trained for some steps at 2e-4."""
    torch.manual_seed(0)
    model = get_peft_model(base, lora(rank=8, target_modules=["q_proj", "v_proj"]))
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=2e-4)
    ids = torch.randint(6, VOCABULARY, (4, 12))
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    merged: Any = model
    return merged.merge_and_unload()  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`raw`, what it became by fine-tuning (`tuned`), and a base drawn by another seed (`other`)."""
    folder = tmp_path_factory.mktemp("bases")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "initializer_range": 0.02, "tie_word_embeddings": True}
    tiny_model(**sizes).save_pretrained(folder / "raw")
    fine_tuned(tiny_model(**sizes), 10).save_pretrained(folder / "tuned")
    tiny_model(seed=1, **sizes).save_pretrained(folder / "other")
    for one in folder.iterdir():
        byte_tokenizer().save_pretrained(one)
    return folder


def mismatch(base: PreTrainedModel, adapter: Path) -> str:
    try:
        refuse_mismatch(base, adapter)
    except QAdapterError as error:
        return str(error)
    return ""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_precision_and_quantisation_hide_nothing_and_add_nothing(bases: Path, tmp_path: Path) -> None:
    """Trained in one way, loaded in another: the same base is the same one, a fine-tuned one is not."""
    loaded = {
        name: {way: load_network(bases / name, **options) for way, options in LOADS.items()}
        for name in ("raw", "tuned", "other")
    }
    for trained in LOADS:
        place = tmp_path / trained
        place.mkdir()
        write_fingerprint(loaded["raw"][trained], place)
        for way in LOADS:
            assert mismatch(loaded["raw"][way], place) == "", (trained, way)
            assert "was trained on another base than" in mismatch(loaded["other"][way], place), (trained, way)
            found = mismatch(loaded["tuned"][way], place)
            if {trained, way} not in ROUNDS_TWICE:
                assert "4 of 21 weights differ (such as model.layers.0.self_attn.q_proj.weight)" in found, (
                    trained,
                    way,
                )


def test_files_folders_and_adapters_do_not_matter(bases: Path, tmp_path: Path) -> None:
    write_fingerprint(load_network(bases / "raw"), tmp_path)
    base = load_network(bases / "raw")
    base.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    assert mismatch(load_network(tmp_path / "shards"), tmp_path) == ""
    before = fingerprint_of(base)
    policy = QAdapterForCausalLM.from_base(base, lora(modules_to_save=["norm"]), RESIDUAL)
    wrapped: Any = policy.peft_model.get_base_model()
    assert fingerprint_of(wrapped) == {name: rows for name, rows in before.items() if "norm" not in name}
    longer = load_network(bases / "raw")
    longer.resize_token_embeddings(VOCABULARY + 40, mean_resizing=False)
    assert mismatch(longer, tmp_path) == ""  # its first rows are as they were


def test_a_gguf_file_and_its_unpacked_folder_are_one_base(tmp_path: Path) -> None:
    write_gguf(tmp_path / "base.gguf")
    write_fingerprint(load_network(tmp_path / "base.gguf", dtype="float32"), tmp_path)
    for dtype in ("float32", "bfloat16"):
        out = tmp_path / dtype
        out.mkdir()
        heard = Heard()
        with heard.listening():
            unpack(tmp_path / "base.gguf", dtype, out)
        assert heard.told == ["unpacking: tensor 0 of 12", *range(1, 13), "end"]  # what takes minutes says where it is
        assert mismatch(load_network(out / "model"), tmp_path) == ""


def test_what_is_not_known_is_not_claimed(bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, other = load_network(bases / "raw"), load_network(bases / "other")
    assert mismatch(other, tmp_path) == ""  # an adapter of before
    with torch.device("meta"):
        elsewhere = tiny_model()
    assert fingerprint_of(elsewhere) == {}
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert fingerprint_of(other) == {}
    write_fingerprint(base, tmp_path)  # taken when it was loaded
    assert mismatch(other, tmp_path) == ""
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    assert "16 of 21 weights differ" in mismatch(other, tmp_path)  # norms are all 1, and the head is tied
    file = tmp_path / FINGERPRINT_FILE
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 2}))
    assert mismatch(other, tmp_path) == ""
    file.write_text("[]")
    assert "cannot be read" in mismatch(other, tmp_path)


WAYS: dict[str, Callable[[Path, PreTrainedModel, bool], Any]] = {
    "python": lambda place, base, allow: QAdapterForCausalLM.from_pretrained(place, base, allow_base_mismatch=allow),
    "plain": lambda place, base, allow: load_policy(base, place, allow_base_mismatch=allow),
    "served": lambda place, base, allow: ServedPolicies(
        base, byte_tokenizer(), {"one": place}, allow_base_mismatch=allow
    ),
    "attached": lambda place, base, allow: QAdapterForCausalLM.from_base(base, lora(), RESIDUAL).attach(
        place, "second", 1.0, allow_base_mismatch=allow
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_each_way_to_load_compares_and_can_be_allowed(way: str, bases: Path, tmp_path: Path) -> None:
    policy = QAdapterForCausalLM.from_base(load_network(bases / "raw"), lora(), RESIDUAL)
    policy.save_pretrained(tmp_path)
    if way == "plain":
        (tmp_path / "q_adapter.json").unlink()
    WAYS[way](tmp_path, load_network(bases / "raw"), False)
    with pytest.raises(QAdapterError, match=r"trained on another base .* allow it: --allow-base-mismatch"):
        WAYS[way](tmp_path, load_network(bases / "other"), False)
    WAYS[way](tmp_path, load_network(bases / "other"), True)


def test_a_guide_and_lm_eval_compare_too(bases: Path, tmp_path: Path) -> None:
    guided = GuidedForCausalLM.from_base(load_network(bases / "raw"), lora(), Guide("value", 1.0, 5))
    guided.save_pretrained(tmp_path / "guide")
    GuidedForCausalLM.from_pretrained(tmp_path / "guide", load_network(bases / "raw"))
    with pytest.raises(QAdapterError, match="another base"):
        load_policy(load_network(bases / "other"), tmp_path / "guide")
    QAdapterForCausalLM.from_base(load_network(bases / "raw"), lora(), RESIDUAL).save_pretrained(tmp_path / "one")
    with pytest.raises(QAdapterError, match="another base"):
        PolicyLM(str(tmp_path / "one"), base=str(bases / "tuned"))
    PolicyLM(str(tmp_path / "one"), base=str(bases / "tuned"), allow_base_mismatch=True)


def test_a_checkpoint_is_of_its_base(bases: Path, tmp_path: Path) -> None:
    """A training that is resumed after its base was replaced under the same name."""
    QAdapterForCausalLM.from_base(load_network(bases / "raw"), lora(), RESIDUAL).save_pretrained(tmp_path)
    for base in ("raw", "tuned"):
        policy = QAdapterForCausalLM.from_base(load_network(bases / base), lora(), RESIDUAL)
        if base == "raw":
            load_adapter_weights(policy.peft_model, tmp_path, "default")
        else:
            with pytest.raises(QAdapterError, match="was trained on another base"):
                load_adapter_weights(policy.peft_model, tmp_path, "default")


@pytest.mark.slow
def test_the_command_refuses_before_it_answers(bases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    QAdapterForCausalLM.from_base(load_network(bases / "raw"), lora(), RESIDUAL).save_pretrained(tmp_path / "one")
    asked = ["generate", "--adapter", str(tmp_path / "one"), "--prompt", "a", "--max-new-tokens", "2"]
    shutil.copytree(bases / "raw", tmp_path / "moved")
    assert main([*asked, "--base", str(tmp_path / "moved")]) == 0
    assert main([*asked, "--base", str(bases / "tuned")]) == 2
    error = capsys.readouterr().err
    assert "was trained on another base than" in error
    assert "Traceback" not in error
    assert main([*asked, "--base", str(bases / "tuned"), "--allow-base-mismatch"]) == 0
