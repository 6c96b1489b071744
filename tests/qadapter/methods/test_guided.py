"""VAS and PITA: returns and offsets by hand, the exact optimum of an enumerated world, and one policy in all uses."""

from __future__ import annotations

import contextlib
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from peft import get_peft_model

from qadapter.command.parser import main
from qadapter.errors import QAdapterError
from qadapter.evaluation.curve.both_rows import log_likelihoods
from qadapter.evaluation.divergence import kl_per_token
from qadapter.evaluation.lm_eval.model import PolicyLM
from qadapter.evaluation.preference import score_pairs
from qadapter.files.artifacts import read_json
from qadapter.inference.continuations import continue_ids
from qadapter.inference.generate import generate_replies
from qadapter.methods.needs.reward_model import RewardModelSettings, open_rewards, reward_model
from qadapter.methods.needs.rollouts import BRANCHES, ROLLOUTS, RolloutSettings, read_rows
from qadapter.methods.pita import PITASettings
from qadapter.methods.vas import VASSettings, returns
from qadapter.policy.dial import Dial
from qadapter.policy.files import write_dial
from qadapter.policy.guided import GUIDE_FILE, Guide, GuidedForCausalLM
from qadapter.policy.loading import load_base, load_policy
from qadapter.policy.model import QAdapterForCausalLM
from qadapter.preferences.pair import load_pairs
from qadapter.preferences.tokenize import prompt_ids
from qadapter.serving.generator import Generator, Sampling, Turn
from qadapter.serving.policies import ServedPolicies
from qadapter.training.adapt import lora_config
from tests.support.tiny_chat import byte_tokenizer
from tests.support.tiny_models import lora, tiny_model
from tests.support.tiny_toy import MODEL, NO_DROPOUT, TRAINING, TinyToy, make_tiny_toy, rows


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyToy:
    return make_tiny_toy(tmp_path_factory.mktemp("guided"), steps=60)


def moved(base: Any, guide: Guide) -> GuidedForCausalLM:
    """A policy whose adapter and head say something."""
    policy = GuidedForCausalLM.from_base(base, lora_config(NO_DROPOUT), guide)
    torch.manual_seed(1)
    for name, parameter in policy.named_parameters():
        if "lora_" in name or name.startswith("value_head"):
            torch.nn.init.normal_(parameter, std=0.3)
    return policy.eval()


# ---- by hand


def test_lambda_returns_by_hand() -> None:
    """V = (.1, .2, .3), r = 1, λ = .95 → (.92675, .965, 1); λ = 1 → all 1. Padding on both sides changes nothing."""
    values, scored = torch.tensor([[9.0, 0.1, 0.2, 0.3, 7.0]]), torch.tensor([[False, True, True, True, False]])
    one = torch.ones(1)
    assert returns(values, scored, one, 0.95).tolist()[0] == pytest.approx([0, 0.92675, 0.965, 1.0, 0], abs=1e-6)
    assert returns(values, scored, one, 1.0).tolist()[0] == pytest.approx([0, 1, 1, 1, 0], abs=1e-6)
    assert returns(values, scored, one, 0.0).tolist()[0] == pytest.approx([0, 0.2, 0.3, 1.0, 0], abs=1e-6)


def test_offsets_by_hand() -> None:
    value, preference = Guide("value", 3.0, 20), Guide("preference", 1.0, 20)
    numbers = torch.tensor([0.5, -1.0, 2.0, 0.1])
    offsets = value.offsets(numbers)
    assert float(offsets.sum()) == pytest.approx(0, abs=1e-5)
    assert offsets.tolist() == pytest.approx((3 * (numbers - 0.4)).tolist(), abs=1e-5)
    assert value.offsets(torch.full((4,), 7.0)).tolist() == pytest.approx([0] * 4, abs=1e-5)
    assert Guide("value", 0.0, 20).offsets(numbers).tolist() == [0] * 4
    assert float(preference.offsets(torch.tensor(0.0))) == pytest.approx(0.620115, abs=1e-6)  # log((1 + e)/2)
    assert preference.offsets(torch.tensor([60.0, -60.0])).tolist() == pytest.approx([1.0, 0.0], abs=1e-6)
    assert Guide("preference", 0.0, 20).offsets(numbers).tolist() == [0] * 4
    with pytest.raises(ValueError, match="expected 'value' or 'preference'"):
        Guide("reward", 1.0, 20)  # type: ignore[arg-type]


def test_one_step_of_vas_is_the_tilted_base() -> None:
    """V = r, all tokens candidates, β = 1/β_KL: π1 · e^(r/β_KL) / Z."""
    torch.manual_seed(0)
    logits, reward = torch.randn(7), torch.randn(7)
    guided = (logits + Guide("value", 1 / 0.4, 7).offsets(reward)).softmax(0)
    torch.testing.assert_close(guided, (logits + reward / 0.4).softmax(0))
    assert int((logits + Guide("value", 1e4, 7).offsets(reward)).argmax()) == int(reward.argmax())


def test_exact_preferences_give_pitas_optimum() -> None:
    """Two steps, R ∈ {0, 1}, exact σ(z) = P(R = 1 | s∘a), all tokens candidates: π1 · e^(ηR) / Z over whole replies."""
    torch.manual_seed(0)
    eta, first = 1.7, torch.randn(3).double().log_softmax(0)
    second, worth = torch.randn(3, 3).double().log_softmax(1), (torch.rand(3, 3) > 0.5).double()
    guide = Guide("preference", eta, 3)
    chance = (second.exp() * worth).sum(1)  # of R = 1 behind each first token
    steps = [
        (first + guide.offsets(torch.logit(chance))).log_softmax(0)[:, None],
        (second + guide.offsets(torch.where(worth > 0, 40.0, -40.0).double())).log_softmax(1),
    ]
    exact = first[:, None] + second + eta * worth
    torch.testing.assert_close(steps[0] + steps[1], exact - exact.logsumexp((0, 1)), atol=1e-9, rtol=0)


# ---- the policy


@pytest.mark.parametrize("kind", ["value", "preference"])
def test_each_way_of_reading_candidates_agrees(world: TinyToy, kind: Any) -> None:
    """Behind a cached prefix, without a cache, as sequences of their own, and token by token."""
    network, tokenizer = load_base(world.base, MODEL)
    policy = moved(network, Guide(kind, 2.0, 9))
    assert policy.by_masks
    ids = torch.tensor([[0, 0, 4, 11, 12, 13, 14], [9, 3, 30, 31, 32, 8, 7]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    with torch.no_grad():
        whole = policy(input_ids=ids, attention_mask=mask).logits
        last = policy(input_ids=ids, attention_mask=mask, logits_to_keep=3).logits
        some = policy(input_ids=ids, attention_mask=mask, logits_to_keep=torch.tensor([2, 4])).logits
        policy.by_masks = False
        alone = policy(input_ids=ids, attention_mask=mask).logits
        policy.by_masks = True
        cache, stepped = None, []
        for end in range(3, 8):
            new = ids[:, :end] if cache is None else ids[:, end - 1 : end]
            output = policy(input_ids=new, attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            stepped.append(output.logits[:, -1])
        with policy.disable_adapter():
            base = policy(input_ids=ids, attention_mask=mask).logits
        plain = load_base(world.base, MODEL)[0](
            input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)
        ).logits
    seen = mask.bool()
    torch.testing.assert_close(whole[seen], alone[seen], atol=1e-4, rtol=0)
    torch.testing.assert_close(whole[:, -3:], last, atol=1e-4, rtol=0)
    torch.testing.assert_close(whole[:, [2, 4]], some, atol=1e-4, rtol=0)
    with pytest.raises(QAdapterError, match="which StaticCache cannot"):
        policy.generate(ids, attention_mask=mask, max_new_tokens=2, cache_implementation="static")
    torch.testing.assert_close(torch.stack(stepped, 1)[seen[:, 2:]], whole[:, 2:][seen[:, 2:]], atol=1e-4, rtol=0)
    torch.testing.assert_close(base[seen], plain[seen], atol=1e-5, rtol=0)
    changed = ((whole - base).abs() > 1e-6).sum(-1)[seen]
    assert 0 < int(changed.min()) <= int(changed.max()) <= 9
    texts = [["what", "is"], ["how", "do"]]
    prompts = [[{"role": "user", "content": " ".join(words)}] for words in texts]
    same: dict[str, Any] = {"max_new_tokens": 8, "batch_size": 2}
    cached = generate_replies(policy, tokenizer, prompts, **same)  # type: ignore[arg-type]
    policy.by_masks = False
    assert generate_replies(policy, tokenizer, prompts, **same) == cached  # type: ignore[arg-type]


def test_strength_0_is_the_base(world: TinyToy) -> None:
    network, _ = load_base(world.base, MODEL)
    policy = moved(network, Guide("value", 0.0, 9))
    ids = torch.tensor([[4, 11, 12, 13]])
    with torch.no_grad():
        assert torch.equal(policy(input_ids=ids).logits, load_base(world.base, MODEL)[0](ids).logits)


def test_a_cache_without_the_guides_states_is_refused() -> None:
    """A text that was read with the guide off has no states of the guide, which a guided pass behind it needs."""
    policy = moved(tiny_model("llama"), Guide("value", 3.0, 5))
    ids = torch.randint(6, 200, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = policy(input_ids=ids).logits[:, -1]
        cache = policy(input_ids=ids[:, :4], use_cache=True).past_key_values
        found = policy(input_ids=ids[:, 4:], past_key_values=cache).logits[:, -1]
        assert float((found - whole).abs().max()) < 1e-4
        for dial, off in ((None, policy.disable_adapter()), (Dial("q-weight", 0.0), contextlib.nullcontext())):
            with off:
                cache = policy(input_ids=ids[:, :4], use_cache=True, dial=dial).past_key_values
            with pytest.raises(QAdapterError, match="filled with the guide off or its dial at 0"):
                policy(input_ids=ids[:, 4:], past_key_values=cache)


def test_what_a_guide_cannot_return_is_refused() -> None:
    policy = moved(tiny_model("llama"), Guide("value", 3.0, 5))
    ids = torch.tensor([[1, 20, 30]])
    with pytest.raises(QAdapterError, match="output_hidden_states: a policy's logits are made of several passes"):
        policy(input_ids=ids, output_hidden_states=True)
    with pytest.raises(QAdapterError, match="return_dict is False"):
        policy(input_ids=ids, return_dict=False)
    with torch.no_grad():
        whole, part = (policy(input_ids=ids, labels=ids, **given).loss for given in ({}, {"num_items_in_batch": 8}))
    assert float(part) == pytest.approx(float(whole) * 2 / 8, rel=1e-5)


def test_a_constant_value_is_the_base(world: TinyToy) -> None:
    network, _ = load_base(world.base, MODEL)
    policy = GuidedForCausalLM.from_base(network, lora_config(NO_DROPOUT), Guide("value", 5.0, 9))
    torch.nn.init.constant_(policy.value_head.bias, 3.0)
    ids = torch.tensor([[4, 11, 12, 13]])
    with torch.no_grad():
        found = policy(input_ids=ids).logits
        torch.testing.assert_close(found, load_base(world.base, MODEL)[0](ids).logits, atol=1e-5, rtol=0)


def test_a_saved_policy_is_the_same(world: TinyToy, tmp_path: Path) -> None:
    network, _ = load_base(world.base, MODEL)
    policy = moved(network, Guide("preference", 0.7, 9))
    policy.save_pretrained(tmp_path / "saved")
    loaded = load_policy(load_base(world.base, MODEL)[0], tmp_path / "saved")
    assert isinstance(loaded, GuidedForCausalLM)
    assert loaded.guide == Guide("preference", 0.7, 9)
    ids = torch.tensor([[4, 11, 12, 13, 14]])
    with torch.no_grad():
        assert torch.equal(policy(input_ids=ids).logits, loaded(input_ids=ids).logits)
        logits = {}
        for value in (0.0, 1.0, 2.5):
            moved_to = load_policy(load_base(world.base, MODEL)[0], tmp_path / "saved", Dial("q-weight", value))
            logits[value] = moved_to(input_ids=ids).logits
        assert torch.equal(logits[0.0], load_base(world.base, MODEL)[0](ids).logits)
        twice = logits[0.0] + 2.5 * (logits[1.0] - logits[0.0])
        torch.testing.assert_close(logits[2.5], twice, atol=1e-4, rtol=0)
    with pytest.raises(QAdapterError, match=r"the dial scale scales .* use q-weight=0\.5"):
        load_policy(load_base(world.base, MODEL)[0], tmp_path / "saved", Dial("scale", 0.5))
    file = tmp_path / "saved" / GUIDE_FILE
    file.write_text(json.dumps({**json.loads(file.read_text()), "kind": "reward"}))
    with pytest.raises(QAdapterError, match=r"guide\.json cannot be read: .*expected 'value' or 'preference'"):
        load_policy(load_base(world.base, MODEL)[0], tmp_path / "saved")
    (tmp_path / "saved/value_head/value_head.safetensors").unlink()
    file.write_text(json.dumps({"format": 1, "kind": "value", "strength": 1, "top_k": 2}))
    with pytest.raises(QAdapterError, match=r"value_head\.safetensors cannot be read"):
        load_policy(load_base(world.base, MODEL)[0], tmp_path / "saved")


def test_its_lora_is_not_taken_for_the_policy(
    world: TinyToy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without its guide it is the value network: what loads Q-Adapters and plain adapters refuses it."""
    folder, plain = tmp_path / "guide", tmp_path / "plain"
    moved(load_base(world.base, MODEL)[0], Guide("value", 1.0, 9)).save_pretrained(folder)
    with pytest.raises(QAdapterError, match=r"guides the base's decoding \(guide\.json"):
        QAdapterForCausalLM.from_pretrained(folder, load_base(world.base, MODEL)[0])
    get_peft_model(load_base(world.base, MODEL)[0], lora()).save_pretrained(str(plain))
    policy = QAdapterForCausalLM.from_pretrained(plain, load_base(world.base, MODEL)[0])
    with pytest.raises(QAdapterError, match="guides the base's decoding"):
        policy.attach(folder, "guide")
    place = ["--base", str(world.base), "--output", str(tmp_path / "out")]
    for words in (
        ["export", str(folder), *place],
        ["score", "--adapter", str(plain), "--adapter", str(folder), *place, "--data", str(world.heldout)],
    ):
        assert main(words) == 2
        assert "guides the base's decoding" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_commands_use_its_guide(
    world: TinyToy, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replies, scores, chat and lm-eval's model are those of the policy that `load_policy` gives, its dial included."""
    folder, file = tmp_path / "guide", tmp_path / "out.jsonl"
    network, tokenizer = load_base(world.base, MODEL)
    moved(network, Guide("value", 2.0, 9)).save_pretrained(folder)
    policy = load_policy(load_base(world.base, MODEL)[0], folder, "q-weight=0.5")
    place = ["--adapter", str(folder), "--base", str(world.base)]
    turned = [*place, "--dial", "q-weight=0.5"]
    asked = [[{"role": "user", "content": "what is 2 plus 2 ?"}]]
    (reply,) = generate_replies(policy, tokenizer, asked, max_new_tokens=8, batch_size=1)
    with policy.disable_adapter():
        assert reply != generate_replies(policy, tokenizer, asked, max_new_tokens=8, batch_size=1)[0]
    said = ["--prompt", "what is 2 plus 2 ?", "--max-new-tokens", "8", "--output", str(file)]
    assert main(["generate", *turned, *said]) == 0
    assert rows(file)[0]["reply"] == reply
    file.unlink()
    capsys.readouterr()
    monkeypatch.setattr("sys.stdin", io.StringIO("/alpha0 1\nwhat is 2 plus 2 ?\n"))
    assert main(["chat", *turned, "--max-new-tokens", "8"]) == 0
    assert capsys.readouterr().out.splitlines() == ["only a Q-Adapter has an alpha; use /dial", reply]

    pairs = load_pairs(world.heldout)[:3]
    score = [*turned, "--data", str(world.heldout), *"--limit 3 --max-length 64 --answers 0".split()]
    assert main(["score", *score, "--output", str(file)]) == 0
    scores = score_pairs(policy, tokenizer, pairs, max_length=64, batch_size=8)
    assert [row["chosen_log_prob"] for row in rows(file)] == pytest.approx(scores.chosen, abs=1e-4)
    capsys.readouterr()

    model = PolicyLM(str(folder), base=str(world.base), dial="q-weight=0.5")
    asked_of = [Instance("loglikelihood", {}, ("what is", " 2 plus 2"), 0)]
    expected = PolicyLM(policy, tokenizer=tokenizer).loglikelihood(asked_of)
    assert model.loglikelihood(asked_of)[0] == pytest.approx(expected[0], abs=1e-4)

    for flags, why in (
        (["--dial", "scale=0.5"], "this adapter only guides the base's decoding; use q-weight=0.5"),
        (["--alpha-0", "1"], "is used alone, without --alpha-0"),
        (["--weights", "1"], "is used alone, without --weights"),
        (["--adapter", str(folder)], "is used alone, without a second --adapter"),
    ):
        assert main(["generate", *place, *flags, "--prompt", "a"]) == 2
        assert why in capsys.readouterr().err.splitlines()[-1]


def test_it_is_served_alone_and_runs_under_lm_eval(world: TinyToy, tmp_path: Path) -> None:
    """The served reply is the generated one, and lm-eval's likelihoods are those of the policy's logits."""
    network, tokenizer = load_base(world.base, MODEL)
    moved(network, Guide("value", 2.0, 9)).save_pretrained(tmp_path / "guide")
    served = ServedPolicies.load({"guide": tmp_path / "guide"}, world.base)
    generator = Generator(served)
    prompt = [{"role": "user", "content": "what is 2 plus 2 ?"}]
    ids = prompt_ids(tokenizer, prompt)  # type: ignore[arg-type]
    replies = {}
    for name in served.names:
        work = generator.submit([Turn(served.blend(name))], ids, Sampling(max_tokens=8, temperature=0))
        replies[name] = work.result()[0].text
    generator.close()
    policy = load_policy(load_base(world.base, MODEL)[0], tmp_path / "guide")
    same: dict[str, Any] = {"max_new_tokens": 8, "batch_size": 1}
    assert replies["guide"] == generate_replies(policy, tokenizer, [prompt], **same)[0]  # type: ignore[list-item]
    plain = load_base(world.base, MODEL)[0]
    assert replies["base"] == generate_replies(plain, tokenizer, [prompt], **same)[0]  # type: ignore[list-item]
    with pytest.raises(QAdapterError, match="it has no dials and is not mixed"):
        served.blend("guide", alpha_0=0.5)
    with pytest.raises(QAdapterError, match=r"shares no server with other adapters"):
        ServedPolicies.load({"guide": tmp_path / "guide", "other": tmp_path / "guide"}, world.base)

    model = PolicyLM(policy, tokenizer=tokenizer, batch_size=2)
    texts = [("what is 2", " plus 2"), ("how do you", " do")]
    requests = [Instance("loglikelihood", {}, text, 0) for text in texts]
    for (before, after), (found, _) in zip(texts, model.loglikelihood(requests), strict=True):
        start, whole = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (before, before + after))
        with torch.no_grad():
            log_probs = policy(input_ids=torch.tensor([whole])).logits[0, :-1].log_softmax(-1)
        expected = log_probs.gather(1, torch.tensor(whole)[1:, None])[len(start) - 1 :].sum()
        assert found == pytest.approx(float(expected), abs=1e-3)


# ---- what is learnt


def test_rollouts_are_the_bases_own(world: TinyToy) -> None:
    """Four sampled replies to each distinct prompt, as token ids, with the reward model's scores."""
    choice = VASSettings(rollouts=RolloutSettings(per_prompt=3))
    from qadapter.methods.vas import needs

    folder = world.needs(needs(choice))[ROLLOUTS]
    found = read_rows(folder, ROLLOUTS)
    _, tokenizer = load_base(world.base, MODEL)
    asked = {tuple(prompt_ids(tokenizer, one.prompt)) for one in load_pairs(world.pairs)}
    assert {tuple(row["prompt"]) for row in found} == asked
    assert len(found) == 3 * len(asked)
    assert len({tuple(row["reply"]) for row in found}) > len(asked)
    assert len({row["reward"] for row in found}) > 1
    assert read_json(folder / "metrics.json")["cost/generated_tokens"] == sum(len(row["reply"]) for row in found)


def test_branches_share_a_prefix_and_differ(world: TinyToy) -> None:
    from qadapter.methods.pita import needs

    folder = world.needs(needs(PITASettings(branches=RolloutSettings(per_prompt=2))))[BRANCHES]
    found = read_rows(folder, BRANCHES)
    assert found
    for one, other in zip(found[::2], found[1::2], strict=True):
        assert one["prompt"] == other["prompt"]
        assert one["reply"] != other["reply"]
        assert one["preferred"] + other["preferred"] == 1
        assert len(one["prompt"]) + max(len(one["reply"]), len(other["reply"])) <= TRAINING.max_length


def test_a_branch_begins_before_the_first_token(world: TinyToy) -> None:
    """With one cut per reply all continuations are whole replies to the training prompts."""
    from qadapter.methods.pita import needs

    folder = world.needs(needs(PITASettings(branches=RolloutSettings(per_prompt=1))))[BRANCHES]
    _, tokenizer = load_base(world.base, MODEL)
    asked = {tuple(prompt_ids(tokenizer, one.prompt)) for one in load_pairs(world.pairs)}
    found = read_rows(folder, BRANCHES)
    assert found
    assert {tuple(row["prompt"]) for row in found} <= asked


def test_a_continuation_ends_with_the_models_positions() -> None:
    """GPT-2 has learnt 256 of them and fails behind: rows of 250 and 240 tokens get 6 more, and alone 6 and 9."""
    model, tokenizer = tiny_model("gpt2"), byte_tokenizer()
    model.generation_config.eos_token_id = None
    rows = [[20 + i % 50 for i in range(length)] for length in (250, 240)]
    same: dict[str, Any] = {"max_new_tokens": 9, "temperature": 0.0, "seed": 0}
    assert [len(one) for one in continue_ids(model, tokenizer, rows, batch_size=2, **same)] == [6, 6]
    assert [len(one) for one in continue_ids(model, tokenizer, rows, batch_size=1, **same)] == [6, 9]


def test_rollouts_are_as_long_as_rejected_replies(world: TinyToy) -> None:
    """Here the rejected replies are longer than the chosen ones: none of the base's is cut where those are whole."""
    from qadapter.methods.vas import needs
    from qadapter.preferences.tokenize import encode_pairs

    _, tokenizer = load_base(world.base, MODEL)
    pairs = encode_pairs(load_pairs(world.pairs), tokenizer, TRAINING.max_length).pairs
    chosen, rejected = (
        max(len(ids(one)) for one in pairs) for ids in (lambda p: p.chosen_ids, lambda p: p.rejected_ids)
    )
    assert rejected > chosen
    found = read_rows(world.needs(needs(VASSettings(rollouts=RolloutSettings(per_prompt=3))))[ROLLOUTS], ROLLOUTS)
    assert chosen < max(len(row["reply"]) for row in found) <= rejected


def test_rewards_on_the_models_own_scale(world: TinyToy) -> None:
    """Standardised ones are (r − mean)/deviation of these; a label of PITA is drawn with σ of their difference."""
    reward = reward_model(RewardModelSettings())
    folder = world.needs((reward,))[reward.name]
    asked = [list(range(1, 9)), [5, 4, 3], [7] * 6]
    own = open_rewards(folder, world.base, MODEL, 2, standardised=False)(asked)
    scale = read_json(folder / "scale.json")
    expected = [(one - scale["mean"]) / scale["deviation"] for one in own]
    assert open_rewards(folder, world.base, MODEL, 2)(asked) == pytest.approx(expected, abs=1e-5)
    assert scale["deviation"] != pytest.approx(1.0, abs=1e-3)


def test_a_guides_dial_is_linear_in_its_logits(world: TinyToy) -> None:
    """Likelihoods at every weight from the passes at 0 and 1, and by forward passes with the dial at each."""
    policy = moved(load_base(world.base, MODEL)[0], Guide("preference", 4.0, 20))
    texts = [((1, 7, 9), (4, 3, 8)), ((2, 5), (6,))]
    weights = (0.0, 0.25, 1.0)
    sums, _ = log_likelihoods(policy, texts, weights, pad=0, batch_size=2)
    for row, (prompt, rest) in enumerate(texts):
        for column, weight in enumerate(weights):
            with torch.no_grad():
                logits = policy(torch.tensor([[*prompt, *rest]]), dial=Dial("q-weight", weight)).logits[0]
            scores = logits.log_softmax(-1)[len(prompt) - 1 : -1]
            expected = sum(float(scores[place, token]) for place, token in enumerate(rest))
            assert sums[row, column] == pytest.approx(expected, abs=1e-4)
    assert abs(sums[0, 0] - sums[0, 2]) > 1e-3, "the guide moves something"
    assert policy.dial.as_trained
    assert policy.generate(torch.tensor([[1, 7, 9]]), max_new_tokens=2, dial=Dial("q-weight", 0.0)).shape == (1, 5)
    assert policy.weight == 1.0


def test_a_saved_dial_is_read(world: TinyToy, tmp_path: Path) -> None:
    """`qadapter dial --save` writes it; a scale is refused, for the adapter is not the policy itself."""
    moved(load_base(world.base, MODEL)[0], Guide("value", 2.0, 20)).save_pretrained(tmp_path)
    assert load_policy(load_base(world.base, MODEL)[0], tmp_path).weight == 1.0
    write_dial(tmp_path, Dial("q-weight", 0.25))
    assert load_policy(load_base(world.base, MODEL)[0], tmp_path).weight == 0.25
    assert load_policy(load_base(world.base, MODEL)[0], tmp_path, Dial("q-weight", 1.0)).weight == 1.0
    write_dial(tmp_path, Dial("scale", 0.5))
    with pytest.raises(QAdapterError, match=r"use q-weight=0\.5"):
        load_policy(load_base(world.base, MODEL)[0], tmp_path)


@pytest.mark.slow
def test_vas_fits_the_rewards(world: TinyToy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rewards of 1 and 1.5, which the first token of the reply decides: only the state before it stays unsure."""

    def decided(folder: Path, name: str) -> list[dict[str, Any]]:
        return [{**row, "reward": 1 + row["reply"][0] % 2 / 2} for row in read_rows(folder, name)]

    monkeypatch.setattr("qadapter.methods.vas.read_rows", decided)
    training = TRAINING.model_copy(update={"max_steps": 40, "learning_rate": 3e-2, "save_steps": None})
    out = world.train("vas", tmp_path / "out", choice=VASSettings(trace=1.0), lora=NO_DROPOUT, training=training)
    losses = [row["train/loss"] for row in rows(out / "history.jsonl")]
    assert sum(losses[-5:]) < 0.2 * sum(losses[:5])
    _, tokenizer = load_base(world.base, MODEL)
    conversations = [(one.prompt, one.chosen) for one in load_pairs(world.heldout)[:4]]
    policy = load_policy(load_base(world.base, MODEL)[0], out / "adapter")
    distance = kl_per_token(None, policy, tokenizer, conversations, max_length=64, batch_size=2).per_token
    assert distance > 1e-4


def test_pita_starts_at_log_2(world: TinyToy, tmp_path: Path) -> None:
    """A head of 0 says that both continuations are as likely to be preferred."""
    out = world.train("pita", tmp_path / "out", lora=NO_DROPOUT)
    history = rows(out / "history.jsonl")
    assert history[0]["train/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert history[-1]["train/loss"] != pytest.approx(math.log(2), abs=1e-4)
