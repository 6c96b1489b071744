"""The judge against a real HTTP server on this machine."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import httpx
import pytest

from qadapter.errors import QAdapterError
from qadapter.judging.endpoint import CRITERIA
from qadapter.judging.endpoint_asking import SPENT, EndpointJudge, parse_verdict
from qadapter.judging.endpoint_client import JudgeClient, UnansweredError, check_endpoint
from qadapter.judging.endpoint_settings import EndpointSettings
from qadapter.judging.verdicts import judge_answers
from qadapter.progress.kept import keeping, kept_folder
from tests.support.fake_judge import Answer, FakeJudge, Sent, longer, serving

PROMPTS = [[{"role": "user", "content": f"question {i}"}] for i in range(6)]
LONG = ["a long answer " * 3] * 6
SHORT = [f"short {i}" for i in range(6)]


@pytest.fixture
def serve() -> Iterator[Callable[..., FakeJudge]]:
    with ExitStack() as stack:
        yield lambda answer: stack.enter_context(serving(answer))


def settings(server: FakeJudge | str, **changes) -> EndpointSettings:
    url = server if isinstance(server, str) else server.url
    defaults = {"api_key_variable": None, "timeout": 30, "retries": 2, "backoff": 0.01, "parallel": 2}
    return EndpointSettings(url=url, model="fake", **{**defaults, **changes})


def run(server, a=LONG, b=SHORT, cache=None, **changes):
    return EndpointJudge(settings(server, **changes), CRITERIA["harmless"], cache).judge(PROMPTS, a, b)


def test_a_fair_judge_decides_and_every_row_can_be_read(serve) -> None:
    server = serve(longer)
    a = [LONG[0], SHORT[1], LONG[2], "same", LONG[4], LONG[5]]
    b = [SHORT[0], LONG[1], SHORT[2], " same\n", SHORT[4], SHORT[5]]
    result = run(server, a, b)
    assert [row.verdict for row in result.rows] == ["win", "loss", "win", "tie", "win", "win"]
    assert result.rows[1].orders == ("loss", "loss")
    assert (result.rows[0].prompt, result.rows[0].answer_b) == ("User: question 0", "short 0")
    assert result.win_rate is not None
    assert result.win_rate.estimate == pytest.approx(4.5 / 6)
    assert len(server.requests) == 10  # equal answers are not asked about
    metrics = result.metrics()
    assert {name: metrics[name] for name in ("wins", "losses", "ties", "undecided", "calls", "order_agreement")} == {
        "wins": 4,
        "losses": 1,
        "ties": 1,
        "undecided": 0,
        "calls": 10,
        "order_agreement": 1,
    }
    assert metrics["win_rate_low"] < metrics["win_rate"] <= metrics["win_rate_high"]


def test_six_wins_in_six_are_not_sure_of_a_seventh(serve) -> None:
    """Wilson's lower end where all n are won is n / (n + z²): 6 / (6 + 1.96²) = 0.6097; of six ties 0.5 ± 0.3124."""
    metrics = run(serve(longer)).metrics()
    assert [metrics[name] for name in ("win_rate", "win_rate_low", "win_rate_high")] == pytest.approx(
        [1, 0.6097, 1], abs=1e-4
    )
    metrics = run(serve(lambda *_: "[[C]]")).metrics()
    assert [metrics[name] for name in ("win_rate", "win_rate_low", "win_rate_high")] == pytest.approx(
        [0.5, 0.1876, 0.8124], abs=1e-4
    )


def test_a_judge_that_prefers_a_position_decides_nothing(serve) -> None:
    result = run(serve(lambda first, second, number: "[[A]]"))
    assert {row.verdict for row in result.rows} == {"tie"}
    assert result.rows[0].orders == ("win", "loss")
    assert result.metrics()["order_agreement"] == 0
    assert result.win_rate is not None
    assert result.win_rate.estimate == 0.5


def test_ties_of_the_judge(serve) -> None:
    assert run(serve(lambda first, second, number: "Both fine: [[c]]")).count("tie") == 6


def test_the_request_is_openais(serve, monkeypatch) -> None:
    monkeypatch.setenv("QADAPTER_SOME_KEY", "secret")
    server = serve(longer)
    run(server, api_key_variable="QADAPTER_SOME_KEY", extra={"temperature": None, "max_completion_tokens": 9})
    request = server.requests[0]
    assert set(server.keys) == {"Bearer secret"}
    assert request["model"] == "fake"
    assert "temperature" not in request
    assert (request["max_tokens"], request["max_completion_tokens"]) == (64, 9)
    assert [message["role"] for message in request["messages"]] == ["system", "user"]
    assert CRITERIA["harmless"] in request["messages"][0]["content"]


def test_answers_are_cached_and_a_torn_cache_is_read(serve, tmp_path) -> None:
    server, cache = serve(longer), tmp_path / "new" / "judge.jsonl"
    first = run(server, cache=cache)
    assert len(server.requests) == 12
    cache.write_text(cache.read_text() + '{"key": "abc", "te')  # killed while writing
    again = run(server, cache=cache)
    assert len(server.requests) == 12
    assert (again.usage.calls, again.usage.cached) == (0, 12)
    assert again.rows == first.rows
    run(server, cache=cache, extra={"seed": 1})  # another question
    assert len(server.requests) == 24


def test_what_may_pass_is_tried_again(serve) -> None:
    def shaky(first: str, second: str, number: int) -> str | Answer:
        failures: dict[int, Answer] = {
            1: (429, {"error": {"message": "slow down"}}, 0),
            2: (500, "oops", 0),
            4: (200, "not json", 0),
        }
        return failures.get(number) or longer(first, second, number)

    server = serve(shaky)
    result = run(server, parallel=1)
    assert result.count("win") == 6
    assert (result.usage.retries, result.usage.calls, len(server.requests)) == (3, 12, 15)


@pytest.mark.parametrize(
    ("retry_after", "bounds"),
    [
        (None, [8, 16, 32, 60, 60]),
        ("20", [20] * 5),
        ("90", [60] * 2),
        *((asked, [8, 16]) for asked in ("soon", "-1", "nan", "inf", "-inf", "1e999")),
    ],
)
def test_waits_grow_and_follow_the_server(retry_after, bounds, serve, monkeypatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("qadapter.judging.endpoint_client.time.sleep", waits.append)
    server = serve(lambda *_: (503, "busy", 0))
    server.retry_after = retry_after
    run(server, backoff=8.0, retries=len(bounds), parallel=1)
    waited = [wait for wait in waits if wait][: len(bounds)]  # the server's own waits are 0
    assert all(0.75 * bound <= wait <= bound for wait, bound in zip(waited, bounds, strict=True))


def test_a_judge_that_talks_nonsense_is_reminded_once(serve, tmp_path) -> None:
    def forgetful(first: str, second: str, number: int) -> str:
        return "I like both." if number % 2 else longer(first, second, number)

    server, cache = serve(forgetful), tmp_path / "c"
    assert run(server, parallel=1, cache=cache).count("win") == 6
    assert len(server.requests) == 24
    assert server.requests[1]["messages"][-1]["content"].startswith("Answer with [[A]], [[B]] or [[C]]")
    assert run(server, parallel=1, cache=cache).usage.cached == 12


def test_unusable_answers_leave_items_undecided(serve) -> None:
    server = serve(lambda first, second, number: "no idea" if "short 2" in first + second else longer(first, second, 0))
    result = run(server)
    assert [row.verdict for row in result.rows] == ["win", "win", "undecided", "win", "win", "win"]
    assert result.undecided_reasons == {"nonsense": 1}
    assert result.metrics()["undecided"] == 1
    assert result.win_rate is not None
    assert (result.win_rate.estimate, result.win_rate.items) == (1.0, 5)
    assert result.usage.last_error == "nonsense: 'no idea'"


@pytest.mark.parametrize(
    ("answer", "reason", "error", "most_requests"),
    [
        ((429, {"error": {"code": "insufficient_quota"}}, 0), "quota", "status 429", 2),
        ((401, {"error": {"message": "wrong key"}}, 0), "refused", "wrong key", 2),
        ((400, {"error": {"message": "no such field"}}, 0), "refused", "no such field", 12),
        ((200, {"choices": []}, 0), "nonsense", "nonsense: ''", 24),
        ((200, "[" * 100_000, 0), "server error", "not JSON", 12),
        ((200, Sent({"choices": []}, {"Content-Encoding": "gzip"}), 0), "server error", "incorrect header check", 12),
        ("\ud83d, I cannot tell", "nonsense", r"\ud83d, I cannot tell", 24),
        ((429, "slow down", 0), "rate limit", "slow down", 12),
        ((200, longer("x", "", 0), 1.0), "timeout", "no answer within 0.2 s", 12),
    ],
)
def test_a_failing_judge_is_given_up_without_an_error(answer, reason, error, most_requests, serve) -> None:
    server = serve(lambda *_: answer)
    result = run(server, timeout=0.2 if reason == "timeout" else 30)
    assert result.undecided_reasons == {reason: 6}
    assert error in result.usage.last_error
    assert result.win_rate is None
    assert "win_rate" not in result.metrics()
    assert len(server.requests) <= most_requests


@pytest.mark.parametrize("of_headers", [0, 50], ids=["body", "headers too"])
def test_a_judge_that_sends_single_bytes_times_out(serve, of_headers) -> None:
    """Every read is answered at once and the whole would take ten seconds; the timeout is the attempt's."""
    text = '{"choices": [{"message": {"content": "[[A]]"}}]}'.rjust(100)
    server = serve(lambda *_: (200, Sent(text, {"X-Long": "x" * 50}, len(text) + of_headers, 0.1), 0))
    with contextlib.closing(JudgeClient(settings(server, timeout=0.5, retries=0))) as client:
        start = time.monotonic()
        with pytest.raises(UnansweredError, match="timeout"):
            client.ask([{"role": "system", "content": "s"}, {"role": "user", "content": question(0)}], str, "?")
        assert time.monotonic() - start < 5
    assert client.usage.last_error == "timeout: no answer within 0.5 s"


@pytest.mark.parametrize("charset", ["hex", "rot13", "undefined", "utf-16", "no-such"])
def test_an_encoding_that_no_text_has_ends_nothing(charset, serve) -> None:
    """Python knows codecs that make no text of bytes, and the server names the one to use."""
    server = serve(lambda *_: (500, Sent("busy", {"Content-Type": f"text/plain; charset={charset}"}), 0))
    result = run(server, retries=0)
    assert result.undecided_reasons == {"server error": 6}
    assert result.usage.last_error == "status 500: busy"


def test_an_unreachable_judge_is_given_up(serve) -> None:
    server = serve(longer)
    server.shutdown()
    server.server_close()
    assert run(server).undecided_reasons == {"unreachable": 6}


@pytest.mark.parametrize(
    ("url", "error"),
    [
        ("http://localhost:99999/v1", "unreachable: .*port must be 0-65535"),  # in a group, of one for each address
        ("http://host:abc/v1", "unreachable: Invalid port: 'abc'"),
    ],
)
def test_an_address_that_the_network_refuses_ends_nothing(url, error, monkeypatch) -> None:
    """They are refused before any call, but no list of such addresses is whole."""
    monkeypatch.setattr("qadapter.judging.endpoint_client.check_endpoint", lambda _: None)
    result = run(url)
    assert result.undecided_reasons == {"unreachable": 6}
    assert re.match(error, result.usage.last_error)


def test_only_a_mistake_of_this_program_ends_an_evaluation(monkeypatch) -> None:
    """What TLS or the system says of an address is none; in a group of both kinds, the mistake counts."""
    failing: list[Exception] = []

    async def fail(*_: object, **__: object) -> None:
        raise failing[-1]

    monkeypatch.setattr(httpx.AsyncClient, "send", fail)
    for error in (OSError("no"), UnicodeError("no"), ExceptionGroup("g", [ExceptionGroup("g", [OverflowError("no")])])):
        failing.append(error)
        result = run("http://localhost:9/v1")
        assert (result.undecided_reasons, result.usage.last_error) == ({"unreachable": 6}, "unreachable: no")
    for mistake in (TypeError("x"), ExceptionGroup("x", [OSError("y"), TypeError("x")])):
        failing.append(mistake)
        with pytest.raises(type(mistake), match="x"):
            run("http://localhost:9/v1")


def test_the_estimate_comes_first_and_the_budget_holds(serve, tmp_path) -> None:
    """A call is counted as 100 + 10 tokens by the server: 100 · 1 + 10 · 2 = 120 millionths."""
    server = serve(longer)
    prices = {"input_price": 1.0, "output_price": 2.0}
    expected = EndpointJudge(settings(server, **prices), "x").estimate(PROMPTS, LONG, SHORT)
    assert (expected.calls, expected.cached) == (12, 0)
    assert expected.price is not None
    assert 12 * (2 * 64) / 1e6 < expected.price < 12 * (2 * 64 + 400) / 1e6
    assert server.requests == []
    with pytest.raises(QAdapterError, match=r"about 0\.00 for 12 calls.*budget is 0\.00"):
        run(server, budget=expected.price / 2, **prices)
    assert server.requests == []
    paid = run(server, cache=tmp_path / "c", budget=1.0, **prices)
    assert paid.usage.cost == pytest.approx(12 * 120e-6)
    assert paid.estimate.calls == 12
    known = EndpointJudge(settings(server, **prices), CRITERIA["harmless"], tmp_path / "c").estimate(
        PROMPTS, LONG, SHORT
    )
    assert (known.calls, known.cached, known.price) == (0, 12, 0)
    assert known.text() == "0 calls (and 12 known answers), about 0.0000, reminders after nonsense not counted"
    assert EndpointJudge(settings(server), "x").estimate(PROMPTS, LONG, SHORT).price is None


@pytest.mark.parametrize(
    "count", [None, "100", -1, True, float("nan"), float("inf"), 10**400, [100]], ids=lambda count: str(count)[:9]
)
def test_a_count_of_tokens_that_is_none_costs_what_was_estimated(serve, count) -> None:
    """It is not what is charged: a missing number is not free, and no number of any size ends the evaluation."""
    message = {"choices": [{"message": {"content": "[[C]]"}}]}
    server = serve(lambda *_: (200, {**message, "usage": {"prompt_tokens": count, "completion_tokens": 10}}, 0))
    result = run(server, input_price=1.0, output_price=2.0, budget=1.0)
    assert result.count("tie") == 6
    assert result.estimate.price is not None
    assert result.usage.cost == pytest.approx(result.estimate.price)


def test_an_answer_with_odd_characters_is_kept(serve, tmp_path) -> None:
    """Half a surrogate pair has no bytes in UTF-8; U+2028, U+2029 and U+0085 end a line for `str.splitlines`."""
    server, cache = serve(lambda *_: "\u2028\u2029\x85 [[A]] \ud83d"), tmp_path / "answers.jsonl"
    assert run(server, cache=cache).count("tie") == 6
    old = '{"key": "of an older version", "text": "[[A]] \u2028"}\n'.encode()
    cache.write_bytes(old + cache.read_bytes() + '{"key": "ü'.encode()[:-1])  # a crash cut a character in two
    again = run(server, cache=cache)
    assert (again.usage.calls, again.usage.cached) == (0, 12)
    with contextlib.closing(JudgeClient(settings(server), cache)) as client:
        assert client._answers.get("of an older version") == "[[A]] \u2028"


def test_every_calls_cost_is_either_reserved_or_spent(serve) -> None:
    """Each time the lock is free, what is reserved and spent together never falls: here both are the same price."""
    server = serve(lambda *_: (200, {"choices": [{"message": {"content": "[[A]]"}}]}, 0))  # no usage: the estimate
    with contextlib.closing(JudgeClient(settings(server, input_price=1.0, output_price=1.0, budget=1.0))) as client:
        seen: list[float] = []

        class Watched:
            def __enter__(self) -> None:
                seen.append(client.usage.cost + client._reserved)

            def __exit__(self, *_: object) -> None:
                seen.append(client.usage.cost + client._reserved)

        client._lock = Watched()  # type: ignore[assignment]
        for number in range(2):
            client.ask([{"role": "system", "content": "s"}, {"role": "user", "content": question(number)}], str, "?")
    assert seen == sorted(seen)
    assert seen[-1] > 0


def question(number: int) -> str:
    return f"{number}<reply A>\na\n</reply A>\n<reply B>\nb\n</reply B>"


def test_a_budget_that_runs_out_leaves_the_rest_undecided(serve) -> None:
    """The server counts a thousand times what was estimated, so the first calls use the budget up."""

    def costly(first: str, second: str, number: int) -> Answer:
        message = {"choices": [{"message": {"content": longer(first, second, number)}}]}
        return 200, {**message, "usage": {"prompt_tokens": 500_000, "completion_tokens": 0}}, 0

    server = serve(costly)
    result = run(server, parallel=1, input_price=1.0, output_price=1.0, budget=1.2)
    assert len(server.requests) == 3
    assert [row.verdict for row in result.rows] == ["win"] + ["undecided"] * 5
    assert result.undecided_reasons == {"budget": 5}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"url": "localhost:8000"}, "Give the endpoint's base"),
        ({"url": "http://${QADAPTER_USER}@host/v1"}, "without a user name or password"),
        *(
            ({"url": f"http://{place}/v1"}, "The judge's url")
            for place in ("host:abc", "host:0", "host:-1", "localhost:65536", "localhost:99999", ":80")
        ),
        ({"api_key_variable": "QADAPTER_NO_SUCH_KEY"}, "QADAPTER_NO_SUCH_KEY, which is not set"),
        ({"api_key_variable": "HF_TOKEN"}, "HF_TOKEN is not sent to a judge"),
        ({"budget": 1.0}, "a budget but no prices"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_any_call(changes, message) -> None:
    defaults = {"url": "http://127.0.0.1:9/v1", "model": "m", "api_key_variable": None}
    with pytest.raises(QAdapterError, match=message):
        EndpointJudge(EndpointSettings(**{**defaults, **changes}), "x").judge(PROMPTS, LONG, SHORT)


@pytest.mark.parametrize(
    "url", ["http://localhost:65535/v1", "https://judge.example", "http://[::1]:1/", "http://ü.de/v1"]
)
def test_addresses_that_can_be_used(url) -> None:
    check_endpoint(EndpointSettings(url=url, model="m", api_key_variable=None))


@pytest.mark.parametrize("key", ["sk-\nsecret", "sk-secr\u00e9t", "sk-\x07secret", "\ufeffsk-secret", " \n"])
def test_a_key_that_no_header_can_carry_is_refused_and_not_shown(key, monkeypatch) -> None:
    monkeypatch.setenv("QADAPTER_SOME_KEY", key)
    with pytest.raises(QAdapterError, match="environment variable QADAPTER_SOME_KEY") as refused:
        run("http://127.0.0.1:9/v1", api_key_variable="QADAPTER_SOME_KEY")
    assert "sk-" not in str(refused.value)
    assert ("set or empty" if key.isspace() else "a header cannot contain") in str(refused.value)


@pytest.mark.parametrize(
    ("text", "mark"),
    [
        ("[[A]]", "A"),
        ("At first [[A]] seems better, but [[ b ]].", "B"),
        ("C", "C"),
        (" b. ", "B"),
        ("A is better", None),
        ("[[D]]", None),
        ("", None),
    ],
)
def test_verdicts_are_read(text, mark) -> None:
    assert parse_verdict(text) == mark


# ---- as the judge of an evaluation


def evaluated(server, replies=LONG, base=SHORT, cache=None, **changes):
    """Rows and metrics of an evaluation that asks this judge."""
    judge = EndpointJudge(settings(server, **changes), CRITERIA["harmless"], cache)
    return judge_answers(judge, PROMPTS, base, replies)


def test_verdicts_are_of_the_policy_not_of_the_base(serve) -> None:
    """The longer answer wins: the policy's on the first, the base's on the second; the third two are equal."""
    server = serve(longer)
    rows, metrics = evaluated(server, [LONG[0], "brief", *["same"] * 4], [SHORT[0], LONG[1], *["same "] * 4])
    assert [row["verdict"] for row in rows] == ["win", "loss", "tie", "tie", "tie", "tie"]
    assert {row["judge"] for row in rows} == {"endpoint"}
    assert (rows[1]["prompt"], rows[1]["base"], rows[1]["reply"]) == (PROMPTS[1], LONG[1], "brief")
    assert metrics == {
        "adaptation/win_rate": 0.5,  # (1 + 0 + 4 · ½) / 6
        "adaptation/ties": 4,
        "adaptation/undecided": 0,
        "adaptation/judge_order_agreement": 1,
        "cost/judge_calls": 4,  # two answers that differ, in two orders
        "cost/judge_price": 0,
    }


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ((429, {"error": {"code": "insufficient_quota"}}, 0), "quota"),
        ((200, longer("x", "", 0), 1.0), "timeout"),
        ("I would rather not say.", "nonsense"),
    ],
)
def test_an_evaluation_goes_on_without_its_judge(answer, reason, serve, caplog) -> None:
    rows, metrics = evaluated(serve(lambda *_: answer), timeout=0.2 if reason == "timeout" else 30)
    assert [row["verdict"] for row in rows] == ["undecided"] * 6
    assert (metrics["adaptation/undecided"], metrics["adaptation/ties"]) == (6, 0)
    assert "adaptation/win_rate" not in metrics
    assert f"left 6 of 6 answers undecided ({reason}: 6)" in caplog.text


def test_a_row_that_would_cost_more_than_its_part_is_undecided(serve, caplog) -> None:
    server = serve(longer)
    rows, metrics = evaluated(server, input_price=1000.0, output_price=1000.0, budget=0.01)
    assert server.requests == []
    assert metrics == {"adaptation/ties": 0, "adaptation/undecided": 6}
    assert {row["verdict"] for row in rows} == {"undecided"}
    assert "its budget is 0.01" in caplog.text


def test_a_killed_evaluation_goes_on_with_what_it_has_paid(serve, tmp_path) -> None:
    """Killed after five of twelve calls, of 120 tokens each: all twelve are its cost, and count for its budget."""
    server, scratch, cache = serve(longer), tmp_path / "scratch", tmp_path / "answers"
    prices = {"input_price": 1.0, "output_price": 2.0, "parallel": 1}
    ask, asked = JudgeClient.ask, []

    def killed_at_the_sixth(self, *arguments):
        if len(asked) == 5:
            raise KeyboardInterrupt
        asked.append(1)
        return ask(self, *arguments)

    with pytest.MonkeyPatch.context() as patch, keeping(scratch):
        patch.setattr(JudgeClient, "ask", killed_at_the_sixth)
        with pytest.raises(KeyboardInterrupt):
            evaluated(server, cache=cache, **prices)
    assert len(server.requests) == 5
    with keeping(scratch):
        _, metrics = evaluated(server, cache=cache, **prices)
        spent = kept_folder() / SPENT
    assert len(server.requests) == metrics["cost/judge_calls"] == 12
    assert metrics["cost/judge_price"] == pytest.approx(12 * 120e-6)
    one_more = [{"role": "user", "content": "?"}]  # estimated as more than one call's 120
    client = JudgeClient(settings(server, budget=13 * 120e-6, **prices), None, spent)
    with contextlib.closing(client), pytest.raises(UnansweredError, match="budget"):
        client.ask(one_more, parse_verdict, "?")
    with keeping(tmp_path / "of another policy"):
        _, metrics = evaluated(server, cache=cache, **prices)
    assert (metrics["cost/judge_calls"], metrics["cost/judge_price"]) == (0, 0), "its answers were known"


def test_the_price_is_logged_before_the_first_call(serve, caplog) -> None:
    caplog.set_level("INFO", "qadapter.judging.endpoint_asking")
    told: list[str] = []

    def listen(first: str, second: str, number: int) -> str:
        told.append(caplog.text)
        return longer(first, second, number)

    evaluated(serve(listen), input_price=1.0, output_price=1.0, parallel=1)
    assert "judge fake: 12 calls (and 0 known answers), about 0.00" in told[0]


def test_the_key_is_written_nowhere(serve, tmp_path, monkeypatch, caplog) -> None:
    """Not even where a server repeats it in its refusal."""
    monkeypatch.setenv("QADAPTER_SOME_KEY", "sk-very-secret")
    caplog.set_level("DEBUG")
    good, bad = serve(longer), serve(lambda *_: (401, {"error": "wrong key sk-very-secret"}, 0))
    for server in (good, bad):
        evaluated(server, cache=tmp_path / "answers.jsonl", api_key_variable="QADAPTER_SOME_KEY")
        assert set(server.keys) == {"Bearer sk-very-secret"}
    assert (tmp_path / "answers.jsonl").stat().st_size > 0
    assert "sk-very-secret" not in (tmp_path / "answers.jsonl").read_text()
    assert "wrong key …" in caplog.text
    assert "sk-very-secret" not in caplog.text
    assert "sk-very-secret" not in str(settings(good, api_key_variable="QADAPTER_SOME_KEY").model_dump())


def test_a_key_from_a_file_has_a_line_end_that_is_not_sent(serve, monkeypatch) -> None:
    """Docker and Kubernetes hand a secret on as it lies in its file, the line end included."""
    monkeypatch.setenv("QADAPTER_SOME_KEY", "sk-very-secret\n")
    server = serve(longer)
    assert run(server, api_key_variable="QADAPTER_SOME_KEY").count("win") == 6
    assert set(server.keys) == {"Bearer sk-very-secret"}


def test_a_key_is_masked_however_the_server_repeats_it(serve, monkeypatch) -> None:
    """As Python and as JSON quote it, in a refusal or an answer, and across the place where a note is cut."""
    monkeypatch.setenv("QADAPTER_SOME_KEY", "sk-'\\\"-secret\n")
    key = "sk-'\\\"-secret"
    bodies = [{"error": f"wrong {key}"}, f"wrong {key!r} {key}", "x" * 190 + key]
    for answer in [(401, body, 0) for body in bodies] + [f"nonsense {key!r}", "x" * 190 + key]:
        last = run(serve(lambda *_, answer=answer: answer), api_key_variable="QADAPTER_SOME_KEY").usage.last_error
        assert "…" in last
        assert "sk-" not in last
        assert "secret" not in last
