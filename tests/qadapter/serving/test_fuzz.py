"""Any request gets an answer below 500: made up by hypothesis, bounded in time, the same ones each time.

For a longer run: QADAPTER_FUZZ=20000 python -m pytest tests/qadapter/serving/test_fuzz.py
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from qadapter.serving.app import create_app
from qadapter.serving.generator import Generator
from qadapter.serving.policies import ServedPolicies
from tests.qadapter.serving.test_serving import save_adapters
from tests.support import templates
from tests.support.templates import with_template

EXAMPLES = int(os.environ.get("QADAPTER_FUZZ", "150"))
SEEN: Counter[int] = Counter()

NUMBERS = st.one_of(
    st.sampled_from([0, 1, -1, 0.5, 1e-40, 1e-42, 1e40, 1e39, 2**63, -(2**64), 1e308, 5e-324]),
    st.floats(allow_nan=True, allow_infinity=True),
    st.integers(-3, 30),
)
TEXT = st.one_of(
    st.text(alphabet="a é😀<>|/\n\u202e\x00\ud800{%}", max_size=12),
    st.sampled_from(["<|end|>", "<eos>", "<think>", "</think>", "<|assistant|>", "base", "residual"]),
)
ANYTHING = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXT),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)),
    max_leaves=5,
)
MESSAGE = st.one_of(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "developer", "user", "assistant"]), "content": TEXT},
        optional={"name": TEXT, "refusal": st.none(), "tool_calls": st.sampled_from([None, []]), "audio": st.none()},
    ),
    st.fixed_dictionaries({"role": TEXT, "content": ANYTHING}, optional={"x": ANYTHING}),
)
FIELDS: dict[str, Any] = {
    "temperature": NUMBERS,
    "top_p": NUMBERS,
    "n": st.integers(-1, 3),
    "stop": st.one_of(TEXT, st.lists(TEXT, max_size=3)),
    "seed": NUMBERS,
    "stream": st.booleans(),
    "logprobs": st.booleans(),
    "top_logprobs": st.integers(-1, 25),
    "alpha_0": NUMBERS,
    "alpha_tilde": NUMBERS,
    "dial": st.one_of(st.builds("{}={}".format, st.sampled_from(["scale", "q-weight", "x"]), NUMBERS), ANYTHING),
    "adapters": st.dictionaries(st.sampled_from(["residual", "plain", "x"]), NUMBERS, max_size=2),
    "compare_base": st.booleans(),
    "chat_template_kwargs": st.dictionaries(
        st.sampled_from(["enable_thinking", "m", "messages"]), ANYTHING, max_size=2
    ),
    "tools": ANYTHING,
    "response_format": ANYTHING,
    "unknown": ANYTHING,
}
# Half of them hold one odd field only, so that the odd one is reached.
SENSIBLE: dict[str, Any] = {
    "model": st.sampled_from(["base", "residual", "plain"]),
    "messages": st.lists(MESSAGE, min_size=1, max_size=3),
    "max_tokens": st.integers(1, 3),
}
REQUEST = st.one_of(
    *[st.fixed_dictionaries({**SENSIBLE, name: field}) for name, field in FIELDS.items()],
    st.fixed_dictionaries({**SENSIBLE, "max_tokens": NUMBERS}, optional=FIELDS),
    ANYTHING,
)


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Generator]:
    root = tmp_path_factory.mktemp("fuzz")
    save_adapters(root)
    made = Generator(ServedPolicies.load({name: root / name for name in ("residual", "plain")}, root / "base"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def client(generator: Generator) -> Iterator[TestClient]:
    with TestClient(create_app(generator), raise_server_exceptions=False) as made:
        yield made


@pytest.mark.slow
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="QADAPTER_FUZZ" not in os.environ,
    suppress_health_check=list(HealthCheck),
)
@given(request=REQUEST, template=st.sampled_from([None, *templates.ALL.values()]))
def test_any_request_is_answered_below_500(
    client: TestClient, generator: Generator, request: Any, template: str | None
) -> None:
    own = generator.policies.tokenizer
    written = with_template(template)
    generator.policies._tokenizers = dict.fromkeys(("residual", "plain"), written)
    generator.policies.tokenizer = written
    try:
        answer = client.post("/v1/chat/completions", content=json.dumps(request).encode())
    finally:
        generator.policies.tokenizer = own
    SEEN[answer.status_code] += 1
    assert answer.status_code in (200, 400, 404), answer.text
    if answer.status_code == 200 and "text/event-stream" in answer.headers["content-type"]:
        assert answer.text.endswith("data: [DONE]\n\n")
    elif answer.status_code != 200:
        assert answer.json()["error"]["message"]


@pytest.mark.slow
def test_the_fuzz_reached_both_sides() -> None:
    """Else the test above shows nothing: a good part was answered, a good part refused."""
    print(dict(SEEN))
    assert SEEN[200] > 0.1 * EXAMPLES
    assert SEEN[400] > 0.1 * EXAMPLES
