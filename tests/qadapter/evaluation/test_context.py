"""lm-eval's context: a stretched rope counts with its factor, and a window is no limit."""

from __future__ import annotations

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from qadapter.errors import QAdapterError
from qadapter.evaluation.lm_eval.model import PolicyLM
from tests.support.tiny_chat import byte_tokenizer
from tests.support.tiny_models import VOCABULARY, tiny_model

TOKENIZER = byte_tokenizer()
LONG = "abcdefgh" * 12  # 96 tokens


def score(model: object, context: str, answer: str) -> float:
    request = Instance("loglikelihood", {}, (context, answer), 0)
    return float(PolicyLM(model, tokenizer=TOKENIZER).loglikelihood([request])[0][0])


def direct(model: torch.nn.Module, context: str, answer: str) -> float:
    """Σ log π of the answer's tokens, by one forward pass over everything."""
    before, whole = (TOKENIZER(text, add_special_tokens=False)["input_ids"] for text in (context, context + answer))
    with torch.no_grad():  # a dynamic rope depends on the length, and the last token is not read
        found = model(torch.tensor([whole[:-1]])).logits[0].float().log_softmax(-1)
    return sum(float(found[at - 1, whole[at]]) for at in range(len(before), len(whole)))


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn"])
def test_a_stretched_rope_is_read_to_its_end(kind: str):
    rope = {"rope_type": kind, "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64}
    model = tiny_model(max_position_embeddings=64, rope_parameters=rope)
    assert HFLM(pretrained=model, tokenizer=TOKENIZER, backend="causal").max_length == 64
    assert PolicyLM(model, tokenizer=TOKENIZER).max_length == 256
    assert score(model, LONG, "xyz") == pytest.approx(direct(model, LONG, "xyz"), abs=1e-3)
    cut = direct(model, LONG[-61:], "xyz")
    assert abs(score(model, LONG, "xyz") - cut) > 1e-3
    with pytest.raises(QAdapterError, match="max_length is 300, but the model knows only 256 positions"):
        PolicyLM(model, tokenizer=TOKENIZER, max_length=300)
    assert PolicyLM(model, tokenizer=TOKENIZER, max_length=100).max_length == 100


@pytest.mark.parametrize("architecture", ["mistral", "gemma2"])
def test_a_sliding_window_is_no_limit(architecture: str):
    model = tiny_model(architecture)  # a window of 8
    assert PolicyLM(model, tokenizer=TOKENIZER).max_length == 256
    assert score(model, LONG, "xyz") == pytest.approx(direct(model, LONG, "xyz"), abs=1e-3)


def test_texts_that_the_model_cannot_read_are_named():
    """A token beyond the embeddings, and half a surrogate pair: `hf` ends in the libraries' own errors."""
    tokenizer, model = byte_tokenizer(), tiny_model()
    tokenizer.add_tokens(["<extra>"])
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    lm = PolicyLM(model, tokenizer=tokenizer, batch_size=2)
    assert lm.tokenizer.pad_token_id < VOCABULARY  # rows of unequal length can be padded
    read = [Instance("loglikelihood", {}, pair, 0) for pair in (("a", "b"), ("a longer one", "c"))]
    ours, plain = lm.loglikelihood(read), PolicyLM(model, tokenizer=TOKENIZER, batch_size=2).loglikelihood(read)
    assert ours == plain
    sampled = {"max_gen_toks": 2, "until": ["\n"]}
    for text, reason in (("<extra> a", f"token id {VOCABULARY} of the text '"), ("\ud800", "cannot read the text")):
        asked = [
            Instance("loglikelihood", {}, (text, "b"), 0),
            Instance("loglikelihood", {}, ("a", text), 0),
            Instance("loglikelihood_rolling", {}, (text,), 0),
            Instance("generate_until", {}, (text, sampled), 0),
        ]
        for request in asked:
            with pytest.raises(QAdapterError, match=reason):
                getattr(lm, request.request_type)([request])
