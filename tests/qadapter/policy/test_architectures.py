"""One contract over every architecture: a policy on it trains, generates, is saved, and off it is its base."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, PreTrainedModel

from qadapter.errors import QAdapterError
from qadapter.evaluation.lm_eval.model import PolicyLM
from qadapter.policy import pair_passes
from qadapter.policy.architectures import REFUSED, refuse_architecture
from qadapter.policy.model import QAdapterForCausalLM
from qadapter.policy.objective import Objective
from qadapter.policy.positions import position_limit
from qadapter.policy.probe import refuse_misbehaviour, refuse_other_base, refuse_wrong_start
from tests.qadapter.policy.test_pair_passes import batch_of
from tests.support.tiny_architectures import ARCHITECTURES, CONFIGS, tiny_architecture
from tests.support.tiny_chat import byte_tokenizer
from tests.support.tiny_models import VOCABULARY, lora, moved

NEW = 5  # four of them with a cache
TOKENIZER = byte_tokenizer()
DOCS = Path(__file__).parents[3] / "docs" / "architectures.md"


@pytest.fixture(autouse=True, scope="module")
def few_threads() -> Iterator[None]:
    """Tiny matrices: more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tokens(rows: int = 3, length: int = 12, seed: int = 0) -> Tensor:
    return torch.randint(6, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def generate(model: PreTrainedModel, ids: Tensor, **options: object) -> Tensor:
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(input_ids=ids, attention_mask=(ids != 0).long(), **{**settings, **options})  # type: ignore[operator]


def same(ours: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    """Equal but for rounding, in units of the logits' spread."""
    torch.testing.assert_close(ours, expected, atol=tolerance * (1 + expected.std().item()), rtol=0)


def identity(base: PreTrainedModel) -> QAdapterForCausalLM:
    """Before training the residual policy is the base, and its first loss is ln 2, with dropout on."""
    ids = tokens()
    with torch.no_grad():
        expected = base(input_ids=ids).logits.log_softmax(-1)
        torch.manual_seed(3)
        policy = QAdapterForCausalLM.from_base(base, lora(dropout=0.1), Objective.preset("residual", beta=0.0))
        same(policy.eval()(input_ids=ids).logits.log_softmax(-1), expected)
    policy.train()
    losses = []
    for implementation in ("fused", "readable"):
        policy.loss_implementation = implementation  # type: ignore[assignment]
        losses.append(policy(**batch_of(2)).loss.item())
    assert losses == pytest.approx([math.log(2)] * 2, abs=1e-4)
    return policy.eval()


def off_is_the_base(policy: QAdapterForCausalLM, base: PreTrainedModel) -> None:
    """For any trained adapter; cached, uncached and with beams the text is that of the base's own generate."""
    ids = tokens()
    with torch.no_grad():
        expected = base(input_ids=ids).logits
        gap = (policy(input_ids=ids).logits.log_softmax(-1) - expected.log_softmax(-1)).abs().max()
        assert gap > 0.05  # so that the rest shows something
        with policy.disable_adapter():
            same(policy(input_ids=ids).logits, expected, 1e-5)
            own = generate(base, ids)
            assert torch.equal(generate(policy, ids), own)
            assert torch.equal(generate(policy, ids, use_cache=False), own)
            # RecurrentGemma and MiniMax do not reorder their own caches: without one their beams are right
            cached = policy._passes.cache_name is not None
            own = generate(base, ids, num_beams=3, use_cache=cached)
            assert torch.equal(generate(policy, ids, num_beams=3), own)


def cached_is_uncached(policy: QAdapterForCausalLM) -> None:
    """One pass for all rows is one for each; with a cache, with beams and with padding the text is the same."""
    ids = tokens()
    with torch.no_grad():
        together = policy(input_ids=ids).logits
    same(together, policy(input_ids=ids).logits.detach())
    assert torch.equal(generate(policy, ids), generate(policy, ids, use_cache=False))
    assert torch.equal(generate(policy, ids, num_beams=3), generate(policy, ids, num_beams=3, use_cache=False))
    long, short = tokens(1, 12), tokens(1, 7, seed=1)
    padded = torch.cat([long, torch.cat([torch.zeros(1, 5, dtype=torch.long), short], 1)])
    both = generate(policy, padded)
    assert torch.equal(both[:1], generate(policy, long))
    assert torch.equal(both[1:, 5:], generate(policy, short))


def trains(policy: QAdapterForCausalLM) -> None:
    """Three steps on three pairs lower their loss, and the base's rows never draw at random."""
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=3e-3)
    batch, losses = batch_of(3), []
    policy.train()
    first, second = (policy.q_and_base_logits(batch["input_ids"])[1] for _ in range(2))
    assert torch.equal(first, second)
    policy.eval()  # the losses are compared without the adapter's own dropout
    for _ in range(4):
        loss = policy(**batch).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[3] < losses[0], losses


def scores_as_hf(policy: QAdapterForCausalLM) -> None:
    """With α0 = α̃ = 1 the residual policy is the adapted model, which lm-eval's `hf` scores."""
    policy.config.alpha_0 = 1.0
    asked = [("Hello", " you"), ("What is", "?")]
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in asked]
    ours = PolicyLM(policy, tokenizer=TOKENIZER, batch_size=2).loglikelihood(requests)
    model = HFLM(pretrained=policy.peft_model, tokenizer=TOKENIZER, batch_size=2, backend="causal")
    theirs = model.loglikelihood(requests, disable_tqdm=True)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    assert [value for value, _ in ours] == pytest.approx([value for value, _ in theirs], abs=1e-3)


def is_saved(policy: QAdapterForCausalLM, base: PreTrainedModel, folder: Path) -> None:
    """And loaded onto the base again, whose adapter off is measured then."""
    ids = tokens()
    policy.save_pretrained(folder)
    loaded = QAdapterForCausalLM.from_pretrained(folder, base_model=base)
    with torch.no_grad():
        same(loaded(input_ids=ids).logits, policy(input_ids=ids).logits, 2e-5)


EVERY_KIND = {"llama", "gpt2", "mixtral", "mamba", "jamba"}
"""An attention of each kind of position, experts, a recurrence, and a mixture of them: what `make test-quick` runs."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "architecture",
    [pytest.param(name, marks=() if name in EVERY_KIND else pytest.mark.slow) for name in ARCHITECTURES],
)
def test_the_contract_holds(architecture: str, tmp_path: Path):
    policy = moved(identity(tiny_architecture(architecture)))
    policy.config.alpha_0 = 0.7
    base = tiny_architecture(architecture)
    off_is_the_base(policy, base)
    cached_is_uncached(policy)
    trains(policy)
    scores_as_hf(policy)
    is_saved(policy, base, tmp_path)


def test_the_documentation_lists_every_architecture():
    text = DOCS.read_text(encoding="utf-8")
    assert len(ARCHITECTURES) >= 35
    assert [name for name in (*ARCHITECTURES, *REFUSED) if f"`{name}`" not in text] == []
    assert f"{len(ARCHITECTURES)} architectures" in text


@pytest.mark.parametrize("architecture", ["opt", "xglm", "biogpt", "falcon", "gpt_neo", "mixtral"])
def test_gradient_checkpointing_wakes_no_dropout(architecture: str):
    """Layers recompute in train mode only; their functional dropout must stay off, and be theirs again afterwards."""
    torch.manual_seed(3)
    base = tiny_architecture(architecture)
    before = {f"{n}.{k}": v for n, m in base.named_modules() for k, v in vars(m).items() if isinstance(v, float)}
    policy = QAdapterForCausalLM.from_base(base, lora(), Objective.preset("residual"))
    plain = policy.train().q_and_base_logits(tokens())[0].detach()
    policy.gradient_checkpointing_enable({"use_reentrant": False})
    policy.train()
    q_logits, base_logits = policy.q_and_base_logits(tokens())
    same(q_logits.detach(), plain)
    same(base_logits, plain)
    q_logits.square().mean().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in policy.parameters())
    policy.eval()
    own = policy.peft_model.get_base_model()
    after = {f"{n}.{k}": v for n, m in own.named_modules() for k, v in vars(m).items() if isinstance(v, float)}
    assert {name: after[name] for name in before if name in after} == {n: v for n, v in before.items() if n in after}


def test_what_is_refused_and_why():
    for kind, reason in REFUSED.items():
        with pytest.raises(QAdapterError, match=reason[:30]):
            refuse_architecture(AutoConfig.for_model(kind), "this")
    with pytest.raises(QAdapterError, match="is an encoder: each position sees later ones"):
        refuse_architecture(BertConfig(), "this")
    with pytest.raises(QAdapterError, match="encoder-decoder"):
        refuse_architecture(AutoConfig.for_model("t5"), "this")
    with pytest.raises(QAdapterError, match="is no causal language model"):
        refuse_architecture(AutoConfig.for_model("vit"), "this")


def test_a_model_that_sees_later_tokens_is_noticed():
    size = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = BertConfig(**size, intermediate_size=48, initializer_range=0.2)
    with pytest.raises(QAdapterError, match="a later token changes what it says earlier"):
        refuse_misbehaviour(AutoModelForCausalLM.from_config(config).eval(), "this")
    causal = AutoModelForCausalLM.from_config(BertConfig(**{**config.to_dict(), "is_decoder": True})).eval()
    refuse_misbehaviour(causal, "this")


def test_a_random_or_broken_base_is_noticed():
    noisy = tiny_architecture("llama")
    noisy.model.norm.register_forward_hook(lambda _module, _args, output: output + torch.randn_like(output))
    with pytest.raises(QAdapterError, match="other logits each time"):
        refuse_misbehaviour(noisy, "this")
    broken = tiny_architecture("llama")
    broken.model.norm.weight.data[0] = torch.nan
    with pytest.raises(QAdapterError, match="NaN or infinite logits"):
        refuse_misbehaviour(broken, "this")


def test_an_adapter_that_moves_the_base_is_measured():
    policy = QAdapterForCausalLM.from_base(tiny_architecture("llama"), lora(), Objective.preset("residual"))
    expected = tiny_architecture("llama")(input_ids=torch.zeros(2, 6, dtype=torch.long)).logits.detach()
    with pytest.raises(QAdapterError, match=r"switched off, its logits differ by"):
        refuse_other_base(policy, expected + 0.1)
    refuse_wrong_start(policy, fresh=True)
    with pytest.raises(QAdapterError, match="before it has learnt anything"):
        refuse_wrong_start(moved(policy), fresh=True)
    refuse_wrong_start(policy, fresh=False)


@pytest.mark.parametrize(
    ("rope", "limit"),
    [
        ({"rope_type": "default"}, 64),
        ({"rope_type": "linear", "factor": 4.0}, 256),
        ({"rope_type": "dynamic", "factor": 4.0}, 256),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, 64),
        ({"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}, 512),
    ],
    ids=str,
)
def test_a_stretched_rope_reads_further(rope: dict[str, object], limit: int):
    config = AutoConfig.for_model("llama", max_position_embeddings=64, rope_parameters={"rope_theta": 10000.0, **rope})
    assert position_limit(config) == limit


ROPES: dict[str, dict[str, object]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0},
    "llama3": {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "longrope": {"rope_type": "longrope", "factor": 4.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ROPES)
def test_texts_beyond_the_length_that_a_rope_was_trained_on(kind: str, monkeypatch: pytest.MonkeyPatch):
    """Some ropes turn by the length of the whole text: then no prompt is encoded on its own for a longer sequence."""
    monkeypatch.setattr(pair_passes, "_WORK_TO_SPARE", {"cuda": 0.0})
    rope = {**ROPES[kind], "rope_theta": 10000.0, "original_max_position_embeddings": 8}
    phi3 = kind == "longrope"  # which starts its cache anew where the factors change
    further = {"original_max_position_embeddings": 8} if phi3 else {}
    config = {**CONFIGS["phi3" if phi3 else "llama"], "max_position_embeddings": 32, "rope_parameters": rope, **further}

    def made() -> PreTrainedModel:
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model("phi3" if phi3 else "llama", **config)).eval()

    ids = tokens(length=7)  # and 12 with what is generated
    policy, base = moved(identity(made())), made()
    policy.config.alpha_0 = 0.7
    with torch.no_grad(), policy.disable_adapter():
        same(policy(input_ids=ids).logits, base(input_ids=ids).logits, 1e-5)
        for cached in (True, False):
            assert torch.equal(generate(policy, ids, use_cache=cached), generate(base, ids, use_cache=cached))
    losses = []
    for implementation in ("fused", "readable"):
        policy.loss_implementation = implementation  # type: ignore[assignment]
        losses.append(policy(**batch_of(2)).loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    passes = policy._pair_passes
    assert passes is not None
    assert passes.share_prompts == (kind not in ("dynamic", "longrope"))
    trains(policy)


def test_models_without_positions_have_no_limit():
    assert position_limit(AutoConfig.for_model("mamba")) is None
    assert position_limit(AutoConfig.for_model("gpt2", n_positions=77)) == 77


def test_experts_can_be_adapted_by_their_parameters():
    """Of a mixture of experts `all-linear` is the attention; `target_parameters` reaches the experts."""
    base = tiny_architecture("mixtral")
    policy = QAdapterForCausalLM.from_base(base, lora(dropout=0.1), Objective.preset("residual"))
    adapted = {name.split(".lora_")[0] for name, _ in policy.named_parameters() if "lora_" in name}
    assert len(adapted) == 8  # q, k, v, o of two layers
    config = lora(target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    experts = moved(QAdapterForCausalLM.from_base(tiny_architecture("mixtral"), config, Objective.preset("residual")))
    off_is_the_base(experts.eval(), tiny_architecture("mixtral"))
    trains(experts)
    with pytest.raises(QAdapterError, match=r"without dropout only\. Set lora_dropout to 0"):
        QAdapterForCausalLM.from_base(
            tiny_architecture("mixtral"),
            lora(dropout=0.1, target_modules=[], target_parameters=["experts.down_proj"]),
            Objective.preset("residual"),
        )
