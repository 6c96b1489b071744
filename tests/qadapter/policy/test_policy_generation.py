"""Generation: greedy against scored logits, with and without cache, padding, beams, sampling, streams, stops."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from qadapter.errors import QAdapterError
from qadapter.inference.generate import generate_replies
from qadapter.policy import model as policy_module
from qadapter.policy.dial import AS_TRAINED, Dial
from qadapter.policy.model import QAdapterForCausalLM
from qadapter.policy.objective import Objective
from tests.qadapter.policy.test_policy import ABSOLUTE, RESIDUAL, make_policy, rows_computed, tokens, two_adapters
from tests.support.tiny_chat import byte_tokenizer
from tests.support.tiny_models import ARCHITECTURES, VOCABULARY, lora, tiny_model

NEW = 12


def generate(policy: QAdapterForCausalLM, ids: Tensor, **options: object) -> Tensor:
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return policy.generate(input_ids=ids, attention_mask=(ids != 0).long(), **{**settings, **options})


def greedy_by_scoring(policy: QAdapterForCausalLM, ids: Tensor, **dials: float) -> Tensor:
    """The definition of greedy decoding: score the whole sequence anew for every token."""
    with torch.no_grad():
        for _ in range(NEW):
            best = policy(input_ids=ids, **dials).logits[:, -1].argmax(-1)
            ids = torch.cat([ids, best[:, None]], dim=1)
    return ids


@pytest.mark.slow
@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_is_the_scored_logits_argmax(architecture: str, cached: bool):
    policy, ids = make_policy(architecture), tokens()
    assert torch.equal(generate(policy, ids, use_cache=cached), greedy_by_scoring(policy, ids))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_cached_step_has_the_logits_of_a_whole_pass(architecture: str):
    policy, ids = make_policy(architecture, RESIDUAL), tokens()
    with torch.no_grad():
        whole = policy(input_ids=ids).logits
        first = policy(input_ids=ids[:, :9], use_cache=True)
        rest = policy(input_ids=ids[:, 9:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), whole, atol=5e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_left_padding_changes_nothing(architecture: str):
    policy = make_policy(architecture)
    long, short = tokens(1, 12), tokens(1, 7, seed=1)
    padded = torch.cat([long, torch.cat([torch.zeros(1, 5, dtype=torch.long), short], 1)])
    together = generate(policy, padded)
    assert torch.equal(together[:1], generate(policy, long))
    assert torch.equal(together[1:, 5:], generate(policy, short))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_beam_search_is_the_same_with_and_without_cache(architecture: str):
    policy, ids = make_policy(architecture), tokens()
    options = {"num_beams": 4, "num_return_sequences": 3, "return_dict_in_generate": True, "output_scores": True}
    cached, uncached = (generate(policy, ids, use_cache=c, **options) for c in (True, False))
    assert cached.sequences.shape == (9, 12 + NEW)
    assert torch.equal(cached.sequences, uncached.sequences)
    torch.testing.assert_close(cached.sequences_scores, uncached.sequences_scores, atol=1e-4, rtol=1e-4)
    # a score is the mean log-probability of the beam's tokens under the policy
    with torch.no_grad():
        logprobs = policy(input_ids=cached.sequences).logits.log_softmax(-1)[:, 11:-1]
    chosen = logprobs.gather(-1, cached.sequences[:, 12:, None])[..., 0]
    torch.testing.assert_close(chosen.mean(1), cached.sequences_scores, atol=1e-4, rtol=1e-4)
    assert (cached.sequences_scores.reshape(3, 3).diff(dim=1) <= 0).all()


def test_beams_really_reorder_the_cache(monkeypatch: pytest.MonkeyPatch):
    """Some beam must go on from another beam's cache, else the test above shows nothing."""
    policy, ids = make_policy(), tokens()
    orders = []
    reorder = policy_module.reorder_rows
    monkeypatch.setattr(
        policy_module, "reorder_rows", lambda cache, index: (orders.append(index.tolist()), reorder(cache, index))
    )
    generate(policy, ids, num_beams=4)
    assert any(order != sorted(order) or len(set(order)) < len(order) for order in orders)


@pytest.mark.slow
def test_sampling_is_seeded_and_follows_the_policy():
    policy, ids = make_policy(), tokens(1)
    torch.manual_seed(0)
    first = generate(policy, ids, do_sample=True, num_return_sequences=4)
    torch.manual_seed(0)
    assert torch.equal(first, generate(policy, ids, do_sample=True, num_return_sequences=4))
    assert first.shape == (4, 12 + NEW)
    assert len({tuple(row) for row in first.tolist()}) > 1
    torch.manual_seed(1)
    drawn = generate(policy, ids, do_sample=True, top_k=0, num_return_sequences=4000, max_new_tokens=1)[:, -1]
    with torch.no_grad():
        probability = policy(input_ids=ids).logits[0, -1].softmax(-1)
    frequency = torch.bincount(drawn, minlength=VOCABULARY) / 4000
    assert (frequency - probability).abs().max() < 0.03  # four standard deviations at p = 0.5


def test_the_dials_reach_generation():
    policy, ids = make_policy(), tokens()
    dials = {"alpha_0": 30.0, "alpha_tilde": 30.0}
    expected = greedy_by_scoring(policy, ids, **dials)
    assert torch.equal(generate(policy, ids, **dials), expected)
    policy.config.alpha_0, policy.config.alpha_tilde = 30.0, 30.0
    assert torch.equal(generate(policy, ids), expected)
    policy.config.alpha_0, policy.config.alpha_tilde = 0.3, 0.8
    assert not torch.equal(generate(policy, ids), expected)


@pytest.mark.parametrize("dials", [{"dial": "q-weight=0.3"}, {"dial": "scale=0.5"}, {"alpha_0": 2.0}], ids=str)
def test_a_calls_dials_hold_however_it_decodes(dials: dict[str, Any]):
    policy, assistant, ids = make_policy(), tiny_model(), tokens(1)
    guided, assisted = generate(policy, ids, guidance_scale=2.0, **dials), generate(policy, ids, **dials)
    assert torch.equal(generate(policy, ids, assistant_model=assistant, **dials), assisted)
    assert (policy.dial, policy.config.alpha_0) == (AS_TRAINED, ABSOLUTE.alpha_0)
    policy.dial = Dial.of(dials.get("dial")) or AS_TRAINED
    policy.config.alpha_0 = dials.get("alpha_0", ABSOLUTE.alpha_0)
    assert torch.equal(generate(policy, ids, guidance_scale=2.0), guided)


@pytest.mark.parametrize("beams", [1, 3])
def test_residual_with_alpha_0_of_1_needs_only_the_adapted_row(beams: int):
    policy, ids = make_policy(objective=Objective.preset("residual")), tokens()
    seen = rows_computed(policy)
    alone = generate(policy, ids, num_beams=beams)
    assert set(seen) == {3 * beams} or set(seen) == {3, 3 * beams}
    seen.clear()
    both = generate(policy, ids, num_beams=beams, alpha_0=1.0 + 1e-6)
    assert set(seen) <= {6, 6 * beams}
    assert torch.equal(alone, both)


def test_disabled_generates_as_the_base():
    from tests.support.tiny_models import tiny_model

    policy, ids = make_policy(), tokens()
    expected = generate(tiny_model(), ids)  # type: ignore[arg-type]
    with policy.disable_adapter():
        assert torch.equal(generate(policy, ids), expected)
        assert torch.equal(generate(policy, ids, num_beams=3), generate(tiny_model(), ids, num_beams=3))  # type: ignore[arg-type]
    assert not torch.equal(generate(policy, ids), expected)


@pytest.mark.slow
def test_several_adapters_generate_and_beam(tmp_path: Path):
    policy, _, _, ids = two_adapters(tmp_path, RESIDUAL)
    policy.set_adapter_weights({"default": 0.6, "second": 0.8})
    assert torch.equal(generate(policy, ids), greedy_by_scoring(policy, ids))
    beams = [generate(policy, ids, num_beams=3, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*beams)
    policy.set_adapter_weights({"second": 1.0})
    assert torch.equal(generate(policy, ids), greedy_by_scoring(policy, ids))


@pytest.mark.slow
@pytest.mark.parametrize("beams", [1, 3])
def test_two_passes_generate_with_a_cache_each(beams: int):
    """DoRA's layers cannot tell rows apart."""
    policy, ids = make_policy(use_dora=True), tokens()
    cached = generate(policy, ids, num_beams=beams)
    assert torch.equal(cached, generate(policy, ids, num_beams=beams, use_cache=False))
    if beams == 1:
        assert torch.equal(cached, greedy_by_scoring(policy, ids))


class Collect(BaseStreamer):
    def __init__(self) -> None:
        self.pieces: list[Tensor] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.pieces.append(value.flatten())

    def end(self) -> None:
        self.ended = True


def test_streaming_hands_out_every_token():
    policy, ids, streamer = make_policy(), tokens(1), Collect()
    whole = generate(policy, ids, streamer=streamer)
    assert torch.equal(torch.cat(streamer.pieces), whole[0])
    assert len(streamer.pieces) == 1 + NEW
    assert streamer.ended


def test_stop_strings_and_end_tokens_stop():
    policy, ids, tokenizer = make_policy(), tokens(1), byte_tokenizer()
    whole = generate(policy, ids, max_new_tokens=40)
    new = whole[0, 12:].tolist()
    # a printable character that comes neither first nor last
    at = next(i for i in range(2, 38) if tokenizer.decode([new[i]]).isalnum() and new[i] not in new[:i])
    stopped = generate(policy, ids, max_new_tokens=40, stop_strings=[tokenizer.decode([new[at]])], tokenizer=tokenizer)
    ended = generate(policy, ids, max_new_tokens=40, eos_token_id=new[at])
    for sequence in (stopped, ended):
        assert sequence[0].tolist() == whole[0, : 12 + at + 1].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["static", "dynamic"])
def test_other_caches(implementation: str):
    policy, ids = make_policy(), tokens()
    assert torch.equal(generate(policy, ids, cache_implementation=implementation), generate(policy, ids))
    assert torch.equal(
        generate(policy, ids, cache_implementation=implementation, num_beams=3), generate(policy, ids, num_beams=3)
    )


@torch.no_grad()
def test_a_prompts_cache_is_of_its_adapters_and_scale():
    policy = make_policy(objective=Objective.preset("residual"))
    ids, prompt = tokens(2, 9), tokens(2, 9)[:, :-1]
    expected = generate(policy, ids)
    filled = policy(input_ids=prompt, use_cache=True, up_to_constant=True).past_key_values
    assert torch.equal(generate(policy, ids, past_key_values=copy.deepcopy(filled)), expected)
    with_base = policy(input_ids=prompt[:1], use_cache=True).past_key_values
    with pytest.raises(QAdapterError, match=r"holds the states of default, __base__ at scale 1, .* those of default"):
        generate(policy, ids, past_key_values=with_base)  # two rows of a cache for two sequences
    with pytest.raises(QAdapterError, match=r"those of default, __base__ at scale 0\.5"):
        policy(input_ids=ids[:, -1:], past_key_values=copy.deepcopy(filled), dial="scale=0.5")
    with torch.enable_grad():  # takes a pass for each, with a cache of its own
        apart = policy(input_ids=prompt, use_cache=True).past_key_values
    assert torch.equal(generate(policy, ids, past_key_values=apart), expected)
    static = {"cache_implementation": "static"}  # is emptied and used again
    generate(policy, ids, **static, dial="scale=0.5")
    assert torch.equal(generate(policy, ids, **static), expected)


def test_asking_an_adapter_leaves_its_bases_own_settings():
    base = tiny_model()
    base.generation_config.eos_token_id, base.generation_config.repetition_penalty = [2, 7], 1.3
    adapter = get_peft_model(base, lora()).eval()
    prompt = [{"role": "user", "content": "why?"}]
    generate_replies(adapter, byte_tokenizer(), [prompt], max_new_tokens=2, batch_size=1)
    for own in (base.generation_config, QAdapterForCausalLM.around(adapter).generation_config):
        assert (own.eos_token_id, own.repetition_penalty) == ([2, 7], 1.3)


def test_assisted_decoding_gives_the_same_text():
    policy, ids = make_policy(), tokens(1)
    draft = make_policy(objective=ABSOLUTE)
    assert torch.equal(generate(policy, ids, assistant_model=draft), generate(policy, ids))


def test_dials_out_of_range_are_refused_in_generation():
    with pytest.raises(QAdapterError, match="expected at least 0 and above 0"):
        generate(make_policy(), tokens(), alpha_tilde=-1.0)


def test_typing_errors_in_arguments_are_caught():
    with pytest.raises(ValueError, match="alpha0"):
        generate(make_policy(), tokens(), alpha0=1.0)
