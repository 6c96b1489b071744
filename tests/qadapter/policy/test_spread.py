"""A base that `device_map` spreads: the same scores and answers, of a part that lies on the disk too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qadapter.evaluation.preference import score_pairs
from qadapter.inference.generate import generate_replies
from qadapter.inference.score import device_of
from qadapter.policy import loading
from qadapter.policy.base import load_network
from qadapter.policy.loading import load_base
from qadapter.preferences.pair import load_pairs
from tests.support.tiny_toy import MODEL, TinyToy, make_tiny_toy


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> TinyToy:
    return make_tiny_toy(tmp_path_factory.mktemp("spread"), steps=20)


def test_a_spread_base_scores_and_answers_the_same(
    toy: TinyToy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, tokenizer = load_base(toy.base, MODEL)
    auto, _ = load_base(toy.base, MODEL.model_copy(update={"device_map": "auto"}))
    places = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    parts = load_network(toy.base, dtype="float32", device_map={**places, "lm_head": "cpu"}, offload_folder=tmp_path)
    assert any(parameter.device.type == "meta" for parameter in parts.parameters())
    assert device_of(parts) == torch.device("cpu")
    pairs = load_pairs(toy.heldout)
    prompts = [pair.prompt for pair in pairs[:4]]
    expected = score_pairs(whole, tokenizer, pairs, max_length=64, batch_size=4)
    said = generate_replies(whole, tokenizer, prompts, max_new_tokens=6, batch_size=2)
    for network in (auto, parts):
        found = score_pairs(network, tokenizer, pairs, max_length=64, batch_size=4)
        assert found.chosen.tolist() == expected.chosen.tolist()
        assert found.rejected.tolist() == expected.rejected.tolist()
        assert generate_replies(network, tokenizer, prompts, max_new_tokens=6, batch_size=2) == said
    spread = MODEL.model_copy(update={"device_map": "auto"})
    assert loading._place(spread) == "auto"
    monkeypatch.setenv("WORLD_SIZE", "2")  # a launched training splits the base by its own config
    assert loading._place(spread) is None
