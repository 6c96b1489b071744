"""Adapters from elsewhere: those that only add to the base are loaded, whole; the others are refused."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoHaConfig, LoKrConfig, LoraConfig, PeftConfig, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from qadapter.errors import QAdapterError
from qadapter.policy.adapters import adapter_place, fitted, load_adapter, read_config, refuse_config
from qadapter.policy.files import read_settings
from qadapter.policy.model import QAdapterForCausalLM
from qadapter.policy.objective import Objective
from qadapter.policy.ranges import check_dials, check_weights
from tests.support.tiny_models import VOCABULARY, lora, moved, tiny_model

RESIDUAL = Objective.preset("residual")


def tokens() -> Tensor:
    return torch.randint(6, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(0))


def saved(folder: Path, **changes: object) -> Path:
    policy = moved(QAdapterForCausalLM.from_base(tiny_model(), lora(**changes), RESIDUAL))
    policy.save_pretrained(folder)
    return folder


def edited(folder: Path, **values: object) -> Path:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
    return folder


# ---- what changes the base ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"bias": "all"}, "bias='all', which changes the base .* set bias to 'none'"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa', which takes the adapter's start out of the base"),
        ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
        ({"layer_replication": [(0, 2), (1, 2)]}, "layer_replication=.*the base would have other layers"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices=.*changes the base"),
    ],
    ids=str,
)
def test_adapters_that_change_the_base_are_refused(changes: dict[str, object], expected: str):
    with pytest.raises(QAdapterError, match=expected):
        QAdapterForCausalLM.from_base(tiny_model(), lora(**changes), RESIDUAL)


@pytest.mark.parametrize("start", ["corda", "eva", "lora_ga", "loftq"])
def test_starts_out_of_the_base_are_refused_on_disk(start: str, tmp_path: Path):
    folder = edited(saved(tmp_path / "adapter"), init_lora_weights=start)
    with pytest.raises(QAdapterError):
        QAdapterForCausalLM.from_pretrained(folder, base_model=tiny_model())


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        lora(init_lora_weights="gaussian"),
        lora(use_rslora=True),
        lora(use_dora=True),
        lora(lora_bias=True),
        lora(target_modules=["q_proj"], modules_to_save=["norm"]),
        lora(target_modules=["q_proj"], modules_to_save=["lm_head"]),
        LoHaConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "up_proj"]),
        LoKrConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "up_proj"]),
        VeraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "o_proj"], r=8),
        IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "up_proj"], feedforward_modules=["up_proj"]),
    ],
    ids=lambda config: str(config.peft_type.value) + "+".join(sorted(config.modules_to_save or [])),
)
@pytest.mark.filterwarnings("ignore")
def test_adapters_that_add_are_the_base_when_off(config: PeftConfig, tmp_path: Path):
    """Untrained they are the base, moved they are not, off they are again, and so after loading."""
    ids, base = tokens(), tiny_model()
    with torch.no_grad():
        expected = base(input_ids=ids).logits
        policy = QAdapterForCausalLM.from_base(tiny_model(), config, RESIDUAL).eval()
        torch.testing.assert_close(policy(input_ids=ids).logits.log_softmax(-1), expected.log_softmax(-1))
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        trained = policy(input_ids=ids).logits
        assert (trained.log_softmax(-1) - expected.log_softmax(-1)).abs().max() > 0.1
        with policy.disable_adapter():
            torch.testing.assert_close(policy(input_ids=ids).logits, expected)
        policy.save_pretrained(tmp_path)
        loaded = QAdapterForCausalLM.from_pretrained(tmp_path, base_model=tiny_model())
        torch.testing.assert_close(loaded(input_ids=ids).logits, trained)


def test_other_kinds_are_refused(tmp_path: Path):
    ada = AdaLoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], total_step=10)
    with pytest.raises(QAdapterError, match=r"kind ADALORA, which is not supported\. Use LORA, LOHA"):
        refuse_config(ada, "It")
    for kind in ("XLORA", "PREFIX_TUNING", "NONESUCH", None):
        with pytest.raises(QAdapterError, match="which is not supported; expected LORA"):
            read_config(edited(saved(tmp_path / str(kind)), peft_type=kind))


# ---- tensors and fields ----------------------------------------------------------------------------------------------


def test_tensors_that_do_not_fit_are_refused(tmp_path: Path):
    """A renamed, missing or foreign tensor would leave a layer random."""
    folder = saved(tmp_path / "adapter")
    file, whole = folder / "adapter_model.safetensors", load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    renamed = {name.replace("q_proj", "qq_proj"): value for name, value in whole.items()}
    lacking = {name: value for name, value in whole.items() if "layers.1" not in name}
    for tensors, expected in (
        (renamed, r"4 tensors are missing .*; 4 tensors fit nowhere"),
        (lacking, "14 tensors are missing"),
        ({**whole, "base_model.model.x.lora_A.weight": torch.zeros(2)}, "1 tensors fit nowhere"),
        ({name: value[:1] for name, value in whole.items()}, r"does not fit this base .*size mismatch for base_model"),
        ({name: value.to(torch.int8) for name, value in whole.items()}, "holds integers"),
        ({**whole, next(iter(whole)): torch.full_like(whole[next(iter(whole))], torch.nan)}, "NaN or infinite weights"),
    ):
        save_file({name: value.contiguous() for name, value in tensors.items()}, file)
        for load in (
            lambda: QAdapterForCausalLM.from_pretrained(folder, base_model=tiny_model()),
            lambda: load_adapter(tiny_model(), folder),
        ):
            with pytest.raises(QAdapterError, match=expected):
                load()
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(QAdapterError, match="is damaged"):
        load_adapter(tiny_model(), folder)
    file.unlink()
    torch.save(whole, folder / "adapter_model.bin")
    with pytest.raises(QAdapterError, match="a pickle can run code"):
        load_adapter(tiny_model(), folder)


def test_fields_that_peft_does_not_know(tmp_path: Path):
    folder = saved(tmp_path / "adapter")
    edited(folder, some_new_switch=None)
    read_config(folder)
    edited(folder, some_new_switch="on")
    with pytest.raises(QAdapterError, match=r"fields that the installed PEFT does not know \(some_new_switch\)"):
        read_config(folder)
    edited(folder, some_new_switch=None, lora_alpha=float("nan"))
    with pytest.raises(QAdapterError, match="lora_alpha=nan"):
        read_config(folder)
    for name, value in (("target_modules", [3]), ("rank_pattern", 3), ("r", "4"), ("layers_to_transform", "x")):
        edited(saved(tmp_path / name), **{name: value})
        with pytest.raises(QAdapterError, match=rf"{name} is .*: Input should be a valid"):
            load_adapter(tiny_model(), tmp_path / name)
    (folder / "adapter_config.json").write_text("[]")
    with pytest.raises(QAdapterError, match="holds no JSON object"):
        read_config(folder)


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
def test_a_pattern_takes_bounded_time(field: str, tmp_path: Path):
    """(a*)*b-like patterns take time without end on a name that does not fit."""
    folder = saved(tmp_path / "adapter")
    edited(folder, **{"target_modules": ["q_proj"], field: r"(([a-z._0-9]*)*)*!"})
    begun = time.monotonic()
    with pytest.raises(QAdapterError, match=r"takes longer than|fits no layer|does not fit"):
        load_adapter(tiny_model(), folder)
    assert time.monotonic() - begun < 10


def test_patterns_of_ranks_are_plain(tmp_path: Path):
    folder = edited(saved(tmp_path / "adapter"), rank_pattern={"(x+)*y": 4})
    with pytest.raises(QAdapterError, match="could take too long"):
        read_config(folder)
    assert read_config(edited(folder, rank_pattern={r"layers\.0\..*": 4})).rank_pattern  # type: ignore[attr-defined]


def test_a_pattern_becomes_the_names_that_it_fits():
    config = fitted(lora(target_modules=r".*layers\.1.*\.(q|v)_proj"), tiny_model())
    assert sorted(config.target_modules) == [f"model.layers.1.self_attn.{name}_proj" for name in "qv"]
    with pytest.raises(QAdapterError, match=r"'q_prj', which fits no layer, did you mean 'q_proj'\?"):
        fitted(lora(target_modules="q_prj"), tiny_model())
    with pytest.raises(QAdapterError, match=r"Give a list: \[q_proj\]"):
        fitted(lora(target_modules="q_proj"), tiny_model())
    with pytest.raises(QAdapterError, match="is no regular expression"):
        fitted(lora(target_modules="(q"), tiny_model())


def test_wrong_names_are_refused_with_the_near_one():
    with pytest.raises(QAdapterError, match=r"layers that llama does not have: q_prj, did you mean 'q_proj'\?"):
        fitted(lora(target_modules=["v_proj", "q_prj"]), tiny_model())
    with pytest.raises(QAdapterError, match=r"modules to save that llama does not have: nrm"):
        fitted(lora(target_modules=["v_proj"], modules_to_save=["nrm"]), tiny_model())


# ---- names and dials ------------------------------------------------------------------------------------------------


def test_an_adapter_of_another_name_is_found(tmp_path: Path):
    """PEFT keeps what is not called `default` below the folder."""
    model = get_peft_model(tiny_model(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]), "mine")
    policy = moved(QAdapterForCausalLM(model, RESIDUAL)).eval()
    policy.save_pretrained(tmp_path)
    assert read_settings(tmp_path).adapter_weights == {"mine": 1.0}
    assert adapter_place(tmp_path) == tmp_path / "mine"
    loaded = QAdapterForCausalLM.from_pretrained(tmp_path, base_model=tiny_model())
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=tokens()).logits, policy(input_ids=tokens()).logits)
        second = QAdapterForCausalLM.from_base(tiny_model(), lora(), RESIDUAL)
        second.attach(tmp_path, "other", weight=1.0)
        second.set_adapter_weights({"other": 1.0})
        torch.testing.assert_close(second(input_ids=tokens()).logits, policy(input_ids=tokens()).logits)


@pytest.mark.parametrize(
    ("alpha_0", "alpha_tilde"),
    [(1e40, 1.0), (float("nan"), 1.0), (-1.0, 1.0), (1.0, 1e-42), (1.0, float("nan")), (1.0, float("inf")), (1.0, 0.0)],
)
def test_dials_that_give_no_numbers(alpha_0: float, alpha_tilde: float, tmp_path: Path):
    with pytest.raises(QAdapterError, match=r"alpha_0 from 0 to 1e\+09, alpha_tilde from 1e-06 to 1e\+09"):
        check_dials(alpha_0, alpha_tilde)
    file = saved(tmp_path) / "q_adapter.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "alpha_0": alpha_0, "alpha_tilde": alpha_tilde}))
    with pytest.raises(QAdapterError, match="alpha_tilde from"):
        read_settings(tmp_path)


def test_the_ends_of_the_dials_give_numbers():
    policy = moved(QAdapterForCausalLM.from_base(tiny_model(), lora(), RESIDUAL)).eval()
    with torch.no_grad():
        for alpha_0, alpha_tilde in ((0.0, 1e-6), (1e9, 1e-6), (1e9, 1e9), (0.0, 1e9)):
            assert policy(input_ids=tokens(), alpha_0=alpha_0, alpha_tilde=alpha_tilde).logits.isfinite().all()
        policy.set_adapter_weights({"default": 1e6})
        assert policy(input_ids=tokens()).logits.isfinite().all()
    for weight in (1e39, float("nan"), float("-inf")):
        with pytest.raises(QAdapterError, match="expected a number from"):
            policy.set_adapter_weights({"default": weight})
    check_weights({"one": -2.5})
