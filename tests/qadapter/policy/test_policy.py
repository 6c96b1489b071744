"""The policy's logits: against the definition, on every architecture, with dials, files and several adapters."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from qadapter.errors import QAdapterError
from qadapter.policy.model import QAdapterForCausalLM
from qadapter.policy.objective import Objective, policy_logits
from tests.support.tiny_models import ARCHITECTURES, VOCABULARY, lora, moved, tiny_model

ABSOLUTE = Objective.preset("paper", alpha_0=0.3, alpha_tilde=0.8)
RESIDUAL = Objective.preset("residual", alpha_0=0.7, alpha_tilde=1.3)


def tokens(rows: int = 3, length: int = 12, seed: int = 0) -> Tensor:
    return torch.randint(6, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def make_policy(
    architecture: str = "llama", objective: Objective = ABSOLUTE, dropout: float = 0.0, **changes: object
) -> QAdapterForCausalLM:
    torch.manual_seed(3)
    policy = QAdapterForCausalLM.from_base(tiny_model(architecture), lora(dropout=dropout, **changes), objective)
    return moved(policy).eval()


def expected_logits(policy: QAdapterForCausalLM, ids: Tensor) -> Tensor:
    """The definition, through PEFT's own ways: one plain pass, one with the adapter disabled."""
    with torch.no_grad():
        adapted = policy.peft_model(input_ids=ids).logits
        with policy.peft_model.disable_adapter():
            base = policy.peft_model(input_ids=ids).logits
    o = policy.objective
    q = adapted - base if o.parametrization == "residual" else adapted
    return policy_logits(q, base.log_softmax(-1), o.alpha_0, o.alpha_tilde)


@pytest.mark.slow
@pytest.mark.parametrize("objective", [ABSOLUTE, RESIDUAL], ids=["absolute", "residual"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_are_the_definition(architecture: str, objective: Objective):
    policy = make_policy(architecture, objective)
    ids = tokens()
    expected = expected_logits(policy, ids)
    with torch.no_grad():
        in_one_pass = policy(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    in_two = policy(input_ids=ids).logits
    torch.testing.assert_close(in_one_pass, expected, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(in_two, expected, atol=2e-5, rtol=1e-5)
    assert in_two.requires_grad
    assert not in_one_pass.requires_grad


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_untrained_residual_adapter_is_the_base(architecture: str):
    base = tiny_model(architecture)
    ids = tokens()
    with torch.no_grad():
        expected = base(input_ids=ids).logits.log_softmax(-1)
        policy = QAdapterForCausalLM.from_base(base, lora(), Objective.preset("residual")).eval()
        torch.testing.assert_close(policy(input_ids=ids).logits.log_softmax(-1), expected, atol=1e-6, rtol=1e-6)
        q, base_logits = policy.q_and_base_logits(ids)
        assert torch.equal(q, base_logits)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_disabled_is_the_base_for_all_dials(architecture: str):
    ids = tokens()
    with torch.no_grad():
        expected = tiny_model(architecture)(input_ids=ids).logits
        policy = make_policy(architecture)
        assert not torch.allclose(policy(input_ids=ids).logits, expected, atol=0.1)
        with policy.disable_adapter():
            torch.testing.assert_close(policy(input_ids=ids).logits, expected, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(policy(input_ids=ids).logits, expected_logits(policy, ids), atol=2e-5, rtol=1e-5)


def test_the_dials_in_config_and_call():
    policy, ids = make_policy(), tokens()
    with torch.no_grad():
        in_call = policy(input_ids=ids, alpha_0=2.0, alpha_tilde=0.5).logits
        policy.config.alpha_0, policy.config.alpha_tilde = 2.0, 0.5
        in_config = policy(input_ids=ids).logits
        policy.objective = Objective.preset("paper", alpha_0=2.0, alpha_tilde=0.5)
        torch.testing.assert_close(in_call, expected_logits(policy, ids), atol=5e-5, rtol=1e-5)
        assert torch.equal(in_call, in_config)
        for bad in ({"alpha_tilde": 0.0}, {"alpha_0": -1.0}):
            with pytest.raises(QAdapterError, match=r"expected at least 0 and above 0"):
                policy(input_ids=ids, **bad)
        # α0 → ∞ at α̃ = α0 is the base
        far = policy(input_ids=ids, alpha_0=1e6, alpha_tilde=1e6).logits.softmax(-1)
        with policy.disable_adapter():
            torch.testing.assert_close(far, policy(input_ids=ids).logits.softmax(-1), atol=1e-3, rtol=0)


def rows_computed(policy: QAdapterForCausalLM) -> list[int]:
    """Will hold the number of rows of every pass of the base model from now on."""
    seen: list[int] = []
    policy.get_input_embeddings().register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    return seen


@pytest.mark.parametrize("objective", [ABSOLUTE, RESIDUAL, Objective.preset("residual")], ids=str)
def test_up_to_a_constant_the_probabilities_are_the_same(objective: Objective):
    policy, ids = make_policy(objective=objective), tokens()
    seen = rows_computed(policy)
    with torch.no_grad():
        exact = policy(input_ids=ids).logits
        relative = policy(input_ids=ids, up_to_constant=True).logits
    torch.testing.assert_close(relative.log_softmax(-1), exact.log_softmax(-1), atol=2e-5, rtol=1e-5)
    # The base's row cancels where the policy is residual with α0 = 1
    assert seen == [6, 3 if objective.alpha_0 == 1 else 6]
    with torch.no_grad():
        policy(input_ids=ids, alpha_0=0.0)
    assert seen[2] == (6 if objective.parametrization == "residual" else 3)


def test_labels_give_the_cross_entropy_of_the_policy():
    policy, ids = make_policy(), tokens()
    output = policy(input_ids=ids, labels=ids)
    logprobs = expected_logits(policy, ids)[:, :-1].log_softmax(-1)
    expected = -logprobs.gather(-1, ids[:, 1:, None]).mean()
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_labels_of_a_step_in_parts_add_up():
    """transformers' Trainer gives a loss the step's number of labels and divides by nothing itself."""
    policy, ids = make_policy(), tokens(3)
    labels = ids.clone()
    labels[0, :9] = labels[1, :4] = -100
    with torch.no_grad():
        whole = policy(input_ids=ids, labels=labels).loss
        parts = [
            policy(input_ids=ids[[i]], labels=labels[[i]], num_items_in_batch=torch.tensor(3 + 8 + 11)).loss
            for i in range(3)
        ]
    assert float(sum(parts)) == pytest.approx(float(whole), rel=1e-5)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"output_hidden_states": True}, "output_hidden_states: a policy's logits are made of several passes"),
        ({"output_attentions": True}, "output_attentions: a policy's logits"),
        ({"return_dict": False}, "return_dict is False; a policy returns an output with names"),
    ],
)
def test_what_a_policy_cannot_return_is_refused(asked: dict[str, bool], said: str):
    policy, ids = make_policy(), tokens(2)
    with pytest.raises(QAdapterError, match=said):
        policy(input_ids=ids, **asked)
    if "return_dict" not in asked:
        with pytest.raises(QAdapterError, match=said):
            policy.generate(ids, max_new_tokens=2, return_dict_in_generate=True, **asked)
    same = policy(input_ids=ids, **{name: not value for name, value in asked.items()}).logits
    assert torch.equal(same, policy(input_ids=ids).logits)


def test_logits_to_keep():
    policy, ids = make_policy(), tokens()
    with torch.no_grad():
        whole, last = policy(input_ids=ids).logits, policy(input_ids=ids, logits_to_keep=2).logits
    assert last.shape == (3, 2, VOCABULARY)
    torch.testing.assert_close(last, whole[:, -2:])


def test_only_the_adapter_gets_gradients_from_the_adapted_row():
    policy = make_policy("gpt2")
    q_logits, base_logits = policy.q_and_base_logits(tokens())
    assert not base_logits.requires_grad
    q_logits.square().mean().backward()
    for name, parameter in policy.named_parameters():
        assert parameter.requires_grad == ("lora_" in name)
        assert (parameter.grad is not None) == ("lora_" in name)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_train_mode_reaches_the_adapter_and_not_the_base(architecture: str):
    """GPT-2's config has dropout 0.1: log π1 must not be a sample of it."""
    policy = make_policy(architecture, dropout=0.5).train()
    ids = tokens()
    assert policy.training
    first, second = policy.q_and_base_logits(ids), policy.q_and_base_logits(ids)
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[0], second[0])
    policy.eval()
    assert not policy.training
    assert torch.equal(policy.q_and_base_logits(ids)[0], policy.q_and_base_logits(ids)[0])


def test_a_failed_pass_leaves_no_hook_behind():
    policy, ids = make_policy(), tokens()
    with torch.no_grad():
        before = policy(input_ids=ids).logits
        with pytest.raises(IndexError):
            policy(input_ids=ids + VOCABULARY)
        assert torch.equal(policy(input_ids=ids).logits, before)
        assert torch.equal(policy.peft_model(input_ids=ids).logits, policy.q_and_base_logits(ids)[0])


def replaced_methods(model: torch.nn.Module) -> set[str]:
    """Methods that stand on an instance in place of its class's."""
    return {
        f"{type(module).__name__}.{name}"
        for module in model.modules()
        for name in vars(module)
        if callable(getattr(type(module), name, None))
    }


def test_no_method_is_replaced_on_an_instance(tmp_path: Path):
    policy, ids = make_policy(), tokens()
    before = replaced_methods(tiny_model())
    policy(input_ids=ids, labels=ids).loss.backward()
    policy.generate(input_ids=ids, max_new_tokens=2, num_beams=2)
    policy.save_pretrained(tmp_path)
    policy.q_and_base_logits(ids)
    assert replaced_methods(policy) == before == set()
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in policy.modules())
    policy.forward = policy.forward  # the check sees one
    assert replaced_methods(policy) == {"QAdapterForCausalLM.forward"}


def test_dora_takes_two_passes_to_the_same_end():
    policy = make_policy(use_dora=True)
    assert not policy._passes.rows.supported
    ids = tokens()
    with torch.no_grad():
        torch.testing.assert_close(policy(input_ids=ids).logits, expected_logits(policy, ids))


def test_a_pass_without_adapter_keeps_frozen_adapters_frozen():
    policy = make_policy(use_dora=True)
    for parameter in policy.parameters():
        parameter.requires_grad_(False)
    policy.q_and_base_logits(tokens())
    assert not any(parameter.requires_grad for parameter in policy.parameters())


# ---- files ---------------------------------------------------------------------------------------------------------


def saved_base(folder: Path, architecture: str = "llama") -> PreTrainedModel:
    tiny_model(architecture).save_pretrained(folder)
    return type(tiny_model(architecture)).from_pretrained(folder)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_saved_and_loaded_under_another_seed(architecture: str, tmp_path: Path):
    base = saved_base(tmp_path / "base", architecture)
    torch.manual_seed(5)
    policy = moved(QAdapterForCausalLM.from_base(base, lora(), RESIDUAL)).eval()
    policy.config.alpha_0 = 0.9
    ids = tokens()
    with torch.no_grad():
        expected = policy(input_ids=ids).logits
        with policy.disable_adapter():
            assert not torch.allclose(policy(input_ids=ids).logits, expected, atol=0.1)
    policy.save_pretrained(tmp_path / "adapter")
    torch.manual_seed(6)
    loaded = QAdapterForCausalLM.from_pretrained(tmp_path / "adapter")
    assert (loaded.objective, loaded.config.alpha_0, loaded.config.alpha_tilde) == (RESIDUAL, 0.9, 1.3)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    given = QAdapterForCausalLM.from_pretrained(tmp_path / "adapter", base_model=tiny_model(architecture))
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, expected)
        assert torch.equal(given(input_ids=ids).logits, expected)


def test_the_folder_is_plain_peft(tmp_path: Path):
    base = saved_base(tmp_path / "base")
    policy = moved(QAdapterForCausalLM.from_base(base, lora(), ABSOLUTE)).eval()
    policy.save_pretrained(tmp_path / "adapter")
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    own = {"base_fingerprint.json", "q_adapter.json"}
    assert names == {"README.md", "adapter_config.json", "adapter_model.safetensors"} | own
    plain = PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter").eval()
    ids = tokens()
    with torch.no_grad():
        assert torch.equal(plain(input_ids=ids).logits, policy.q_and_base_logits(ids)[0])
    settings = json.loads((tmp_path / "adapter" / "q_adapter.json").read_text())
    assert settings["objective"]["alpha_0"] == 0.3
    assert settings["adapter_weights"] == {"default": 1.0}


def test_loading_says_what_is_wrong(tmp_path: Path):
    policy = make_policy()
    policy.save_pretrained(tmp_path / "adapter")
    with pytest.raises(QAdapterError, match=r"The Q-Adapter is not in .* but in .*adapter\. Give that folder"):
        QAdapterForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(QAdapterError, match=r"is no adapter: it has no adapter_config\.json"):
        QAdapterForCausalLM.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(QAdapterError, match="does not say which base"):
        QAdapterForCausalLM.from_pretrained(tmp_path / "adapter")
    with pytest.raises(QAdapterError, match=r"base model .*nowhere of the adapter .* cannot be loaded.*[^.]\. Or give"):
        QAdapterForCausalLM.from_pretrained(tmp_path / "adapter", base_model=tmp_path / "nowhere")
    file = tmp_path / "adapter" / "q_adapter.json"
    for broken in ("{", "[]", '{"format": 2}', '{"format": 1, "objective": {}}'):
        file.write_text(broken)
        with pytest.raises(QAdapterError, match=r"q_adapter.json cannot be read"):
            QAdapterForCausalLM.from_pretrained(tmp_path / "adapter", base_model=tiny_model())


# ---- several adapters ----------------------------------------------------------------------------------------------


def two_adapters(tmp_path: Path, objective: Objective) -> tuple[QAdapterForCausalLM, list[Tensor], Tensor, Tensor]:
    """A policy with adapters "default" and "second", and for `ids` each adapter's and the base's logits."""
    ids, adapted = tokens(), []
    for seed, name in enumerate(("first", "second"), start=10):
        policy = moved(QAdapterForCausalLM.from_base(tiny_model(), lora(), objective), seed=seed).eval()
        policy.save_pretrained(tmp_path / name)
        with torch.no_grad():
            adapted.append(policy.q_and_base_logits(ids)[0])
    policy = QAdapterForCausalLM.from_pretrained(tmp_path / "first", base_model=tiny_model())
    policy.attach(tmp_path / "second", "second")
    with torch.no_grad():
        base = tiny_model()(input_ids=ids).logits
    return policy, adapted, base, ids


def test_weighted_residuals_add_up(tmp_path: Path):
    policy, adapted, base, ids = two_adapters(tmp_path, RESIDUAL)
    log_base = base.log_softmax(-1)
    with torch.no_grad():
        for weights in ((1.0, 0.0), (0.0, 1.0), (0.5, 1.5), (1.0, -0.5), (0.0, 0.0)):
            policy.set_adapter_weights({"default": weights[0], "second": weights[1]})
            q = sum(w * (row - base) for w, row in zip(weights, adapted, strict=True))
            expected = policy_logits(torch.as_tensor(q), log_base, RESIDUAL.alpha_0, RESIDUAL.alpha_tilde)
            torch.testing.assert_close(policy(input_ids=ids).logits, expected.expand_as(base), atol=5e-5, rtol=1e-5)
    policy.set_adapter_weights({"second": 1.0})
    assert policy.adapter_weights == {"default": 0.0, "second": 1.0}


def test_absolute_adapters_mix_only_with_weights_that_sum_to_one(tmp_path: Path):
    policy, adapted, base, ids = two_adapters(tmp_path, ABSOLUTE)
    policy.set_adapter_weights({"default": 0.25, "second": 0.75})
    q = 0.25 * adapted[0] + 0.75 * adapted[1]
    expected = policy_logits(q, base.log_softmax(-1), ABSOLUTE.alpha_0, ABSOLUTE.alpha_tilde)
    with torch.no_grad():
        torch.testing.assert_close(policy(input_ids=ids).logits, expected, atol=5e-5, rtol=1e-5)
    with pytest.raises(QAdapterError, match=r"weights sum to 2.*must sum to 1"):
        policy.set_adapter_weights({"default": 1.0, "second": 1.0})
    assert policy.adapter_weights == {"default": 0.25, "second": 0.75}
    with pytest.raises(QAdapterError, match="No adapter is named third; there are default, second"):
        policy.set_adapter_weights({"third": 1.0})


def test_as_residual_is_the_same_policy_and_composes(tmp_path: Path):
    policy, adapted, base, ids = two_adapters(tmp_path, ABSOLUTE)
    with torch.no_grad():
        before = policy(input_ids=ids).logits.log_softmax(-1)
        policy.as_residual()
        torch.testing.assert_close(policy(input_ids=ids).logits.log_softmax(-1), before, atol=5e-5, rtol=1e-5)
        policy.set_adapter_weights({"default": 1.0, "second": 1.0})
        q = (adapted[0] - base) + (adapted[1] - base)
        expected = policy_logits(q, base.log_softmax(-1), ABSOLUTE.alpha_0 + 1, ABSOLUTE.alpha_tilde)
        torch.testing.assert_close(policy(input_ids=ids).logits, expected, atol=5e-5, rtol=1e-5)


def test_several_adapters_are_saved_and_loaded(tmp_path: Path):
    policy, _, _, ids = two_adapters(tmp_path, RESIDUAL)
    policy.set_adapter_weights({"default": 0.5, "second": 2.0})
    policy.save_pretrained(tmp_path / "both")
    loaded = QAdapterForCausalLM.from_pretrained(tmp_path / "both", base_model=tiny_model())
    assert loaded.adapter_weights == {"default": 0.5, "second": 2.0}
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, policy(input_ids=ids).logits)


def test_attaching_refuses_what_does_not_fit(tmp_path: Path):
    policy, _, _, _ = two_adapters(tmp_path, RESIDUAL)
    with pytest.raises(QAdapterError, match="named 'second' already"):
        policy.attach(tmp_path / "second", "second")
    make_policy(objective=ABSOLUTE).save_pretrained(tmp_path / "absolute")
    with pytest.raises(QAdapterError, match="'absolute', this policy 'residual'"):
        policy.attach(tmp_path / "absolute", "third")
    absolute = make_policy(objective=ABSOLUTE)
    with pytest.raises(QAdapterError, match=r"weights sum to 1\.5"):
        absolute.attach(tmp_path / "absolute", "third", weight=0.5)
    assert list(absolute.adapter_weights) == ["default"]
    assert list(absolute.peft_model.peft_config) == ["default"]  # nothing was loaded, so the next try can succeed
    absolute.attach(tmp_path / "absolute", "third")
    policy.set_adapter_weights({"default": 1.0, "second": 1.0})
    with pytest.raises(QAdapterError, match="Training moves one adapter"):
        policy.q_and_base_logits(tokens())


# ---- refusals ------------------------------------------------------------------------------------------------------


def test_refuses_what_cannot_work():
    with pytest.raises(QAdapterError, match="LlamaForCausalLM carries no adapter"):
        QAdapterForCausalLM(tiny_model(), ABSOLUTE)  # type: ignore[arg-type]
    adapted = get_peft_model(tiny_model(), lora())
    with pytest.raises(QAdapterError, match="carries an adapter already"):
        QAdapterForCausalLM.from_base(adapted, lora(), ABSOLUTE)  # type: ignore[arg-type]
    merged = copy.deepcopy(adapted)
    merged.merge_adapter()
    with pytest.raises(QAdapterError, match="merged into the base's weights"):
        QAdapterForCausalLM(merged, ABSOLUTE)
    from peft import PromptTuningConfig

    prompt = get_peft_model(tiny_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(QAdapterError, match="learns a prompt"):
        QAdapterForCausalLM(prompt, ABSOLUTE)


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore")
def test_refuses_an_adapter_on_tied_embeddings(config: dict[str, list[str]]):
    peft_config = LoraConfig(task_type="CAUSAL_LM", **config)
    with pytest.raises(QAdapterError, match="ties its input and output embeddings"):
        QAdapterForCausalLM.from_base(tiny_model(tie_word_embeddings=True), peft_config, ABSOLUTE)
    free = QAdapterForCausalLM.from_base(tiny_model(), peft_config, ABSOLUTE)
    ids = tokens()
    with torch.no_grad():
        torch.testing.assert_close(free(input_ids=ids).logits, expected_logits(free, ids), atol=2e-5, rtol=1e-5)
