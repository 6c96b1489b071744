"""The chat server, asked by OpenAI's own client over a real socket; expected replies come from models loaded apart."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from benchmarks import serving
from qadapter.command.parser import main
from qadapter.errors import QAdapterError
from qadapter.policy.dial import Dial
from qadapter.policy.files import copy_turned
from qadapter.policy.model import QAdapterForCausalLM
from qadapter.policy.objective import Objective
from qadapter.preferences.tokenize import prompt_ids
from qadapter.serving.app import create_app
from qadapter.serving.generator import Generator, Reply, ReplyReader, Sampling, ScoredToken, Turn
from qadapter.serving.policies import Blend, ServedPolicies
from qadapter.serving.server import allowed_hosts
from tests.support.listening import listening
from tests.support.tiny_chat import byte_tokenizer, tiny_llama
from tests.support.tiny_models import lora, moved

MESSAGES = [{"role": "user", "content": "Name a colour."}]
NEW = 24
CONTEXT = 2048
KEY = "not-a-secret"
PAGE = "http://page.example:3000"


class RecordingGenerator(Generator):
    """Keeps what every request came to, which a client that went away cannot say."""

    def __init__(self, policies: ServedPolicies) -> None:
        super().__init__(policies)
        self.work: list[Future[list[Reply]]] = []

    def submit(self, *arguments: Any, **options: Any) -> Future[list[Reply]]:
        work = super().submit(*arguments, **options)
        self.work.append(work)
        return work


@dataclass
class World:
    """A base on disk, three adapters of different kinds on it, and a server of them all."""

    root: Path
    url: str = ""
    generator: RecordingGenerator = field(init=False)

    def folder(self, name: str) -> Path:
        return self.root / name

    def base(self) -> PreTrainedModel:
        return tiny_llama(context=CONTEXT)

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", **{"api_key": KEY, "max_retries": 0, "timeout": 60, **options})

    def ask(self, model: str, client: openai.OpenAI | None = None, **options: Any) -> Any:
        settings = {"max_tokens": NEW, "temperature": 0, "messages": MESSAGES, **options}
        return (client or self.client()).chat.completions.create(model=model, **settings)

    def reply(self, model: str, **options: Any) -> str:
        return str(self.ask(model, **options).choices[0].message.content)


ADAPTERS = ("residual", "absolute", "plain")


def save_adapters(root: Path) -> None:
    base = tiny_llama(context=CONTEXT)
    base.save_pretrained(root / "base")
    byte_tokenizer().save_pretrained(root / "base")
    for seed, preset in enumerate(("residual", "published-code")):
        policy = QAdapterForCausalLM.from_base(tiny_llama(context=CONTEXT), lora(), Objective.preset(preset))
        policy = moved(policy, seed=seed, scale=0.2)
        policy.config.alpha_0 = 0.8 if preset == "residual" else 0.3
        policy.save_pretrained(root / {"residual": "residual", "published-code": "absolute"}[preset])
    torch.manual_seed(5)
    plain = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(tiny_llama(context=CONTEXT), plain).save_pretrained(str(root / "plain"))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = World(tmp_path_factory.mktemp("serving"))
    save_adapters(made.root)
    policies = ServedPolicies.load({name: made.folder(name) for name in ADAPTERS}, made.folder("base"))
    made.generator = RecordingGenerator(policies)
    app = create_app(made.generator, KEY, allowed_hosts("127.0.0.1"), cors_origins=[PAGE])
    with listening(app) as made.url:
        yield made
    made.generator.close()


def direct(model: Any, messages: list[dict[str, str]] = MESSAGES, **options: Any) -> str:
    """Greedy generation without any of the server's code."""
    tokenizer = byte_tokenizer()
    ids = torch.tensor([prompt_ids(tokenizer, messages)])
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": 2, "pad_token_id": 0, **options}
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


@pytest.fixture(scope="module")
def expected(world: World) -> dict[str, Any]:
    models: dict[str, Any] = {
        name: QAdapterForCausalLM.from_pretrained(world.folder(name), world.base()) for name in ("residual", "absolute")
    }
    plain = PeftModel.from_pretrained(world.base(), str(world.folder("plain"))).eval()
    return {**models, "plain": plain, "base": world.base()}


# ---- replies


@pytest.mark.slow
@pytest.mark.parametrize("name", [*ADAPTERS, "base"])
def test_every_kind_of_model_answers_as_it_generates_alone(name: str, world: World, expected: dict[str, Any]) -> None:
    answer = world.ask(name)
    assert answer.choices[0].message.content == direct(expected[name])
    assert (answer.model, answer.object, len(answer.choices)) == (name, "chat.completion", 1)
    prompt = len(prompt_ids(byte_tokenizer(), MESSAGES))
    assert answer.usage.prompt_tokens == prompt
    assert answer.usage.total_tokens == prompt + answer.usage.completion_tokens
    assert answer.usage.completion_tokens == NEW
    assert answer.choices[0].finish_reason == "length"


def test_the_models_differ(world: World) -> None:
    """Else the test above shows nothing."""
    assert len({world.reply(name) for name in [*ADAPTERS, "base"]}) == 4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["residual", "absolute"])
@pytest.mark.parametrize("alpha_0", [0.0, 0.5, 2.0])
def test_alpha_0_of_a_request_is_the_policys_own(
    name: str, alpha_0: float, world: World, expected: dict[str, Any]
) -> None:
    reply = world.reply(name, extra_body={"alpha_0": alpha_0, "alpha_tilde": 0.7})
    assert reply == direct(expected[name], alpha_0=alpha_0, alpha_tilde=0.7)


@pytest.mark.slow
def test_the_dials_matter_and_are_forgotten_after_the_request(world: World) -> None:
    before = world.reply("residual")
    assert world.reply("residual", extra_body={"alpha_0": 1e4, "alpha_tilde": 1e4}) == world.reply("base")
    assert before != world.reply("base")
    assert world.reply("residual") == before


@pytest.mark.slow
@pytest.mark.parametrize("name", ["residual", "absolute"])
@pytest.mark.parametrize("dial", ["scale=1.5", "q-weight=0.5", {"kind": "scale", "value": 0}])
def test_the_dial_of_a_request(name: str, dial: Any, world: World, expected: dict[str, Any]) -> None:
    assert world.reply(name, extra_body={"dial": dial}) == direct(expected[name], dial=Dial.of(dial))
    assert world.reply("base") == world.reply(name, extra_body={"dial": "scale=0"}) != world.reply(name)


@pytest.mark.slow
def test_the_dial_of_a_plain_adapter_and_of_a_mix(world: World, expected: dict[str, Any], tmp_path: Path) -> None:
    turned = QAdapterForCausalLM.from_pretrained(world.folder("plain"), world.base())
    assert world.reply("plain", extra_body={"dial": "q-weight=1.5"}) == direct(turned, dial="q-weight=1.5")
    mix = {"adapters": {"residual": 0.6, "plain": 0.4}, "alpha_0": 0.9, "alpha_tilde": 1.0}
    assert world.reply("residual", extra_body={**mix, "dial": "q-weight=0"}) == world.reply("base")
    # Saved with its dial, and served with it
    copy_turned(world.folder("plain"), tmp_path / "half", dial=Dial("scale", 0.5))
    policies = ServedPolicies(
        world.base(), byte_tokenizer(), {"plain": world.folder("plain"), "half": tmp_path / "half"}
    )
    assert policies.blend("half").dial == Dial("scale", 0.5)
    assert policies.blend("half", dial=Dial("scale", 2)).dial == Dial("scale", 2)
    with pytest.raises(QAdapterError, match=r"different dials, so a mix has no default\. Give dial\."):
        policies.blend("half", {"plain": 0.5, "half": 0.5})
    assert policies.blend("half", {"plain": 0.5, "half": 0.5}, dial=Dial("scale", 0.7)).dial == Dial("scale", 0.7)
    with policies.speaking(policies.blend("half")) as dials:
        assert direct(policies.policy, **dials) == direct(turned, dial="scale=0.5")


@pytest.mark.slow
def test_a_mix_weighs_q_and_not_weights(world: World, expected: dict[str, Any]) -> None:
    """Q-Adapter and plain LoRA side by side: the logits of the mix, written out."""
    tokenizer, w = byte_tokenizer(), {"residual": 0.6, "plain": 0.7}
    ids = prompt_ids(tokenizer, MESSAGES)
    start = len(ids)
    with torch.no_grad():
        for _ in range(NEW):
            row = torch.tensor([ids])
            base = expected["base"](input_ids=row).logits[0, -1].double()
            adapted = expected["residual"].peft_model(input_ids=row).logits[0, -1].double()
            plain = expected["plain"](input_ids=row).logits[0, -1].double()
            q = w["residual"] * (adapted - base) + w["plain"] * (plain - base)
            ids.append(int((q + 0.9 * base.log_softmax(-1)).argmax()))
    text = tokenizer.decode(ids[start:], skip_special_tokens=True)
    answer = world.ask("residual", extra_body={"adapters": w, "alpha_0": 0.9, "alpha_tilde": 1.0})
    assert answer.choices[0].message.content == text
    assert answer.model == "0.6*residual+0.7*plain"
    assert text not in (world.reply("residual"), world.reply("plain"))


def test_compare_base_puts_both_answers_side_by_side(world: World) -> None:
    answer = world.ask("absolute", extra_body={"compare_base": True})
    assert [(choice.index, choice.variant) for choice in answer.choices] == [(0, "customised"), (1, "base")]
    assert [choice.message.content for choice in answer.choices] == [world.reply("absolute"), world.reply("base")]
    assert answer.usage.completion_tokens == 2 * NEW


def test_content_parts_and_a_system_turn(world: World, expected: dict[str, Any]) -> None:
    parts = [{"type": "text", "text": "Name "}, {"type": "text", "text": "a colour."}]
    system = {"role": "system", "content": "Short."}
    reply = world.reply("residual", messages=[system, {"role": "user", "content": parts}])
    assert reply == direct(expected["residual"], [system, *MESSAGES])
    assert reply != world.reply("residual")


# ---- sampling and stopping


@pytest.mark.slow
def test_a_seed_gives_the_same_replies_and_n_different_ones(world: World) -> None:
    def replies(**options: Any) -> list[str]:
        return [choice.message.content for choice in world.ask("residual", temperature=1.0, **options).choices]

    three = replies(seed=7, n=3)
    assert len(set(three)) == 3
    assert replies(seed=7, n=3) == three
    assert replies(seed=8) == three[1:2]  # reply i has seed + i
    assert replies(seed=7, top_p=1e-9) == [world.reply("residual")]
    unsaid = world.ask("residual", temperature=openai.omit, seed=7, n=3)  # without a temperature: 1, as docs say
    assert [choice.message.content for choice in unsaid.choices] == three


def test_a_stop_text_ends_the_reply_before_it(world: World) -> None:
    whole = world.reply("residual")
    stop = whole[8:11]
    cut = whole.index(stop)
    answer = world.ask("residual", stop=[stop, "never comes"])
    assert answer.choices[0].message.content == whole[:cut]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens < NEW
    assert "".join(pieces(world.ask("residual", stop=stop, stream=True))[0]) == whole[:cut]


@pytest.mark.slow
def test_the_models_end_token_ends_the_reply(world: World) -> None:
    answer = world.ask("base", temperature=2.0, seed=0, max_tokens=1500)  # flat enough for <eos> to come by chance
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens < 1500


# ---- streams


def pieces(stream: Any) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for chunk in stream:
        assert chunk.object == "chat.completion.chunk"
        for choice in chunk.choices:
            found.setdefault(choice.index, []).append(choice.delta.content or "")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 1.0, "seed": 3, "n": 2}])
def test_a_stream_joins_to_the_whole_answer(options: dict[str, Any], world: World) -> None:
    body = {"alpha_0": 0.5, "compare_base": True}
    whole = world.ask("residual", extra_body=body, **options)
    chunks = list(
        world.ask("residual", extra_body=body, stream=True, stream_options={"include_usage": True}, **options)
    )
    streamed = pieces(chunks)
    assert {i: "".join(parts) for i, parts in streamed.items()} == {c.index: c.message.content for c in whole.choices}
    assert all(len(parts) > 5 for parts in streamed.values())  # token by token, not at once
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == [
        choice.finish_reason for choice in whole.choices
    ]
    assert chunks[-1].usage == whole.usage
    assert {c.choices[0].index: c.choices[0].variant for c in chunks if c.choices} == {
        choice.index: choice.variant for choice in whole.choices
    }


def test_a_client_that_goes_away_ends_its_reply(world: World) -> None:
    work = world.generator.work
    stream = world.ask("residual", stream=True, max_tokens=1900)
    next(chunk for chunk in stream if chunk.choices[0].delta.content)
    stream.close()
    assert work[-1].result(timeout=60)[0].tokens < 1900

    before = len(work)
    for patience in (0.3, 1.0, 3.0):  # a busy machine may need longer to begin
        with pytest.raises(openai.APITimeoutError):
            world.ask("residual", max_tokens=1900, client=world.client(timeout=patience))
        if len(work) > before:
            break
    replies = work[before].result(timeout=60)
    assert replies == [] or replies[0].tokens < 1900


# ---- many clients


@pytest.mark.slow
def test_dials_do_not_leak_between_clients(world: World) -> None:
    requests = [
        {"model": "residual", "extra_body": {"alpha_0": 0.2}},
        {"model": "residual", "extra_body": {"alpha_0": 3.0}},
        {"model": "absolute", "extra_body": {"alpha_0": 1.5}},
        {"model": "base"},
    ]
    alone = [world.reply(**request) for request in requests]
    assert len(set(alone)) == 4
    with ThreadPoolExecutor(4) as clients:
        together = list(clients.map(lambda request: [world.reply(**request) for _ in range(5)], requests))
    assert together == [[reply] * 5 for reply in alone]


# ---- what is refused

IMAGE = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://localhost/a.png"}}]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "options", "error", "says"),
    [
        ("nobody", {}, openai.NotFoundError, "There is no model 'nobody'; there are residual, absolute, plain, base."),
        ("residual", {"extra_body": {"adapters": {"nobody": 1.0}}}, openai.NotFoundError, "There is no model 'nobody'"),
        ("residual", {"extra_body": {"adapters": {"plain": 0.0}}}, openai.BadRequestError, "adapters: "),
        ("residual", {"extra_body": {"adapters": {"plain": 1, "absolute": 1}}}, openai.BadRequestError, "differ"),
        ("residual", {"max_tokens": CONTEXT}, openai.BadRequestError, "This model's context is 2048 tokens; the mess"),
        ("residual", {"messages": []}, openai.BadRequestError, "messages: "),
        ("residual", {"extra_body": {"alpha_0": -1}}, openai.BadRequestError, "alpha_0: "),
        ("residual", {"extra_body": {"alpha0": 1}}, openai.BadRequestError, "alpha0: Extra inputs are not permitted"),
        ("residual", {"top_logprobs": 3}, openai.BadRequestError, "top_logprobs needs logprobs"),
        ("residual", {"logit_bias": {"5": 1}}, openai.BadRequestError, "logit_bias: "),
        ("residual", {"tools": [{"type": "function"}]}, openai.BadRequestError, "tools: "),
        ("residual", {"response_format": {"type": "json_object"}}, openai.BadRequestError, "response_format.type: "),
        ("residual", {"store": True}, openai.BadRequestError, "store: "),
        ("residual", {"temperature": 1e-40}, openai.BadRequestError, "temperature: "),
        ("residual", {"extra_body": {"alpha_tilde": 1e-42}}, openai.BadRequestError, "alpha_tilde: "),
        ("residual", {"extra_body": {"alpha_0": 1e40}}, openai.BadRequestError, "alpha_0: "),
        ("residual", {"extra_body": {"adapters": {"plain": 1e39}}}, openai.BadRequestError, "adapters.plain: "),
        ("residual", {"stop": ["x"] * 17}, openai.BadRequestError, "stop: List should have at most 16 items"),
        ("residual", {"stop": "x" * 1001}, openai.BadRequestError, "stop: String should have at most 1000"),
        ("residual", {"extra_body": {"stop": ["x", None]}}, openai.BadRequestError, "stop.1: "),
        ("residual", {"max_completion_tokens": 3, "max_tokens": 4}, openai.BadRequestError, "give one of them"),
        (
            "residual",
            {"messages": [IMAGE]},
            openai.BadRequestError,
            "messages.0.content.0.type: Input should be 'text'",
        ),
        ("residual", {"messages": [{"role": "user"}]}, openai.BadRequestError, "the last message has no content"),
        ("residual", {"messages": [{"role": "tool", "content": "x"}]}, openai.BadRequestError, "messages.0.role: "),
        ("residual", {"extra_body": {"chat_template_kwargs": {"x": 1}}}, openai.BadRequestError, "no variable 'x'"),
        ("residual", {"n": 1000}, openai.BadRequestError, "n: "),
        ("residual", {"extra_body": {"dial": "half"}}, openai.BadRequestError, "dial: 'half' is no dial"),
        ("base", {"extra_body": {"dial": "scale=1"}}, openai.BadRequestError, "The base has no dials"),
        ("base", {"extra_body": {"alpha_0": 1}}, openai.BadRequestError, "The base has no dials"),
        ("base", {"extra_body": {"compare_base": True}}, openai.BadRequestError, "cannot be compared with itself"),
    ],
)
def test_refusals_have_openais_shape(
    model: str, options: dict[str, Any], error: type[openai.APIStatusError], says: str, world: World
) -> None:
    with pytest.raises(error) as caught:
        world.ask(model, **options)
    body: Any = caught.value.body
    assert says in body["message"]
    assert body["type"] == "invalid_request_error"
    assert set(body) == {"message", "type", "param", "code"}


def test_codes_that_programs_read(world: World) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        world.ask("residual", messages=[{"role": "user", "content": "x" * CONTEXT}])
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError) as missing:
        world.ask("nobody")
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")


@pytest.mark.slow
def test_without_a_limit_the_reply_takes_the_room_there_is(world: World) -> None:
    long = [{"role": "user", "content": "x" * (CONTEXT - 100)}]
    answer = world.ask("residual", messages=long, max_tokens=None)
    assert answer.usage.total_tokens <= CONTEXT
    assert answer.choices[0].finish_reason in ("length", "stop")
    assert answer.usage.total_tokens == CONTEXT or answer.choices[0].finish_reason == "stop"


def test_the_token_is_asked_for_and_health_is_open(world: World) -> None:
    with pytest.raises(openai.AuthenticationError):
        world.client(api_key="wrong").models.list()
    with pytest.raises(openai.AuthenticationError):
        world.ask("residual", client=world.client(api_key="wrong"))
    assert [model.id for model in world.client().models.list()] == [*ADAPTERS, "base"]
    assert world.client().models.retrieve("plain").id == "plain"
    with pytest.raises(openai.NotFoundError):
        world.client().models.retrieve("nobody")
    assert httpx.get(f"{world.url}/health").json() == {"status": "ok"}
    assert httpx.get(f"{world.url}/elsewhere").json()["error"]["type"] == "invalid_request_error"


def test_only_the_names_of_this_machine_are_answered_to(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page whose name has been given the address 127.0.0.1 must not read what is served here (DNS rebinding)."""
    port = world.url.rpartition(":")[2]

    def asked_as(host: str, path: str = "/health", **headers: str) -> httpx.Response:
        return httpx.get(world.url + path, headers={"Host": host, **headers})

    for own in (f"127.0.0.1:{port}", f"LocalHost:{port}", "localhost", "localhost.", f"[::1]:{port}"):
        assert asked_as(own).status_code == 200, own
    for foreign in (f"evil.example:{port}", "localhost.evil.example", "127.0.0.1.evil.example", "192.168.0.1", ""):
        for path in ("/health", "/v1/models", "/elsewhere"):
            answer = asked_as(foreign, path, Authorization=f"Bearer {KEY}")
            assert answer.status_code == 403, foreign
            assert answer.json()["error"]["code"] == "host_not_allowed"
    assert "QADAPTER_ALLOWED_HOSTS" in answer.json()["error"]["message"]

    assert allowed_hosts("127.0.0.2") == {"127.0.0.1", "127.0.0.2", "localhost", "::1"}
    assert allowed_hosts("0.0.0.0") is None, "others reach it by names that are not known here"
    monkeypatch.setenv("QADAPTER_ALLOWED_HOSTS", "Models.example, ,proxy")
    for host in ("127.0.0.1", "0.0.0.0"):
        assert allowed_hosts(host) == {"models.example", "proxy", "127.0.0.1", "localhost", "::1", host}


def test_an_error_of_the_model_is_a_500_and_the_server_goes_on(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    before = world.reply("residual")
    with monkeypatch.context() as patch:
        patch.setattr(world.generator.policies.policy, "generate", lambda **_: 1 / 0)
        with pytest.raises(openai.InternalServerError):
            world.ask("residual")
        with pytest.raises(openai.APIError, match="The server failed while answering"):
            list(world.ask("residual", stream=True))
    assert world.reply("residual") == before


# ---- the parts


def test_adapters_that_do_not_fit_are_refused(tmp_path: Path, world: World) -> None:
    base = {"base": world.folder("base")}
    with pytest.raises(QAdapterError, match=r"is no adapter: it has no adapter_config\.json"):
        ServedPolicies.load({"x": tmp_path}, **base)
    with pytest.raises(QAdapterError, match="'base' is the name of the base itself"):
        ServedPolicies.load({"base": world.folder("plain")}, **base)
    other = QAdapterForCausalLM.from_base(tiny_llama(hidden=16), lora(), Objective.preset("residual"))
    other.save_pretrained(tmp_path / "other")
    both = {"x": world.folder("plain"), "y": tmp_path / "other"}
    with pytest.raises(QAdapterError, match="was trained on another base"):
        ServedPolicies.load(both, **base)
    with pytest.raises(QAdapterError, match="does not fit this base"):
        ServedPolicies.load(both, **base, allow_base_mismatch=True)


@pytest.mark.slow
def test_an_adapter_of_another_kind_is_served_alone(tmp_path: Path, world: World) -> None:
    """DoRA layers cannot choose by row: one adapter at a time works, a mix is refused."""
    folders = {}
    for seed in (1, 2):
        policy = QAdapterForCausalLM.from_base(world.base(), lora(use_dora=True), Objective.preset("residual"))
        moved(policy, seed=seed, scale=0.2).save_pretrained(tmp_path / str(seed))
        folders[f"dora.{seed}"] = tmp_path / str(seed)
    generator = Generator(ServedPolicies(world.base(), byte_tokenizer(), folders))
    ids = prompt_ids(byte_tokenizer(), MESSAGES)
    sampling = Sampling(NEW, temperature=0)
    for _ in range(2):
        for name, folder in folders.items():
            turns = [Turn(generator.policies.blend(name, alpha_0=0.5)), Turn(Blend({}))]
            replies = generator.submit(turns, ids, sampling).result()
            alone = QAdapterForCausalLM.from_pretrained(folder, world.base())
            assert [r.text for r in replies] == [direct(alone, alpha_0=0.5), direct(world.base())]
    with pytest.raises(QAdapterError, match="Several adapters at once need plain LoRA layers"):
        generator.policies.blend("dora.1", {"dora.1": 0.5, "dora.2": 0.5})
    generator.close()


class Spelling:
    """A tokenizer whose tokens are UTF-8 bytes."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return bytes(ids).decode(errors="replace")


class Certain:
    """Scores in which every token has the probability 1."""

    def of(self, token: int, tokenizer: Spelling) -> ScoredToken:
        return ScoredToken(tokenizer.decode([token], skip_special_tokens=True), 0.0)


@pytest.mark.parametrize(
    ("tokens", "stop", "scored"),
    [
        ([b"re", b"d", b"E", b"N", b"D"], ("END",), ["re", "d"]),
        ([b"re", b"dE", b"ND more"], ("END",), ["re", "dE"]),
        ([b"red", b"END"], ("END", "X"), ["red"]),
        ([b"E", b"N", b"e", b"d"], ("END",), ["E", "N", "e", "d"]),
    ],
)
def test_tokens_of_a_stop_text_are_not_scored(tokens: list[bytes], stop: tuple[str, ...], scored: list[str]) -> None:
    class Words(Spelling):
        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            return b"".join(tokens[one] for one in ids).decode()

    scores: Any = Certain()
    reader = ReplyReader(Words(), 0, stop, lambda _: None, threading.Event(), (), scores)  # type: ignore[arg-type]
    for count in range(1, len(tokens) + 1):
        if bool(reader(torch.arange(count)[None], None)):
            break
    reader.close()
    assert [one.text for one in reader.scored] == scored


def test_a_reply_without_a_seed_is_drawn_anew(world: World) -> None:
    """Whatever seed the request before it had, and other than what this process would have drawn first."""
    policies = world.generator.policies
    turn, sampling = Turn(policies.blend("residual")), Sampling(max_tokens=NEW)
    texts = set()
    for _ in range(3):
        seeded, unseeded = (Turn(turn.blend, 7), turn)
        texts.add(world.generator.submit([seeded, unseeded], [5, 6, 7], sampling).result()[1].text)
    assert len(texts) == 3


@pytest.mark.parametrize(
    ("text", "stop", "handed_on"),
    [
        ("é→😀", (), ["é", "→", "😀"]),
        ("abcabd", ("abd",), ["abc"]),
        ("xab", ("abd",), ["x", "ab"]),
        ("aXbY", ("Y", "Xb"), ["a"]),
    ],
)
def test_a_reply_is_read_character_by_character(text: str, stop: tuple[str, ...], handed_on: list[str]) -> None:
    got: list[str] = []
    reader = ReplyReader(Spelling(), 2, stop, got.append, threading.Event())  # type: ignore[arg-type]
    ids = [0, 0]
    for byte in text.encode():
        ids.append(byte)
        if bool(reader(torch.tensor([ids]), None)):
            break
    reader.close()
    assert got == handed_on
    assert reader.text == "".join(handed_on)
    assert reader.stopped == any(one in text for one in stop)


@pytest.mark.slow
def test_the_command_refuses_before_it_loads(
    tmp_path: Path, world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["serve", "--adapter", str(tmp_path), "--port", "0"]) == 2
    assert "is no adapter: it has no adapter_config.json" in capsys.readouterr().err
    twice = ["--adapter", str(world.folder("plain"))] * 2
    assert main(["serve", *twice, "--port", "0"]) == 2
    assert "two adapters have the same name" in capsys.readouterr().err
    port = world.url.rpartition(":")[2]
    assert main(["serve", "--adapter", str(world.folder("plain")), "--port", port]) == 2
    assert "cannot be listened on" in capsys.readouterr().err
    for empty in ("", "  "):
        monkeypatch.setenv("QADAPTER_API_KEY", empty)
        assert main(["serve", "--adapter", str(world.folder("plain")), "--port", "0"]) == 2
        assert "QADAPTER_API_KEY is set but empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "said"), [("a key", ""), *((f"a key{odd}", "carry") for odd in ("\n", " ", "é", "\x07"))]
)
def test_a_key_that_no_request_can_carry_is_refused(
    key: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A header ends before its last blank, and holds no letters that two sides encode alike."""
    monkeypatch.setenv("QADAPTER_API_KEY", key)
    assert main(["serve", "--adapter", str(tmp_path), "--port", "0"]) == 2
    error = capsys.readouterr().err
    assert ("QADAPTER_API_KEY has characters that no request can carry" in error) == bool(said)
    assert ("is no adapter" in error) != bool(said)
    assert "a key" not in error


@pytest.mark.slow
def test_the_benchmark_prints_a_row_per_model_and_clients(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, world: World
) -> None:
    serving.main(["--shape", "tiny", "--clients", "1", "2", "--rounds", "2", "--new-tokens", "3"])
    rows = capsys.readouterr().out.splitlines()[2:]
    names = ["generate()", "residual", "residual", "published-code", "published-code", "base", "base"]
    assert [row.split()[0] for row in rows] == names
    assert [row.split()[1] for row in rows] == ["1", "1", "2", "1", "2", "1", "2"]
    assert rows[0].split()[3] == "1.00x"
    monkeypatch.setenv("QADAPTER_API_KEY", KEY)
    serving.main(["--url", f"{world.url}/v1", "--models", "base", "--clients", "1", "--rounds", "1"])
    assert capsys.readouterr().out.splitlines()[2].startswith("base ")
