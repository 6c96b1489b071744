"""Secrets stay out of everything that is written, nothing foreign is executed, no name leads out of its folder."""

from __future__ import annotations

import ast
import base64
import contextlib
import gzip
import http.server
import inspect
import json
import pickle
import re
import threading
import traceback
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import transformers.trainer
import yaml

from flows.commands.serve import _address
from qadapter.config.customization import load_customization
from qadapter.config.experiment import load_experiment
from qadapter.config.model import ModelSettings
from qadapter.config.sources import Source
from qadapter.config.sweep import load_sweep
from qadapter.errors import QAdapterError
from qadapter.files.shown import shown
from qadapter.files.url_secrets import filled_in, public_address, refuse_secrets
from qadapter.judging.endpoint_client import JudgeClient, UnansweredError
from qadapter.judging.endpoint_settings import EndpointSettings
from qadapter.policy.files import read_settings
from qadapter.policy.loading import load_base, load_policy
from qadapter.policy.model import QAdapterForCausalLM
from tasks.tracking.models import find_served_model
from tasks.tracking.store import AwayError
from tasks.tracking.tracker import Tracker
from tests.support.commands import subcommand
from tests.support.modes import others_modes
from tests.support.paths import PROJECT_ROOT
from tests.support.real_runs import SECRETS, Server, Undisturbed
from tests.support.tiny_chat import byte_tokenizer, tiny_llama
from tests.support.tiny_deliveries import CONFIG

main, compare, serve_model = subcommand("run"), subcommand("compare"), subcommand("serve-model")

CODE = sorted(path for floor in ("qadapter", "tasks", "flows") for path in (PROJECT_ROOT / floor).rglob("*.py"))


# ---- secrets


_BASE64 = re.compile(rb"[A-Za-z0-9+/_-]{16,}={0,2}")


def decoded(content: bytes, depth: int = 3) -> bytes:
    """A content, and what is in it in base64 (either alphabet), gzip and zlib, also one in the other."""
    if depth == 0:
        return content
    inner = []
    for start in (match.start() for match in re.finditer(rb"\x1f\x8b\x08|\x78[\x01\x5e\x9c\xda]", content)):
        with contextlib.suppress(zlib.error):
            inner.append(zlib.decompressobj(wbits=47).decompress(content[start:], 2**24))
    for match in _BASE64.finditer(content):
        text = match[0].rstrip(b"=").translate(bytes.maketrans(b"-_", b"+/"))
        if len(text) < 2**22:
            inner.append(base64.b64decode(text[: len(text) - (len(text) % 4 == 1)] + b"==="))
    return content + b"".join(decoded(part, depth - 1) for part in inner)


def files_with_secrets(places: Sequence[Path]) -> tuple[list[Path], dict[Path, list[bytes]]]:
    """All files below some folders, and those that hold a secret of `real_runs.py`, in content or name.

    Contents are decoded first (`decoded`); but for weights, which are numbers.
    """
    files = [file for place in places for file in place.rglob("*") if file.is_file()]
    found = {}
    for file in files:
        try:
            content = file.read_bytes()
        except FileNotFoundError:  # an SQLite log, deleted since by the last process that used it
            continue
        if file.suffix != ".safetensors":
            content = decoded(content)
        needles = [secret.encode() for secret in SECRETS.values()]
        if held := [needle for needle in needles if needle in content or needle.decode() in str(file)]:
            found[file] = held
    return files, found


def test_the_search_for_secrets_decodes(tmp_path: Path) -> None:
    """A pickle in base64 in JSON, as Prefect stores one by default; a gzip in it; a name of a file."""
    secret = SECRETS["QADAPTER_DATA_TOKEN"]
    error = QAdapterError(f"{secret} was refused")
    pickled = base64.b64encode(pickle.dumps(error)).decode()
    (tmp_path / "pickle").write_text(json.dumps({"result": pickled}))
    (tmp_path / "url-safe").write_bytes(b"x=" + base64.urlsafe_b64encode(gzip.compress(f"?>~ {secret}".encode())))
    (tmp_path / "zlib").write_bytes(b"head" + zlib.compress(secret.encode()) + b"tail")
    (tmp_path / secret).write_text("")
    (tmp_path / "clean").write_text(json.dumps({"result": base64.b64encode(b"nothing in here").decode()}))
    _, found = files_with_secrets([tmp_path])
    assert sorted(file.name for file in found) == sorted(["pickle", "url-safe", "zlib", secret])


@pytest.mark.slow
def test_no_secret_is_in_anything_that_a_run_wrote(undisturbed: Undisturbed, prefect_server: Server) -> None:
    """Workspace, stages, MLflow's database and artifacts, Prefect's database and logs, and what was printed."""
    places = [undisturbed.home.folder, prefect_server.log.parent]
    files, found = files_with_secrets(places)
    assert {"mlflow.db", "prefect.db", "runs.log", "manifest.json", "server.log"} <= {file.name for file in files}
    assert len(files) > 100
    assert found == {}
    assert others_modes(*places).keys() <= {str(prefect_server.log)}, "which this test opened itself"
    fetched = list(undisturbed.home.folder.glob(".qadapter/downloads/urls/*harmless.jsonl"))
    assert len(fetched) == 1, "the source behind the token was read"


@pytest.mark.parametrize(
    "url",
    [
        "https://me:pa55word@example.org/data.json",
        "https://pa55word@example.org/data.json",
        "https://example.org/data.json?token=pa55word",
        "https://example.org/data.json?a=1&X-Amz-Signature=pa55word",
        "s3://key:pa55word@bucket/data.json",
    ],
)
def test_a_config_with_a_secret_in_a_url_is_refused(
    url: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the command, before Prefect or MLflow hear of it, and the message does not repeat it."""
    monkeypatch.setenv("QADAPTER_HOME", str(tmp_path))
    assert main(["--profile", "smoke", f"sources.academy.path={json.dumps(url)}"]) == 2
    message = capsys.readouterr().err
    assert "sources.academy" in message
    assert "environment variable" in message
    assert "pa55word" not in message
    assert not list(tmp_path.rglob("*.db"))


URL = "https://me:pa55word@example.org/data.json"


@pytest.mark.parametrize(
    ("place", "changes"),
    [
        ("source", {"source": {"path": URL}}),
        ("source", {"source": {"path": "https://example.org/data.json?token=pa55word"}}),
        ("source", {"source": {"path": "incoming", "heldout_path": URL}}),
        ("sources.academy", {"overrides": {"sources.academy.path": URL}}),
        ("sources.academy", {"overrides": {"sources": {"academy": {"path": "d.json", "heldout_path": URL}}}}),
        ("sources.mine", {"overrides": {"sources.mine": {"path": URL}}}),
    ],
)
def test_a_customisation_with_a_secret_in_a_url_is_refused(
    place: str, changes: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any
) -> None:
    """Like a config: before Prefect or MLflow hear of it, and the message does not repeat it."""
    monkeypatch.setenv("QADAPTER_HOME", str(tmp_path))
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(CONFIG | changes))
    for command in ("customize", "check"):
        assert subcommand(command)(["--config", str(file)]) == 2
        message = capsys.readouterr().err
        assert place in message
        assert "environment variable" in message
        assert "pa55word" not in message
    assert [found.name for found in tmp_path.iterdir()] == ["mine.yaml"]


@pytest.mark.parametrize(
    "text", ["source: https://me:pa55word@example.org/d", "{source: [https://me:pa55word@example.org"]
)
def test_a_misplaced_url_is_repeated_without_its_password(text: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    for load in (load_customization, load_experiment, load_sweep):
        with pytest.raises(QAdapterError) as refused:
            load(str(file))
        assert "pa55word" not in str(refused.value)
    with pytest.raises(QAdapterError) as refused:
        load_experiment("smoke", {"sources.academy": "https://me:pa55word@example.org/d"})
    assert "sources.academy" in str(refused.value)
    assert "pa55word" not in str(refused.value)


def test_urls_without_secrets_pass() -> None:
    for url in (
        "https://example.org/data.json?download=true&page=2",
        "https://example.org/data.json?token=${QADAPTER_DATA_TOKEN}",
        "https://${QADAPTER_LOGIN}@example.org/data.json",
        "hub:Anthropic/hh-rlhf",
        "{data}/hh-rlhf/harmless.jsonl",
        "/data/odd?token=name.json",
        "s3://bucket/data.json",
    ):
        refuse_secrets(url)
        assert Source(path=url).path == url


def test_the_environment_fills_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QADAPTER_DATA_TOKEN", "pa55word")
    assert filled_in("https://x.org/d?token=${QADAPTER_DATA_TOKEN}") == "https://x.org/d?token=pa55word"
    monkeypatch.delenv("QADAPTER_DATA_TOKEN")
    with pytest.raises(QAdapterError, match="environment variable QADAPTER_DATA_TOKEN, which is not set"):
        filled_in("https://x.org/d?token=${QADAPTER_DATA_TOKEN}")


def test_what_is_shown_of_a_url() -> None:
    assert shown("https://me:pw@x.org:80/d.json?token=pw and s3://k:v@b/d") == "https://x.org:80/d.json?… and s3://b/d"
    assert shown('["http://x.org/d?a=1","http://y.org/d"]') == '["http://x.org/d?…","http://y.org/d"]'
    assert shown("me@example.org, 3:4, a?b") == "me@example.org, 3:4, a?b"
    assert shown("https://me:p@55@x.org/d") == "https://x.org/d"
    assert public_address("https://me:p@55@x.org/a b?token=p w#p") == "https://x.org/a b"


class _Echo(http.server.BaseHTTPRequestHandler):
    """Refuses every key and repeats it, as careless servers do."""

    def do_POST(self) -> None:
        body = f"Incorrect API key provided: {self.headers['Authorization']}".encode()
        self.send_response(401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def echo() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Echo) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()


def test_a_judge_that_repeats_its_key(echo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QADAPTER_JUDGE_KEY", "sk-pa55word")
    settings = EndpointSettings(url=echo, model="judge", api_key_variable="QADAPTER_JUDGE_KEY")
    client = JudgeClient(settings, tmp_path / "cache.jsonl")
    with pytest.raises(UnansweredError, match="refused"):
        client.ask([{"role": "user", "content": "?"}], str, "?")
    client.close()
    assert client.usage.last_error == "status 401: Incorrect API key provided: Bearer …"
    assert "pa55word" not in repr(client.settings) + repr(client.usage)
    assert not any("pa55word" in file.read_text() for file in tmp_path.iterdir())


class _Empty(_Echo):
    """Stands for MLflow with nothing in it."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    do_GET = do_POST  # noqa: N815 - the server's own name


def test_comparing_unknown_runs_hides_mlflows_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Empty) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:pa55word@127.0.0.1:{server.server_port}")
        monkeypatch.setenv("QADAPTER_HOME", str(tmp_path))
        assert compare(["wrong", "--output", str(tmp_path / "out")]) == 2
        server.shutdown()
    message = capfd.readouterr().err
    assert f"no run has the id or name 'wrong' at http://127.0.0.1:{server.server_port}" in message
    assert "pa55word" not in message


@pytest.mark.parametrize("command", ["serve-model", "tracker"])
def test_the_password_of_mlflows_address_is_hidden(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A server that is away, with a password in its address: printed, logged, spooled, in tracebacks."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:pa55word@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("QADAPTER_HOME", str(tmp_path))
    if command == "serve-model":
        assert serve_model(["policy@champion"]) == 2
        message = capfd.readouterr().err
        with pytest.raises(AwayError) as caught:
            find_served_model("policy/1")
        told = [*traceback.format_exception(caught.value), message]
        assert "has no model" not in message
        assert "http://127.0.0.1:9 does not answer" in message
    else:
        tracker = Tracker.for_project(tmp_path)
        tracker.log_metrics("0" * 32, {"train/loss": 0.5})
        assert not tracker.deliver()
        told = [capfd.readouterr().err]
        told += [file.read_text() for file in tmp_path.rglob("*") if file.is_file()]
        assert any("train/loss" in text for text in told), "it was spooled"
    assert not any("pa55word" in text for text in told if "setenv" not in text)


# ---- servers


def test_servers_listen_on_loopback() -> None:
    """What the Makefile and `make serve` start; `test_deployments.py` refuses other addresses in a real run."""
    makefile = (PROJECT_ROOT / "Makefile").read_text()
    starts = [line for line in makefile.splitlines() if re.search(r"mlflow ui|mlflow server|uvicorn", line)]
    assert starts
    assert all("--host 127.0.0.1" in line for line in starts)
    assert _address("http://localhost:4200/api") == ("127.0.0.1", 4200)
    assert _address("http://[::1]:4300/api") == ("::1", 4300)
    with pytest.raises(QAdapterError, match="loopback address only"):
        _address("http://0.0.0.0:4200/api")
    everywhere = [file for file in [*CODE, PROJECT_ROOT / "Makefile"] if "0.0.0.0" in file.read_text()]
    assert everywhere == []


@pytest.mark.slow
def test_prefects_server_listens_on_loopback(prefect_server: Server) -> None:
    """The sockets themselves, of the command that `make serve` uses."""
    assert prefect_server.process is not None
    family = [psutil.Process(prefect_server.process.pid)]
    family += family[0].children(recursive=True)
    listening = {c.laddr.ip for p in family for c in p.net_connections() if c.status == psutil.CONN_LISTEN}
    assert listening == {"127.0.0.1"}


# ---- names and paths


@pytest.mark.parametrize("name", ["../outside", "a/b", "/etc", "..", ".", "a\\b", "", "a\nb", "A b", "x" * 65])
@pytest.mark.parametrize("place", ["name", "domains", "sources"])
def test_names_of_folders_are_names(place: str, name: str) -> None:
    value: Any = name if place == "name" else {name: {"source": "helpful", "base": "helpful"}}
    with pytest.raises(QAdapterError, match=place):
        load_experiment("smoke", {place: value})


@pytest.mark.parametrize("name", ["../x", "a/b", "/etc", "..", ".", "a\\b", "", "a\nb", "A b", "x" * 65])
@pytest.mark.parametrize("place", ["name", "model_name", "domain"])
def test_names_of_a_customisation_are_names(place: str, name: str, tmp_path: Path) -> None:
    """They become files and folders of the workspace, and a model in MLflow."""
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(CONFIG | {place: name}))
    with pytest.raises(QAdapterError, match=rf"1 problem in mine\.yaml:\n  {place}: String should"):
        load_customization(str(file))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and a Q-Adapter on it, as folders."""
    from peft import LoraConfig, get_peft_model

    from qadapter.policy.objective import Objective

    root = tmp_path_factory.mktemp("policy")
    base = tiny_llama()
    base.save_pretrained(root / "base")
    byte_tokenizer().save_pretrained(root / "base")
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    QAdapterForCausalLM(get_peft_model(base, lora), Objective.preset("residual")).save_pretrained(root / "adapter")
    return root


def copy_of(folder: Path, target: Path) -> Path:
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


@pytest.mark.parametrize("name", ["../outside", "/etc", "..", "a/b", ""])
def test_an_adapter_cannot_name_weights_elsewhere(adapter: Path, tmp_path: Path, name: str) -> None:
    folder = copy_of(adapter / "adapter", tmp_path / "adapter")
    copy_of(adapter / "adapter", tmp_path / "outside")
    settings = json.loads((folder / "q_adapter.json").read_text())
    settings["adapter_weights"] = {name: 1.0}
    (folder / "q_adapter.json").write_text(json.dumps(settings))
    with pytest.raises(QAdapterError, match="no adapter's name"):
        read_settings(folder)


# ---- nothing foreign is executed


class _Bomb:
    """A pickle that leaves a trace when it is loaded."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.trace,)


def only_pickle(folder: Path, weights: str, trace: Path) -> Path:
    """Put a pickle that runs code in the place of a folder's weights."""
    for file in folder.glob("*.safetensors"):
        file.unlink()
    torch.save(_Bomb(trace), folder / weights)
    return folder


def test_a_base_of_pickles_is_refused(adapter: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    base = only_pickle(copy_of(adapter / "base", tmp_path / "base"), "pytorch_model.bin", trace)
    with pytest.raises(QAdapterError, match=r"could not be loaded.*safetensors"):
        load_base(base, ModelSettings(pretrained=str(base)))
    with pytest.raises(QAdapterError, match="cannot be loaded"):
        QAdapterForCausalLM.from_pretrained(adapter / "adapter", base_model=base)
    assert not trace.exists()


@pytest.mark.parametrize("kind", ["Q-Adapter", "plain PEFT"])
def test_an_adapter_of_pickles_is_refused(adapter: Path, tmp_path: Path, kind: str) -> None:
    trace = tmp_path / "trace"
    folder = only_pickle(copy_of(adapter / "adapter", tmp_path / "adapter"), "adapter_model.bin", trace)
    if kind == "plain PEFT":
        (folder / "q_adapter.json").unlink()
    with pytest.raises(QAdapterError, match=r"adapter_model\.safetensors, and no other kind of weight file is loaded"):
        load_policy(tiny_llama(), folder)
    assert not trace.exists()


def calls(tree: ast.AST, *names: str) -> Iterator[ast.Call]:
    """Calls of functions by their dotted names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in names:
            yield node


def test_no_code_of_ours_reads_pickles_or_runs_remote_code() -> None:
    forbidden = {"pickle", "cloudpickle", "joblib", "dill", "shelve", "marshal"}
    for file in CODE:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not imported & forbidden, file
        assert not list(calls(tree, "torch.load", "eval", "exec", "os.system")), file
        names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert not names & {"Loader", "FullLoader", "UnsafeLoader", "unsafe_load", "full_load"}, file
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle", "shell"):
                assert not (isinstance(node.value, ast.Constant) and node.value.value is True), file


def test_remote_code_is_off_in_every_profile() -> None:
    for file in sorted((PROJECT_ROOT / "configs").rglob("*.yaml")):
        assert not re.search(r"trust_remote_code:\s*true", file.read_text(), re.IGNORECASE), file
    assert ModelSettings(pretrained="x").trust_remote_code is False


def test_transformers_reads_checkpoints_as_weights_only() -> None:
    """A checkpoint's optimizer.pt, scheduler.pt and rng_state.pth are pickles; their reader takes tensors alone."""
    loads = list(calls(ast.parse(inspect.getsource(transformers.trainer)), "torch.load"))
    assert len(loads) >= 5
    for call in loads:
        assert [ast.unparse(word.value) for word in call.keywords if word.arg == "weights_only"] == ["True"]
