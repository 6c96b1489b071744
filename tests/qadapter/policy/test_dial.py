"""The dial: against logits and weights put together by hand, for every kind of adapter, in calls and in files."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoHaConfig, PeftConfig, PeftModel, VeraConfig, get_peft_model
from torch import Tensor

from qadapter.errors import QAdapterError
from qadapter.policy.adapters import load_adapter
from qadapter.policy.dial import Dial
from qadapter.policy.files import copy_turned, read_settings, saved_dial, write_dial
from qadapter.policy.guided import Guide, GuidedForCausalLM
from qadapter.policy.loading import load_policy
from qadapter.policy.model import QAdapterForCausalLM
from qadapter.policy.objective import Objective
from tests.qadapter.policy.test_policy import (
    ABSOLUTE,
    RESIDUAL,
    expected_logits,
    make_policy,
    rows_computed,
    tokens,
    two_adapters,
)
from tests.qadapter.policy.test_policy_generation import generate, greedy_by_scoring
from tests.support.tiny_models import lora, moved, tiny_model

PRESET = Objective.preset("residual")
FORMS = [ABSOLUTE, RESIDUAL, PRESET]
VALUES = (0.3, 0.75, 1.5)


def base_logits(policy: QAdapterForCausalLM, ids: Tensor) -> Tensor:
    with policy.disable_adapter():
        return policy(input_ids=ids).logits


def log_probs(policy: QAdapterForCausalLM, ids: Tensor, **options: object) -> Tensor:
    return policy(input_ids=ids, **options).logits.log_softmax(-1)


def plain_adapter(config: PeftConfig | None = None) -> PeftModel:
    """A PEFT adapter as SFT or DPO leaves it: each of its parameters moved."""
    torch.manual_seed(3)
    model = get_peft_model(tiny_model(), config or lora()).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


# ---- what it does ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", FORMS, ids=["absolute", "residual", "preset"])
def test_the_ends_are_base_and_policy(objective: Objective):
    policy, ids = make_policy(objective=objective), tokens()
    with torch.no_grad():
        for kind in ("scale", "q-weight"):
            assert torch.equal(policy(input_ids=ids, dial=Dial(kind, 0)).logits, base_logits(policy, ids))
            assert torch.equal(policy(input_ids=ids, dial=Dial(kind, 1)).logits, policy(input_ids=ids).logits)


@pytest.mark.parametrize("objective", FORMS, ids=["absolute", "residual", "preset"])
def test_q_weight_is_base_plus_weighted_difference(objective: Objective):
    policy, ids = make_policy(objective=objective), tokens()
    with torch.no_grad():
        trained, base = expected_logits(policy, ids), base_logits(policy, ids)
        for value in VALUES:
            expected = value * (trained - base) + base
            found = policy(input_ids=ids, dial=f"q-weight={value}").logits
            torch.testing.assert_close(found, expected, atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("objective", FORMS, ids=["absolute", "residual", "preset"])
def test_scale_multiplies_lora_b(objective: Objective):
    """By hand: lora_B times s, then the policy's definition, its base tempered on the way from 1 to α0/α̃."""
    policy, ids = make_policy(objective=objective), tokens()
    o = objective
    with torch.no_grad():
        base = base_logits(policy, ids)
        for value in VALUES:
            scaled = copy.deepcopy(policy)
            for name, parameter in scaled.named_parameters():
                if "lora_B" in name:
                    parameter.mul_(value)
            adapted = scaled.peft_model(input_ids=ids).logits
            tempered = (o.alpha_0 + (o.parametrization == "absolute")) / o.alpha_tilde
            expected = (adapted - base) / o.alpha_tilde + (1 + value * (tempered - 1)) * base
            found = log_probs(policy, ids, dial=Dial("scale", value))
            torch.testing.assert_close(found, expected.log_softmax(-1), atol=5e-5, rtol=1e-5)
        assert torch.equal(log_probs(policy, ids), log_probs(policy, ids))  # nothing stays scaled


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        lora(),
        lora(use_dora=True),
        lora(target_modules=["q_proj"], modules_to_save=["lm_head", "norm"]),
        LoHaConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "up_proj"], r=4),
        VeraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=8, d_initial=0.5),
        IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ],
    ids=["lora", "dora", "saved-modules", "loha", "vera", "ia3"],
)
@pytest.mark.filterwarnings("ignore")
def test_scale_is_interpolation_of_weights(config: PeftConfig):
    """WiSE-FT and ExPO by hand: W + s · (W merged − W) in every weight, for each kind of adapter."""
    model, ids = plain_adapter(config).double(), tokens()
    start, trained = tiny_model().double(), copy.deepcopy(model).merge_and_unload()
    policy = QAdapterForCausalLM.around(model).eval()
    with torch.no_grad():
        for value in (0.5, 1.0, 1.5):
            between, ends = copy.deepcopy(trained), dict(start.named_parameters())
            for name, parameter in between.named_parameters():
                parameter.copy_(ends[name] + value * (parameter - ends[name]))
            found = policy(input_ids=ids, dial=Dial("scale", value)).logits
            torch.testing.assert_close(found, between(input_ids=ids).logits, atol=1e-8, rtol=1e-6)
        assert torch.equal(policy(input_ids=ids, dial="scale=0").logits, base_logits(policy, ids))
    assert not any(module._forward_hooks for module in policy.modules())


def test_relation_to_the_alphas():
    """w is 1/α0 = 1/α̃ in the residual form; in general α̃ becomes α̃/w and α0 becomes α0 − α̃ + α̃/w."""
    ids = tokens()
    with torch.no_grad():
        policy = make_policy(objective=PRESET)
        for w in (0.25, 0.5, 2.0):
            by_alphas = log_probs(policy, ids, alpha_0=1 / w, alpha_tilde=1 / w)
            torch.testing.assert_close(log_probs(policy, ids, dial=Dial("q-weight", w)), by_alphas, atol=5e-5, rtol=0)
        for objective in (ABSOLUTE, RESIDUAL):
            policy, w, o = make_policy(objective=objective), 0.5, objective
            moved_tilde = o.alpha_tilde / w
            by_alphas = log_probs(policy, ids, alpha_0=o.alpha_0 - o.alpha_tilde + moved_tilde, alpha_tilde=moved_tilde)
            torch.testing.assert_close(log_probs(policy, ids, dial=Dial("q-weight", w)), by_alphas, atol=5e-5, rtol=0)


def test_several_adapters_have_one_dial(tmp_path: Path):
    policy, adapted, base, ids = two_adapters(tmp_path, PRESET)
    policy.set_adapter_weights({"default": 0.5, "second": 1.5})
    change = 0.5 * (adapted[0] - base) + 1.5 * (adapted[1] - base)
    with torch.no_grad():
        found = log_probs(policy, ids, dial="q-weight=0.6")
        torch.testing.assert_close(found, (base + 0.6 * change).log_softmax(-1), atol=5e-5, rtol=1e-5)
        alone = []
        for name in ("default", "second"):
            policy.set_adapter_weights({name: 1.0})
            alone.append(policy(input_ids=ids, dial="scale=0.6", up_to_constant=True).logits)
        policy.set_adapter_weights({"default": 0.5, "second": 1.5})
        expected = base + 0.5 * (alone[0] - base) + 1.5 * (alone[1] - base)
        found = log_probs(policy, ids, dial="scale=0.6")
        torch.testing.assert_close(found, expected.log_softmax(-1), atol=5e-5, rtol=1e-5)


def test_what_is_computed():
    """The base's pass is spared where the dial does not need it."""
    policy, ids = QAdapterForCausalLM.around(plain_adapter()).eval(), tokens()
    seen = rows_computed(policy)
    with torch.no_grad():
        for dial in ("scale=1", "scale=0.5", "q-weight=0.5", "scale=0", "q-weight=0"):
            policy(input_ids=ids, dial=dial)
    assert seen == [3, 3, 6, 3, 3]


@pytest.mark.slow
@pytest.mark.parametrize("dial", ["scale=0.5", "q-weight=1.5", "scale=0"])
def test_generation_in_the_call(dial: str):
    policy, ids = make_policy(objective=RESIDUAL), tokens()
    expected = greedy_by_scoring(policy, ids, dial=dial)
    assert torch.equal(generate(policy, ids, dial=dial), expected)
    assert torch.equal(generate(policy, ids, dial=Dial.parse(dial), use_cache=False), expected)
    assert not torch.equal(generate(policy, ids), expected)
    policy.dial = dial
    assert policy.dial == Dial.parse(dial)
    assert torch.equal(generate(policy, ids), expected)
    with pytest.raises(QAdapterError, match="'half' is no dial"):
        policy.dial = "half"
    policy.dial = None
    assert torch.equal(generate(policy, ids), generate(policy, ids, dial="scale=1"))


def test_a_failed_pass_leaves_nothing_scaled():
    policy, ids = make_policy(), tokens()
    with torch.no_grad():
        before = policy(input_ids=ids).logits
        with pytest.raises(IndexError):
            policy(input_ids=ids + 10_000, dial="scale=0.5")
        assert torch.equal(policy(input_ids=ids).logits, before)


# ---- texts ----------------------------------------------------------------------------------------------------------


def test_dials_as_text():
    assert Dial.parse("scale=0.5") == Dial("scale", 0.5) == Dial.of({"kind": "scale", "value": 0.5})
    assert Dial.parse(" q_weight = 2 ") == Dial("q-weight", 2.0)
    assert Dial.parse("wise-ft=0.3") == Dial("scale", 0.3)
    assert Dial.parse("expo=0.5") == Dial("scale", 1.5)  # θ1 + α(θ1 − θ0)
    assert str(Dial("q-weight", 0.75)) == "q-weight=0.75"
    assert Dial.of(None) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0.5", "expected scale=VALUE or q-weight=VALUE, such as scale=0.5"),
        ("scale=", "is no dial"),
        ("scale=nan", "is no dial"),
        ("scale=-1", "from 0 "),
        ("q-weight=1e9", "to 100"),
        ("scal=0.5", "did you mean 'scale'"),
        ("expo=-2", "from 0 "),
    ],
)
def test_no_dials(text: str, message: str):
    with pytest.raises(QAdapterError, match=message):
        Dial.parse(text)


def test_no_dials_as_mappings():
    for wrong in ({"kind": "scale"}, {"kind": "scale", "value": "1"}, {"kind": 1, "value": 1}, {"value": True}):
        with pytest.raises(QAdapterError):
            Dial.of(wrong)


# ---- files ----------------------------------------------------------------------------------------------------------


def test_saved_with_a_q_adapter(tmp_path: Path):
    policy, ids = make_policy(objective=RESIDUAL), tokens()
    policy.save_pretrained(tmp_path / "trained")
    settings = json.loads((tmp_path / "trained/q_adapter.json").read_text())
    assert settings["format"] == 1
    assert "dial" not in settings
    policy.dial = Dial("q-weight", 0.75)
    policy.save_pretrained(tmp_path / "turned")
    copy_turned(tmp_path / "trained", tmp_path / "copied", dial=policy.dial)
    for folder in (tmp_path / "turned", tmp_path / "copied"):
        assert json.loads((folder / "q_adapter.json").read_text())["format"] == 2  # older versions refuse it
        loaded = QAdapterForCausalLM.from_pretrained(folder, base_model=tiny_model())
        assert loaded.dial == Dial("q-weight", 0.75)
        with torch.no_grad():
            assert torch.equal(loaded(input_ids=ids).logits, policy(input_ids=ids).logits)
            assert not torch.equal(loaded(input_ids=ids).logits, loaded(input_ids=ids, dial="scale=1").logits)
    # Training goes on from the policy as it was trained
    assert QAdapterForCausalLM.from_pretrained(folder, tiny_model(), is_trainable=True).dial.as_trained
    write_dial(folder, Dial())
    assert (folder / "q_adapter.json").read_bytes() == (tmp_path / "trained/q_adapter.json").read_bytes()


def test_saved_beside_a_plain_adapter(tmp_path: Path):
    ids, model = tokens(), plain_adapter()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    assert isinstance(load_policy(tiny_model(), tmp_path), PeftModel)
    assert saved_dial(tmp_path).as_trained
    write_dial(tmp_path, Dial("scale", 0.5))
    assert json.loads((tmp_path / "dial.json").read_text()) == {"format": 1, "kind": "scale", "value": 0.5}
    turned = load_policy(tiny_model(), tmp_path)
    assert isinstance(turned, QAdapterForCausalLM)
    assert turned.dial == saved_dial(tmp_path) == Dial("scale", 0.5)
    again = QAdapterForCausalLM.from_pretrained(tmp_path, tiny_model())
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids, dial="scale=1").logits, expected, atol=1e-6, rtol=1e-6)
        assert torch.equal(again(input_ids=ids).logits, turned(input_ids=ids).logits)
        in_call = load_policy(tiny_model(), tmp_path, Dial("q-weight", 2))
        assert torch.equal(in_call(input_ids=ids).logits, again(input_ids=ids, dial="q-weight=2").logits)
    assert load_policy(tiny_model(), str(tmp_path), "q-weight=2").dial == in_call.dial  # as texts
    again.save_pretrained(tmp_path / "again")
    assert saved_dial(tmp_path / "again") == Dial("scale", 0.5)
    assert not (tmp_path / "again/q_adapter.json").exists()
    load_adapter(tiny_model(), tmp_path / "again")  # plain PEFT's files as before
    with pytest.raises(QAdapterError, match="is no Q-Adapter"):  # it has no objective to be trained on with
        QAdapterForCausalLM.from_pretrained(tmp_path, tiny_model(), is_trainable=True)


def test_a_plain_adapters_alphas_are_saved(tmp_path: Path):
    policy = QAdapterForCausalLM.around(plain_adapter())
    policy.config.alpha_0, policy.config.alpha_tilde = 0.3, 0.7
    policy.save_pretrained(tmp_path)
    loaded = QAdapterForCausalLM.from_pretrained(tmp_path, base_model=tiny_model())
    ids = tokens(2, 6)
    with torch.no_grad():
        torch.testing.assert_close(log_probs(loaded, ids), log_probs(policy, ids))


def test_a_folder_is_what_was_saved_last(tmp_path: Path):
    plain = QAdapterForCausalLM.around(plain_adapter(), "scale=0.5")
    guided = GuidedForCausalLM.from_base(tiny_model(), lora(), Guide("value", 2.0, 3))
    torch.nn.init.constant_(guided.value_head.weight, 0.3)
    guided.dial = "q-weight=0.25"
    assert guided.dial == Dial("q-weight", 0.25)
    ids = tokens(2, 6)
    policies = [make_policy(objective=ABSOLUTE), plain, guided]
    for first in policies:
        for second in policies:
            first.save_pretrained(tmp_path)
            second.save_pretrained(tmp_path)
            loaded = load_policy(tiny_model(), tmp_path)
            with torch.no_grad():
                torch.testing.assert_close(loaded(ids).logits.log_softmax(-1), second(ids).logits.log_softmax(-1))
    assert loaded.dial == guided.dial


def test_plain_adapters_compose(tmp_path: Path):
    """A plain adapter is one of the residual form with α0 = α̃ = 1, beside others of its kind and Q-Adapters."""
    plain_adapter().save_pretrained(tmp_path / "sft")
    moved(QAdapterForCausalLM.from_base(tiny_model(), lora(), PRESET), seed=9).save_pretrained(tmp_path / "q")
    policy, ids = QAdapterForCausalLM.from_pretrained(tmp_path / "sft", tiny_model()), tokens()
    policy.attach(tmp_path / "q", "second")
    policy.set_adapter_weights({"default": 0.5, "second": 0.5})
    policy.dial = Dial("q-weight", 0.8)
    policy.save_pretrained(tmp_path / "both")
    both = QAdapterForCausalLM.from_pretrained(tmp_path / "both", tiny_model())
    with torch.no_grad():
        base = base_logits(policy, ids)
        rows = [load_policy(tiny_model(), tmp_path / name)(input_ids=ids).logits for name in ("sft", "q")]
        expected = (base + 0.8 * sum(0.5 * (row.log_softmax(-1) - base) for row in rows)).log_softmax(-1)
        torch.testing.assert_close(log_probs(policy, ids), expected, atol=5e-5, rtol=1e-5)
        torch.testing.assert_close(log_probs(both, ids), expected, atol=5e-5, rtol=1e-5)


def test_damaged_dials_are_refused(tmp_path: Path):
    make_policy().save_pretrained(tmp_path / "q")
    plain_adapter().save_pretrained(tmp_path / "plain")
    file = tmp_path / "q/q_adapter.json"
    content = json.loads(file.read_text())
    for wrong in ({"dial": {"kind": "volume", "value": 1}}, {"dial": {"kind": "scale", "value": None}}, {"format": 3}):
        file.write_text(json.dumps({**content, **wrong}))
        with pytest.raises(QAdapterError, match=r"q_adapter\.json cannot be read"):
            read_settings(tmp_path / "q")
    scale = {"kind": "scale", "value": 1.0}
    for wrong in ({"format": 1, "kind": "scale"}, scale, {**scale, "format": 1, "kind": 1}):
        (tmp_path / "plain/dial.json").write_text(json.dumps(wrong))
        with pytest.raises(QAdapterError, match=r"dial\.json cannot be read"):
            saved_dial(tmp_path / "plain")
    with pytest.raises(QAdapterError, match="is no adapter"):
        write_dial(tmp_path / "nowhere", Dial("scale", 0.5))
