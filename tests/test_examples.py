"""The scripts of `examples/`, run as a reader would."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PhiConfig, PhiForCausalLM, PreTrainedTokenizerFast

import qadapter
from qadapter.policy.base import load_network, load_tokenizer
from qadapter.preferences.render import TurnEnd, turn_end
from qadapter.report.build import build_report
from qadapter.report.rows import Row
from tests.support.paths import PROJECT_ROOT
from tests.support.tiny_chat import byte_tokenizer, tiny_llama

EXAMPLES = PROJECT_ROOT / "examples"


def example(name: str, *arguments: str) -> None:
    runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](list(arguments))


def test_there_are_four_and_each_is_run_here() -> None:
    names = {file.stem for file in EXAMPLES.glob("*.py")}
    assert names == {"own_pairs", "one_adapter", "read_report", "trim_vocabulary"}
    here = Path(__file__).read_text(encoding="utf-8")
    assert all(f'example("{name}"' in here for name in names)


@pytest.mark.slow
def test_own_pairs_then_one_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, out, file = tmp_path / "base", tmp_path / "out", tmp_path / "pairs.jsonl"
    tiny_llama().save_pretrained(base)
    byte_tokenizer().save_pretrained(base)
    pairs = [{"prompt": f"Thing {i}?", "chosen": "Look and see.", "rejected": "It is green."} for i in range(10)]
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    example("own_pairs", "--base", str(base), "--pairs", str(file), "--output", str(out), "--epochs", "8")
    printed = capsys.readouterr().out
    shares = re.findall(r"^(before|after): ([\d.]+) of 2 held-out pairs", printed, flags=re.M)
    assert [when for when, _ in shares] == ["before", "after"]
    assert float(shares[1][1]) == 1.0  # the same two replies as in training

    policy: Any = qadapter.QAdapterForCausalLM.from_pretrained(out)
    assert any(weights.abs().max() > 0 for name, weights in policy.named_parameters() if "lora_B" in name)
    example("one_adapter", str(out), "Thing 3?", "--max-new-tokens", "8", "--dials", "scale=1", "q-weight=1", "scale=0")
    lines = dict(re.findall(r"^(scale=1|q-weight=1|scale=0): ?(.*)$", capsys.readouterr().out, flags=re.M))
    assert lines["scale=1"] == lines["q-weight=1"] != lines["scale=0"]
    with policy.disable_adapter():
        (of_base,) = qadapter.generate_replies(
            policy, byte_tokenizer(), [[{"role": "user", "content": "Thing 3?"}]], max_new_tokens=8, batch_size=1
        )
    assert lines["scale=0"] == " ".join(of_base.splitlines()) or of_base.startswith(lines["scale=0"])


def sentence_piece_tokenizer() -> PreTrainedTokenizerFast:
    """A BPE with byte fallback, of Gemma's build: 33 special and byte-like tokens, letters, and merges of six words."""
    words = ["green", "greener", "leaf", "leaves", "grass", "grape"]
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    by_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    letters = ["▁", *sorted({letter for word in words for letter in word}), "?"]
    merges: dict[tuple[str, str], None] = {}
    for word in words:  # from the left, letter after letter: ▁g, ▁gr, ▁gre …
        for end in range(1, len(word)):
            merges.setdefault((word[:end], word[end]), None)
    names = [*special, *letters, *("".join(pair) for pair in merges), *by_bytes]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={name: i for i, name in enumerate(names)},
            merges=list(merges),
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )


@pytest.mark.parametrize("tied", [True, False])
def test_trim_vocabulary(tied: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two texts need 'leaf' and 'green', not 'leaves', 'greener', 'grass', 'grape'; what stays computes as before."""
    tokenizer = sentence_piece_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer) + 5,  # embeddings are often padded
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=0,
        eos_token_id=[1, len(tokenizer) - 1],  # a second end, the last of the vocabulary
        bos_token_id=2,
        tie_word_embeddings=tied,
    )
    network = LlamaForCausalLM(config).eval()
    network.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.jsonl").write_text(json.dumps({"prompt": ["leaf?"], "n": 1}) + "\n")
    (tmp_path / "texts" / "b.txt").write_text("leaf green\n")

    given = [
        "trim_vocabulary",
        str(tmp_path / "base"),
        str(tmp_path / "out"),
        "--texts",
        str(tmp_path / "texts"),
        "--tokens",
        "0",
    ]
    example(*given)
    gone = {"greene", "greener", "leav", "leave", "leaves", "gra", "gras", "grass", "grap", "grape"}
    kept = [token for token in tokenizer.convert_ids_to_tokens(range(len(tokenizer))) if token not in gone]
    smaller = load_tokenizer(tmp_path / "out")
    assert sorted(smaller.get_vocab(), key=smaller.get_vocab().__getitem__) == kept
    printed = capsys.readouterr().out
    assert f"{len(kept)} of {len(tokenizer)} tokens" in printed
    assert "2 texts checked" in printed

    out = load_network(tmp_path / "out")
    assert out.config.vocab_size == len(kept)
    assert out.config.eos_token_id == out.generation_config.eos_token_id == [1, len(kept) - 1]
    old = tokenizer.convert_tokens_to_ids(kept)
    ids = tokenizer("green leaf?", return_tensors="pt")["input_ids"]
    new = smaller("green leaf?", return_tensors="pt")["input_ids"]
    assert [old[token] for token in new[0].tolist()] == ids[0].tolist()
    with torch.no_grad():
        torch.testing.assert_close(out(new).logits, network(ids).logits[..., old])
    assert smaller.decode(smaller("greener leaves")["input_ids"]) == "greener leaves"  # in more, smaller tokens
    assert len(smaller("greener")["input_ids"]) == 3
    assert len(tokenizer("greener")["input_ids"]) == 1

    with pytest.raises(SystemExit, match=r"exists\. Name a new folder"):
        example(*given)


def test_trim_vocabulary_keeps_biases_and_ends(tmp_path: Path) -> None:
    """Phi's head has a bias; the template's end of a turn has no name; the second of two processors adds a token."""
    tokenizer = sentence_piece_tokenizer()
    tokenizer.add_tokens(["<|user|>", "<|assistant|>", "<|end|>"], special_tokens=True)
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if m.role == 'assistant' %}<|end|>{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    begins = processors.TemplateProcessing(single="<|user|> $A", special_tokens=[("<|user|>", len(tokenizer) - 3)])
    tokenizer.backend_tokenizer.post_processor = processors.Sequence([processors.ByteLevel(), begins])
    torch.manual_seed(0)
    ids_of_ends = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    network = PhiForCausalLM(PhiConfig(vocab_size=len(tokenizer), **sizes, **ids_of_ends)).eval()
    with torch.no_grad():
        network.get_output_embeddings().bias.copy_(torch.arange(len(tokenizer)))
    network.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "texts.jsonl").write_text('\ufeff{"prompt": "leaf\u2028green"}\n', encoding="utf-8")
    places = [str(tmp_path / name) for name in ("base", "out", "texts.jsonl")]
    example("trim_vocabulary", *places[:2], "--texts", places[2], "--tokens", "0")

    smaller, out = load_tokenizer(tmp_path / "out"), load_network(tmp_path / "out")
    end = turn_end(smaller)
    assert end == TurnEnd("<|end|>", len(smaller) - 1)
    assert smaller("<|end|>")["input_ids"][1:] == [end.token]
    old = tokenizer.convert_tokens_to_ids(smaller.convert_ids_to_tokens(range(len(smaller))))
    assert len(old) < len(tokenizer)
    ids, new = (t("green leaf", return_tensors="pt")["input_ids"] for t in (tokenizer, smaller))
    assert [old[token] for token in new[0].tolist()] == ids[0].tolist()
    with torch.no_grad():
        torch.testing.assert_close(out(new).logits, network(ids).logits[..., old])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"There is no .*texts"),
        (b"\n", r"There is no text in .*texts"),
        (b"\x1f\x8b\x08", r"texts cannot be read as text: .*Unpack it"),
    ],
)
def test_trim_vocabulary_refuses_texts(content: bytes | None, message: str, tmp_path: Path) -> None:
    """Without the texts the smaller base would read all of them in other tokens."""
    if content is not None:
        (tmp_path / "texts").write_bytes(content)
    with pytest.raises(SystemExit, match=message):
        example("trim_vocabulary", "no/base", str(tmp_path / "out"), "--texts", str(tmp_path / "texts"))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_read_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By hand: base .2 and .9 in the mean; SFT .65 and .4 over two domains and two seeds, Q-Adapter .5 and .95."""
    numbers = [
        ("harmless", "base", None, 0.1, 1.0),
        ("harmless", "sft", 0, 0.8, 0.5),
        ("harmless", "sft", 1, 1.0, 0.7),
        ("harmless", "q-adapter", 0, 0.75, 1.0),
        ("academy", "base", None, 0.3, 0.8),
        ("academy", "sft", 0, 0.5, 0.1),
        ("academy", "sft", 1, 0.3, 0.3),
        ("academy", "q-adapter", 0, 0.25, 0.9),
    ]
    rows = [
        Row(domain, method, seed, {"adaptation/score": learnt, "retention/mean": kept})
        for domain, method, seed, learnt, kept in numbers
    ]
    build_report(rows, title="Test", data={}, config={}, out=tmp_path)
    example("read_report", str(tmp_path))
    table = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()[2:]}
    assert list(table) == ["q-adapter", "sft"]
    assert table == {"q-adapter": ["+0.300", "-0.050", "+0.300"], "sft": ["+0.450", "+0.500", "-0.050"]}
