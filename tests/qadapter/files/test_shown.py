"""What people read: no secret, no hidden character, no formula; and what of a config is refused as a secret."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from pydantic import ValidationError
from transformers import trainer_utils
from transformers.trainer_utils import sort_checkpoints

from qadapter.config.customization import Customization
from qadapter.config.experiment import load_experiment
from qadapter.config.sources import Source
from qadapter.errors import QAdapterError
from qadapter.files import shown as module
from qadapter.files.shown import csv_cell, guard_logs, quiet_libraries, remember_secret, shown, to_csv, visible
from qadapter.files.url_secrets import check_variable, filled_in, secrets_in
from qadapter.judging.endpoint_settings import EndpointSettings

CANARY = "pa55word-of-the-test"


@pytest.fixture(autouse=True)
def _nothing_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_filled", {})


@pytest.mark.parametrize(
    "secret",
    [
        f"https://example.org/d.json?code={CANARY}",
        f"https://example.org/d.json?pass={CANARY}",
        f"https://example.org/d.json?t={CANARY}",
        f"https://example.org/d.json?format={CANARY}/with+a+slash",
        f"https://example.org/d.json#access_token={CANARY}",
        f"https://me:{CANARY}@example.org/d.json",
        f"hf://datasets/a/b?sig={CANARY}",
        "hf_" + CANARY.replace("-", "") * 2,
        "sk-" + CANARY * 2,
        "-----BEGIN OPENSSH PRIVATE KEY-----\n" + CANARY,
    ],
)
@pytest.mark.parametrize("place", ["path", "extra", "key"])
def test_a_literal_secret_is_refused_at_any_depth(secret: str, place: str) -> None:
    changes: dict[str, Any] = {
        "path": {"sources.academy.path": secret},
        "extra": {
            "evaluation.adaptation.judge": "endpoint",
            "evaluation.adaptation.endpoint": {
                "url": "https://j.org/v1",
                "model": "m",
                "extra": {"a": [{"b": secret}]},
            },
        },
        "key": {
            "evaluation.adaptation.endpoint": {"url": "https://j.org/v1", "model": "m", "extra": {secret: 1}},
        },
    }[place]
    with pytest.raises(QAdapterError) as refused:
        load_experiment("smoke", changes)
    assert CANARY not in str(refused.value)
    assert "environment variable" in str(refused.value)
    at = {"path": "sources.academy.path", "extra": "endpoint.extra.a.0.b", "key": "endpoint.extra"}[place]
    assert at in str(refused.value)


@pytest.mark.parametrize(
    ("key", "refused"),
    [
        *((name, True) for name in ("api_key", "apiKey", "Authorization", "x-api-key", "password", "client_secret")),
        *((name, True) for name in ("access_token", "hub_token", "overrides.judge.api_key", "Cookie")),
        *((name, False) for name in ("api_key_variable", "tokenizer", "pad_token", "eos_token", "token_file", "key")),
        *((name, False) for name in ("author", "passage", "keys_per_row", "sign")),
    ],
)
def test_a_key_whose_name_tells_takes_no_literal_text(key: str, refused: bool) -> None:
    assert bool(list(secrets_in({"a": {key: "anything"}}))) == refused
    assert list(secrets_in({"a": {key: "Bearer ${QADAPTER_KEY}"}})) == []
    assert list(secrets_in({"a": {key: 3}})) == []


def test_a_public_parameter_is_named_beside_its_url() -> None:
    url = "https://example.org/d.json?id=17&download=true"
    with pytest.raises(ValidationError, match=r"path: a URL may have a secret in its query \(id=…\).*public_query"):
        Source(path=url)
    assert Source(path=url, public_query=("id",)).path == url


def test_every_kind_of_config_is_looked_at(tmp_path: Path) -> None:
    source = {"path": "incoming"}
    fields = {"name": "mine", "model_name": "mine", "profile": "smoke", "domain": "harmless", "source": source}
    assert Customization.model_validate(fields).name == "mine"
    with pytest.raises(ValidationError, match=r"overrides\.methods\.x"):
        Customization.model_validate(fields | {"overrides": {"methods": {"x": f"https://a:{CANARY}@b.org"}}})
    with pytest.raises(ValidationError, match="extra"):
        EndpointSettings(url="https://j.org/v1", model="m", extra={"headers": {"Authorization": f"Bearer {CANARY}"}})


def test_only_allowed_variables_fill_a_url(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "HOME", "QADAPTER_ALLOW_VARIABLES"):
        monkeypatch.setenv(name, CANARY)
        with pytest.raises(QAdapterError, match=f"{name} is not sent to the address https://evil.example/") as refused:
            filled_in(f"https://evil.example/${{{name}}}")
        assert CANARY not in str(refused.value)
    monkeypatch.setenv("DATA_TOKEN", CANARY)
    monkeypatch.setenv("QADAPTER_ALLOW_VARIABLES", "OTHER, DATA_TOKEN")
    assert filled_in("https://x.org/d?t=${DATA_TOKEN}") == f"https://x.org/d?t={CANARY}"
    monkeypatch.delenv("QADAPTER_ALLOW_VARIABLES")
    with pytest.raises(QAdapterError, match="DATA_TOKEN is not sent to the judge"):
        check_variable("DATA_TOKEN", "the judge")
    check_variable("OPENAI_API_KEY", "the judge", known=["OPENAI_API_KEY"])


def test_what_was_filled_in_is_masked_in_errors_and_logs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As it is and as a URL quotes it: `p/1` is also `p%2F1`."""
    monkeypatch.setenv("QADAPTER_T", f"{CANARY}/1")
    filled_in("https://x.org/${QADAPTER_T}")
    said = f"404 Not Found: /{CANARY}/1, moved to /{CANARY}%2F1"
    assert shown(said) == "404 Not Found: /${QADAPTER_T}, moved to /${QADAPTER_T}"
    assert CANARY not in str(QAdapterError(said))
    before = logging.getLogRecordFactory()
    guard_logs()
    try:
        logging.getLogger("anybody").warning("%s: %s", "said", said)
        factory = logging.getLogRecordFactory()
        guard_logs()
        assert logging.getLogRecordFactory() is factory
    finally:
        logging.setLogRecordFactory(before)
    assert "/${QADAPTER_T}, moved" in caplog.text
    assert CANARY not in caplog.text


def test_short_values_are_no_secrets() -> None:
    remember_secret("abc", "A")
    assert shown("an abc of it") == "an abc of it"


def test_hidden_characters_are_made_visible() -> None:
    assert visible("\x1b[31mred\x1b[0m") == r"\x1b[31mred\x1b[0m"
    assert visible("a\u202eb\u2066c\u200bd\ufeff") == r"a\u202eb\u2066c\u200bd\ufeff"
    assert visible("a\rb\x9b\ud800\u2028") == r"a\x0db\x9b\ud800\u2028"
    assert (
        visible("line\n\tnext, naïve 日本語 👩\u200d🚀 می\u200cخواهم")
        == "line\n\tnext, naïve 日本語 👩\u200d🚀 می\u200cخواهم"
    )
    assert visible("a\nb", keep="") == r"a\x0ab"


def test_a_spreadsheet_takes_no_cell_for_a_formula(tmp_path: Path) -> None:
    assert csv_cell("=HYPERLINK(1)") == "'=HYPERLINK(1)"
    assert csv_cell("  @SUM(A1)") == "'  @SUM(A1)"
    assert csv_cell("\t=1") == "'\t=1"
    assert [csv_cell(c) for c in ("-0.10 ± 0.2", "+.1* [-.2, .3]", "a=b", -1.5)] == [
        "-0.10 ± 0.2",
        "+.1* [-.2, .3]",
        "a=b",
        -1.5,
    ]
    assert [csv_cell(cell) for cell in ("+A1", "-1+cmd|x", "@x")] == ["'+A1", "'-1+cmd|x", "'@x"]
    file = tmp_path / "t.csv"
    to_csv(pd.DataFrame({"=head": ["=1+1", "fine"], "score": [-0.5, 1.0]}), file)
    assert file.read_text() == "'=head,score\n'=1+1,-0.5\nfine,1.0\n"


def test_checkpoints_of_less_than_a_second_warn_of_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (9, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
    trainer_utils.logger.warning_once.cache_clear()  # type: ignore[attr-defined]
    quiet_libraries()
    with caplog.at_level(logging.WARNING):
        found = sort_checkpoints(str(tmp_path), use_mtime=True)
    assert [Path(each).name for each in found] == ["checkpoint-9", "checkpoint-10"]
    assert not caplog.records
