"""What clients that exist send, and expect back: echoes, default fields, logprobs, CORS, the server's description."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from qadapter.errors import QAdapterError
from qadapter.policy.model import QAdapterForCausalLM
from qadapter.policy.objective import Objective
from qadapter.preferences.tokenize import prompt_ids
from qadapter.serving.app import create_app
from qadapter.serving.generator import Generator
from qadapter.serving.policies import ServedPolicies
from qadapter.serving.server import serve
from tests.support import templates
from tests.support.listening import listening
from tests.support.templates import with_template
from tests.support.tiny_chat import byte_tokenizer, tiny_llama
from tests.support.tiny_models import lora, moved

MESSAGES = [{"role": "user", "content": "Name a colour."}]
PAGE = "http://page.example:3000"


def adapter(folder: Path, seed: int, template: str | None = None) -> Path:
    """A moved Q-Adapter, with a tokenizer of its own if a template is given."""
    base = tiny_llama(context=512)
    base.resize_token_embeddings(264)
    policy = moved(QAdapterForCausalLM.from_base(base, lora(), Objective.preset("residual")), seed=seed, scale=0.2)
    policy.config.alpha_0 = 0.7
    policy.save_pretrained(folder)
    if template is not None:
        with_template(template).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clients") / "base"
    torch.manual_seed(0)
    network = tiny_llama(context=512)
    network.resize_token_embeddings(264)
    network.save_pretrained(folder)
    with_template(byte_tokenizer().chat_template).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def generator(base: Path) -> Iterator[Generator]:
    folders = {
        "same": adapter(base.parent / "same", 1),
        "thinking": adapter(base.parent / "thinking", 2, templates.THINKING),
        "ended": adapter(base.parent / "ended", 3, templates.OTHER_END),
    }
    made = Generator(ServedPolicies.load(folders, base))
    yield made
    made.close()


@pytest.fixture(scope="module")
def url(generator: Generator) -> Iterator[str]:
    with listening(create_app(generator, cors_origins=[PAGE])) as address:
        yield address


@pytest.fixture
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)


def ask(client: openai.OpenAI, model: str = "same", **options: Any) -> Any:
    settings = {"messages": MESSAGES, "max_tokens": 8, "temperature": 0, **options}
    return client.chat.completions.create(model=model, **settings)


@pytest.mark.slow
def test_the_sdks_echo_of_an_earlier_reply_is_taken(client: openai.OpenAI) -> None:
    message = ask(client).choices[0].message
    further = {"role": "user", "content": "Another."}
    plain = [*MESSAGES, {"role": "assistant", "content": message.content}, further]
    echoed = [*MESSAGES, message.model_dump(), further]
    assert {"refusal", "annotations", "audio", "function_call", "tool_calls"} < set(message.model_dump())
    assert ask(client, messages=echoed).choices == ask(client, messages=plain).choices
    assert ask(client, messages=[*MESSAGES, message, further]).choices == ask(client, messages=plain).choices


def test_fields_that_ask_for_nothing_are_taken(client: openai.OpenAI) -> None:
    alone = ask(client).choices
    nothing = {
        "response_format": {"type": "text"},
        "logprobs": False,
        "tools": [],
        "tool_choice": "none",
        "logit_bias": {},
        "store": False,
        "service_tier": "auto",
        "metadata": {"run": "7"},
        "parallel_tool_calls": True,
        "modalities": ["text"],
        "user": "u",
        "safety_identifier": "s",
        "prompt_cache_key": "k",
        "presence_penalty": 0,
        "frequency_penalty": 0,
        "extra_body": {
            "echo": False,
            "best_of": 1,
            "skip_special_tokens": True,
            "stop_token_ids": [],
            "top_k": -1,
            "min_p": 0,
            "repetition_penalty": 1.0,
            "chat_template_kwargs": {},
            "n": None,
        },
    }
    assert ask(client, **nothing).choices == alone
    turns = [
        {"role": "developer", "content": "Short.", "name": "d"},
        {"role": "user", "content": "a", "name": "u"},
        {"role": "assistant", "content": None, "tool_calls": [], "refusal": None},
        *MESSAGES,
    ]
    said = [
        {"role": "system", "content": "Short."},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": ""},
        *MESSAGES,
    ]
    assert ask(client, messages=turns).choices == ask(client, messages=said).choices != alone


def test_logprobs_are_those_of_a_direct_forward(client: openai.OpenAI, base: Path) -> None:
    network = tiny_llama(context=512)
    network = type(network).from_pretrained(base)
    policy = QAdapterForCausalLM.from_pretrained(base.parent / "same", network).eval()
    tokenizer = with_template(byte_tokenizer().chat_template)
    ids = prompt_ids(tokenizer, MESSAGES)
    # Sampled at a temperature, from so little of the distribution that the most likely token is the only one.
    options = {"logprobs": True, "top_logprobs": 3, "temperature": 0.5, "top_p": 1e-6, "seed": 5}
    choice = ask(client, **options).choices[0]
    with torch.no_grad():
        for one in choice.logprobs.content:
            expected = policy(input_ids=torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)
            best = expected.topk(3)
            ids.append(int(best.indices[0]))
            assert one.token == tokenizer.decode(ids[-1:])
            assert one.logprob == pytest.approx(float(best.values[0]), abs=1e-4)
            assert [top.logprob for top in one.top_logprobs] == pytest.approx(best.values.tolist(), abs=1e-4)
            assert [top.token for top in one.top_logprobs] == [tokenizer.decode([i]) for i in best.indices.tolist()]
    assert len(choice.logprobs.content) == 8
    streamed = list(ask(client, stream=True, **options))
    entries = [e for chunk in streamed for c in chunk.choices if c.logprobs for e in c.logprobs.content]
    assert [e.logprob for e in entries] == [e.logprob for e in choice.logprobs.content]
    assert ask(client).choices[0].logprobs is None
    assert ask(client, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []


def test_an_adapters_own_template_writes_its_prompts(client: openai.OpenAI, generator: Generator) -> None:
    written = {name: len(prompt_ids(generator.policies.tokenizer_of(name), MESSAGES)) for name in ("same", "thinking")}
    assert written["same"] != written["thinking"]
    for name, tokens in written.items():
        assert ask(client, name).usage.prompt_tokens == tokens
    both = ask(client, "thinking", extra_body={"compare_base": True})
    assert both.usage.prompt_tokens == written["thinking"]
    off = ask(client, "thinking", extra_body={"chat_template_kwargs": {"enable_thinking": False}})
    assert off.usage.prompt_tokens == written["thinking"] + len("<think>\n\n</think>\n\n")
    assert (
        ask(client, "same", extra_body={"chat_template_kwargs": {"enable_thinking": False}}).usage == ask(client).usage
    )
    with pytest.raises(openai.BadRequestError, match="was trained with another chat template"):
        ask(client, extra_body={"adapters": {"thinking": 0.5, "ended": 0.5}})


def test_the_templates_end_of_turn_ends_a_reply(
    generator: Generator, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = generator.policies.tokenizer_of("ended")
    said = tokenizer("Red.<|end|>\nmore", add_special_tokens=False)["input_ids"]
    scripted(generator, said, monkeypatch)
    choice = ask(client, "ended", max_tokens=12).choices[0]
    assert (choice.message.content, choice.finish_reason) == ("Red.", "stop")
    # The other template does not end turns so: there a request can name the token as a stop.
    assert ask(client, "same", max_tokens=12).choices[0].message.content == "Red.\nmore"
    choice = ask(client, "same", max_tokens=12, stop=["<|end|>"]).choices[0]
    assert (choice.message.content, choice.finish_reason) == ("Red.", "stop")
    choice = ask(client, "same", max_tokens=12, stop=[".<|end|>\nmo"]).choices[0]
    assert (choice.message.content, choice.finish_reason) == ("Red", "stop")


def scripted(generator: Generator, said: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the policy say these tokens, to the end that its settings ask for."""

    def generate(input_ids: Any, generation_config: Any, stopping_criteria: Any, **_: Any) -> None:
        ids = input_ids
        for token in said[: generation_config.max_new_tokens]:
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
            if bool(stopping_criteria(ids, None).all()) or token in generation_config.eos_token_id:
                break

    monkeypatch.setattr(generator.policies.policy, "generate", generate)


def test_pages_ask_by_a_flag_only(url: str, generator: Generator) -> None:
    preflight = {
        "Origin": PAGE,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization, content-type",
    }
    route = f"{url}/v1/chat/completions"
    allowed = httpx.options(route, headers=preflight)
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == PAGE
    body = {"model": "base", "messages": MESSAGES, "max_tokens": 1}
    assert httpx.post(route, json=body, headers={"Origin": PAGE}).headers["access-control-allow-origin"] == PAGE
    assert httpx.post(route, json=body, headers={"Origin": url}).status_code == 200  # its own
    for foreign in ("http://page.example", "https://page.example:3000", "null", "http://localhost:1"):
        for answer in (
            httpx.options(route, headers={**preflight, "Origin": foreign}),
            httpx.post(route, json=body, headers={"Origin": foreign}),
        ):
            assert answer.status_code == 403
            assert "access-control-allow-origin" not in answer.headers
            assert answer.json()["error"]["code"] == "origin_not_allowed"
    with listening(create_app(generator)) as closed:
        assert httpx.options(f"{closed}/v1/models", headers=preflight).status_code == 403
    for wrong in ("*", "page.example", "http://page.example/", "http://*.example"):
        with pytest.raises(QAdapterError, match="is no origin"):
            serve({}, cors_origins=[wrong])


def test_the_server_describes_itself_offline(url: str) -> None:
    spec = httpx.get(f"{url}/openapi.json").json()
    assert set(spec["paths"]) == {"/health", "/v1/models", "/v1/models/{name}", "/v1/chat/completions"}
    fields = spec["components"]["schemas"]["ChatRequest"]["properties"]
    assert fields["temperature"]["default"] == 1.0
    assert "chat_template_kwargs" in fields
    reference = spec["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert reference == {"$ref": "#/components/schemas/ChatRequest"}
    page = httpx.get(f"{url}/docs")
    assert all(f"<code>{name}</code>" in page.text for name in fields)
    assert not any(part in page.text for part in ("http://", "https://", "<script"))
    assert "default-src 'none'" in page.headers["content-security-policy"]


def test_precision_is_that_of_the_training(base: Path, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "half", 4)
    assert ServedPolicies.load({"half": folder}, base).policy.dtype == torch.float32
    (folder / "train.yaml").write_text("dtype: bfloat16\n", encoding="utf-8")
    assert ServedPolicies.load({"half": folder}, base).policy.dtype == torch.bfloat16
    assert ServedPolicies.load({"half": folder}, base, dtype="float32").policy.dtype == torch.float32


def test_a_broken_tokenizer_beside_an_adapter_is_named(base: Path, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "broken", 5)
    (folder / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(QAdapterError, match=r"The tokenizer in .* cannot be loaded"):
        ServedPolicies.load({"broken": folder}, base)
