"""A registered version, served by MLflow's own command and by this project's, against direct generation."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import mlflow
import openai
import pytest
import torch
import yaml

from flows.commands.serve_model import watch
from qadapter.config.model import ModelSettings
from qadapter.errors import QAdapterError
from qadapter.files.artifacts import digest_tree, list_files
from qadapter.policy.model import QAdapterForCausalLM
from qadapter.policy.objective import Objective
from qadapter.preferences.tokenize import prompt_ids
from qadapter.serving.policies import ServedPolicies
from qadapter.serving.registered import DamagedError, digest_code
from tasks.tracking.models import check_files, find_adapter, find_base, find_served_model, log_served_model
from tasks.tracking.tracker import Tracker
from tests.support.commands import subcommand
from tests.support.damage import cut, damaged, zero
from tests.support.forked_process import ForkedProcess, be_module
from tests.support.real_runs import free_port
from tests.support.tiny_chat import byte_tokenizer, tiny_llama
from tests.support.tiny_models import lora, moved

main = subcommand("serve-model")

MESSAGES = [{"role": "user", "content": "Name a colour."}]
NEW = 16
MODEL = ModelSettings(pretrained="x", dtype="float32")
WEIGHTS = {"adapter": "adapter_model.safetensors", "base": "model.safetensors"}


class Registered:
    """A store with one registered version, `policy@champion`."""

    def __init__(self, root: Path) -> None:
        self.root, self.home = root, root / "home"
        self.base, self.adapter = root / "model", root / "trained" / "model"
        tiny_llama().save_pretrained(self.base)
        byte_tokenizer().save_pretrained(self.base)
        policy = QAdapterForCausalLM.from_base(tiny_llama(), lora(), Objective.preset("residual"))
        moved(policy, scale=0.2).save_pretrained(self.adapter)
        self.tracker = Tracker.for_project(self.home)
        self.run = self.tracker.start_parent("customise", "candidate", params={"a": 1})
        self.logged = root  # until there is a version
        self.tracker.log_metrics(self.run, {"adaptation/score": 0.5})

    def log(self, **options: Any) -> str:
        return log_served_model(self.run, **{"base": self.base, "adapter": self.adapter, **options})

    def register(self, uri: str) -> None:
        self.logged = Path(uri)
        self.tracker.call("create_registered_model", "policy")
        self.tracker.call("create_model_version", "policy", uri, run_id=self.run)
        self.tracker.call("set_registered_model_alias", "policy", "champion", "1")

    def expected(self, **dials: float) -> str:
        """Greedy generation from the folders that were logged, without any of the server's code."""
        policy = QAdapterForCausalLM.from_pretrained(self.adapter, self.base)
        ids = torch.tensor([prompt_ids(byte_tokenizer(), MESSAGES)])  # type: ignore[arg-type]
        settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
        out = policy.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings, **dials)
        return str(byte_tokenizer().decode(out[0, ids.shape[1] :], skip_special_tokens=True))


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registered]:
    with pytest.MonkeyPatch.context() as patch:
        made = Registered(tmp_path_factory.mktemp("served"))
        patch.setenv("QADAPTER_HOME", str(made.home))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        made.register(made.log(metadata={"data.digest": "abc"}, model=MODEL))
        assert "MLFLOW_TRACKING_URI" not in os.environ
        # What was logged must stand on its own
        shutil.move(made.base, made.root / "elsewhere")
        shutil.move(made.adapter, made.root / "elsewhere-too")
        made.base, made.adapter = made.root / "elsewhere", made.root / "elsewhere-too"
        yield made


def test_the_logged_folder_holds_no_pickle(registered: Registered) -> None:
    folder = registered.logged
    names = [file.name for file in folder.rglob("*") if file.is_file()]
    assert {"MLmodel", "served_policy.py", "adapter_model.safetensors", "model.safetensors", "composition.py"} <= {
        *names
    }
    assert [name for name in names if re.search(r"\.(pkl|pickle|bin|pt|pth|joblib|pyc)$", name)] == []
    pickles = [
        file for file in folder.rglob("*") if file.is_file() and file.read_bytes()[:2] in (b"\x80\x04", b"\x80\x05")
    ]
    assert pickles == []  # by content too: a pickle of protocol 4 or 5 begins so


def test_its_description_says_what_it_is_and_needs(registered: Registered) -> None:
    folder = registered.logged
    described = yaml.safe_load((folder / "MLmodel").read_text())
    assert described["metadata"] == {
        "data.digest": "abc",
        "qadapter.base": "artifact",
        "qadapter.dtype": "float32",
        "qadapter.quantization": "none",
        "qadapter.adapter_digest": digest_tree(registered.adapter),
        "qadapter.base_digest": digest_tree(registered.base),
        "qadapter.code_digest": digest_code(folder / "code" / "qadapter"),
        "qadapter.loader_digest": digest_tree(folder / "served_policy.py"),
    }
    assert described["run_id"] == registered.run
    assert "python_model" not in described["flavors"]["python_function"]  # it would name a pickle
    lines = (folder / "requirements.txt").read_text().split()
    assert f"torch=={torch.__version__.partition('+')[0]}" in lines
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines), lines


def test_the_files_behind_a_version(registered: Registered) -> None:
    found = find_served_model("policy/1")
    assert found == find_served_model("policy@champion")
    assert found.name == "policy"
    for logged, original in ((found.adapter, registered.adapter), (Path(found.base), registered.base)):
        for file in original.iterdir():
            assert (logged / file.name).read_bytes() == file.read_bytes(), file


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("policy", "is not a version"),
        ("policy@nobody", "has no model 'policy@nobody'"),
        ("other/1", "no model 'other/1'"),
    ],
)
def test_what_is_not_registered_is_refused(model: str, says: str, registered: Registered) -> None:
    with pytest.raises(QAdapterError, match=says):
        find_served_model(model)
    assert "MLFLOW_TRACKING_URI" not in os.environ


def test_an_adapter_that_is_not_there_is_refused(registered: Registered, tmp_path: Path) -> None:
    with pytest.raises(QAdapterError, match="There is no adapter folder"):
        registered.log(adapter=tmp_path / "nothing")


def test_a_base_of_the_hub_is_named_and_not_copied(registered: Registered, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registered.tracker.uri)
    uri = registered.log(base="owner/model", name="named")
    assert os.environ["MLFLOW_TRACKING_URI"] == registered.tracker.uri
    registered.tracker.call("create_model_version", "policy", uri, run_id=registered.run)
    found = find_served_model("policy/2")
    assert found.base == "owner/model"
    assert sorted(each.name for each in found.adapter.parent.iterdir()) == [found.adapter.name]


@pytest.mark.parametrize("harm", [cut, zero])
@pytest.mark.parametrize("part", ["adapter", "base"])
def test_damaged_files_are_not_served(
    registered: Registered, part: str, harm: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """By neither server: one sentence says what is damaged, where, and what to do."""
    files = list_files(registered.logged)
    (weights,) = [file for file in files.values() if file.name == WEIGHTS[part]]
    with damaged(weights, harm):
        assert main(["policy@champion"]) == 2
        said = capsys.readouterr().err
        assert f"The {part} of version 1 of 'policy' in MLflow at {registered.tracker.uri} is damaged" in said
        assert f"the files in {weights.parent} are not those that were registered" in said
        assert "Restore them from a backup, or roll back to another version" in said
        with pytest.raises(DamagedError, match=f"The {part} of version 1"):
            check_files("policy/1")
        with pytest.raises(Exception, match=f"The {part} of 'policy' is damaged: the files in .* are not those that"):
            mlflow.pyfunc.load_model(str(registered.logged))  # what MLflow's server loads
    check_files("policy/1")


def test_a_damaged_description_is_said_to_be_one(registered: Registered) -> None:
    with damaged(registered.logged / "MLmodel", zero), pytest.raises(DamagedError, match="Version 1 of 'policy'"):
        find_adapter("policy@champion")


def test_a_versions_tag_says_what_its_files_must_be(registered: Registered) -> None:
    """What was judged counts, not what was logged."""
    created = registered.tracker.call(
        "create_model_version", "policy", str(registered.logged), tags={"adapter_digest": "0" * 64}
    )
    with pytest.raises(DamagedError, match=r"\(sha256 \w{12}…, not 000000000000…\)"):
        find_adapter(f"policy/{created.version}")
    assert Path(find_base(f"policy/{created.version}")).is_dir()


def test_the_files_reach_the_disk_before_they_have_a_name(
    registered: Registered, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed: list[Path] = []
    for module in ("qadapter.files.artifacts", "tasks.tracking.models"):
        monkeypatch.setattr(f"{module}.sync_to_disk", pushed.append)
    logged = Path(registered.log(name="pushed"))
    assert {logged, logged.parent, logged.parent.parent, *list_files(logged).values()} <= {*pushed}


def hub_with(folder: Path, base: Path) -> list[str]:
    """The hub's cache with two commits of `owner/model`, the first of them main; returns both."""
    commits = ["a" * 40, "b" * 40]
    model = folder / "models--owner--model"
    for commit in commits:
        shutil.copytree(base, model / "snapshots" / commit)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(commits[0])
    return commits


def test_a_base_of_the_hub_is_served_as_it_was_trained_on(
    registered: Registered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its commit, precision and quantisation stand in the model; that main moves on and breaks changes nothing."""
    first, second = hub_with(tmp_path, registered.base)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    uri = registered.log(base="owner/model", name="pinned", model=ModelSettings(pretrained="x", dtype="bfloat16"))
    created = registered.tracker.call("create_model_version", "policy", uri, run_id=registered.run)
    for file in (tmp_path / "models--owner--model/snapshots" / second).iterdir():
        file.write_bytes(b"broken")
    (tmp_path / "models--owner--model/refs/main").write_text(second)

    found = find_served_model(f"policy/{created.version}")
    assert found.base == "owner/model"
    assert found.numerics == {"dtype": "bfloat16", "quantization": "none", "revision": first}
    served: list[Any] = []
    monkeypatch.setattr(
        "flows.commands.serve_model.serve", lambda adapters, base, **how: served.append((adapters, base, how))
    )
    assert main([f"policy/{created.version}"]) == 0
    ((adapters, base, how),) = served
    del how["host"], how["port"], how["cors_origins"]
    policies = ServedPolicies.load(adapters, base, **how)
    assert all(torch.isfinite(parameter).all() for parameter in policies.policy.parameters())
    assert policies.policy.dtype == torch.bfloat16

    logged = mlflow.pyfunc.load_model(uri)  # what MLflow's server loads; it has the same three
    assert logged.unwrap_python_model()._generator.policies.policy.dtype == torch.bfloat16


def test_only_the_adapter_is_fetched_where_only_it_is_needed(
    registered: Registered, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[str] = []
    real = mlflow.artifacts.download_artifacts

    def fetch(uri: str, **to: Any) -> str:
        fetched.append(uri)
        return str(real(uri, **to))

    monkeypatch.setattr(mlflow.artifacts, "download_artifacts", fetch)
    folder = find_adapter("policy@champion")
    assert (folder / "adapter_model.safetensors").is_file()
    assert fetched == ["models:/policy/1/MLmodel", f"models:/policy/1/{folder.relative_to(registered.logged)}"]
    assert Path(find_base("policy@champion"), "model.safetensors").is_file()


def test_versions_on_one_base_are_served_side_by_side(
    registered: Registered, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each under the name that was given for it; one that is loaded otherwise needs a server of its own."""
    policy = QAdapterForCausalLM.from_base(tiny_llama(), lora(), Objective.preset("residual"))
    moved(policy, scale=0.4).save_pretrained(registered.root / "other")
    create = registered.tracker.call
    create("create_registered_model", "two")
    for adapter, model in ((registered.adapter, MODEL), (registered.root / "other", MODEL), (registered.adapter, None)):
        create("create_model_version", "two", registered.log(adapter=adapter, model=model), run_id=registered.run)
    create("set_registered_model_alias", "two", "champion", "2")
    served: list[Any] = []
    monkeypatch.setattr(
        "flows.commands.serve_model.serve", lambda adapters, base, **how: served.append((adapters, base, how))
    )
    assert main(["two@champion", "two/1"]) == 0
    ((adapters, base, how),) = served
    assert list(adapters) == ["two@champion", "two/1"]
    assert digest_tree(adapters["two/1"]) == digest_tree(registered.adapter)
    assert digest_tree(adapters["two@champion"]) == digest_tree(registered.root / "other")
    policies = ServedPolicies.load(adapters, base, how["dtype"], how["quantization"])
    assert policies.names == ["two@champion", "two/1", "base"]

    assert main(["two/1", "two/3"]) == 2
    assert "two/1 and two/3 have different bases, or bases in different precision" in capsys.readouterr().err
    assert len(served) == 1


def test_a_server_says_that_its_alias_has_moved(registered: Registered, capsys: pytest.CaptureFixture[str]) -> None:
    """Once for each move, and again when it is back; a store that is away for a moment is asked again."""
    move, over = registered.tracker.call, threading.Event()
    move("create_registered_model", "watched")
    for _ in range(2):
        move("create_model_version", "watched", str(registered.logged), run_id=registered.run)
    move("set_registered_model_alias", "watched", "champion", "2")
    watcher = threading.Thread(target=watch, args=({"watched@champion": 2}, over, 0.02))
    watcher.start()
    said = ""

    def heard(line: str) -> bool:
        nonlocal said
        said += capsys.readouterr().err
        return line in said

    try:
        time.sleep(0.2)
        move("delete_registered_model_alias", "watched", "champion")
        for number, line in (
            ("1", "watched@champion is now version 1; this server serves version 2: restart it\n"),
            ("2", "watched@champion is version 2 again, which this server serves\n"),
        ):
            move("set_registered_model_alias", "watched", "champion", number)
            deadline = time.monotonic() + 60
            while not heard(line):
                assert time.monotonic() < deadline, said
                time.sleep(0.02)
    finally:
        over.set()
        watcher.join(60)
    said += capsys.readouterr().err
    assert said.count("restart it") == 1
    assert len(said.splitlines()) == 2


# ---- servers


@contextlib.contextmanager
def running(command: list[str], log: Path, **environment: str) -> Iterator[Any]:
    """A server as a process, in a folder of its own; killed when the block is left."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # MLflow looks for uvicorn there
    variables = {**os.environ, "PATH": path, **environment}
    elsewhere = log.parent / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, cwd=elsewhere, env=variables, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(condition: Any, process: Any, log: Path) -> Any:
    deadline = time.monotonic() + 240
    while not (found := condition()):
        assert process.poll() is None, log.read_text()[-4000:]
        assert time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.3)
    return found


def answers(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 200
    except httpx.HTTPError:
        return False


@pytest.mark.slow
def test_mlflow_serves_it_without_this_project(registered: Registered, tmp_path: Path) -> None:
    broken = tmp_path / "path" / "qadapter"
    broken.mkdir(parents=True)  # stands before an installed qadapter; what the model brings stands before it
    (broken / "__init__.py").write_text("raise RuntimeError('the wrong qadapter')")
    port, log = free_port(), tmp_path / "log"
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/policy@champion"]
    command += ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)]
    environment = {"MLFLOW_TRACKING_URI": registered.tracker.uri, "PYTHONPATH": str(broken.parent)}
    with running(command, log, QADAPTER_HOME=str(registered.home), **environment) as process:
        wait_for(lambda: answers(f"http://127.0.0.1:{port}/ping"), process, log)

        def post(**body: Any) -> httpx.Response:
            return httpx.post(f"http://127.0.0.1:{port}/invocations", json={"messages": MESSAGES, **body}, timeout=120)

        greedy = {"temperature": 0, "max_tokens": NEW}
        answer = post(**greedy).json()
        expected = {"role": "assistant", "content": registered.expected(), "refusal": None}
        assert answer["choices"][0]["message"] == expected
        assert (answer["model"], answer["usage"]["completion_tokens"]) == ("policy", NEW)
        dialled = post(**greedy, alpha_0=0.2, alpha_tilde=2, compare_base=True).json()["choices"]
        assert [choice["variant"] for choice in dialled] == ["customised", "base"]
        assert dialled[0]["message"]["content"] == registered.expected(alpha_0=0.2, alpha_tilde=2.0)
        assert dialled[0]["message"] != answer["choices"][0]["message"]
        assert post(**greedy).json()["choices"] == answer["choices"]

        text = registered.expected()
        stopped = post(**greedy, stop=[text[4:6]]).json()["choices"][0]
        assert stopped["message"]["content"] == text[: text.index(text[4:6])]
        for wrong in ({"max_tokens": 10_000}, {"alpha_0": -1}, {"alpha_0": "much"}, {"n": 1000}):
            assert post(**wrong).status_code == 400, wrong
    assert "the wrong qadapter" not in log.read_text()


@pytest.mark.slow
def test_one_command_serves_the_champion_to_openais_client(registered: Registered, tmp_path: Path) -> None:
    """`test_served_without_network.py` starts the command's own interpreter; this process is forked."""
    log = tmp_path / "log"
    log.touch()
    environment = os.environ | {"QADAPTER_API_KEY": "not-a-secret", "QADAPTER_HOME": str(registered.home)}
    command = ("qadapter", "serve-model", "policy@champion", "--port", "0")
    process = ForkedProcess(be_module, *command, cwd=tmp_path, env=environment, stdout=log)
    with contextlib.ExitStack() as ending:
        ending.callback(process.kill)
        found = wait_for(
            lambda: re.search(r"Serving policy, base at (http://127\.0\.0\.1:\d+/v1)", log.read_text()), process, log
        )
        wait_for(lambda: answers(found[1].replace("/v1", "/health")), process, log)
        client = openai.OpenAI(base_url=found[1], api_key="not-a-secret", max_retries=0, timeout=120)

        def ask(**options: Any) -> Any:
            return client.chat.completions.create(
                model="policy", messages=MESSAGES, temperature=0, max_tokens=NEW, **options
            )

        assert ask().choices[0].message.content == registered.expected()
        streamed = ask(stream=True, extra_body={"alpha_0": 0.2})
        text = "".join(chunk.choices[0].delta.content or "" for chunk in streamed)
        assert text == registered.expected(alpha_0=0.2)
        health = found[1].replace("/v1", "/health")
        assert httpx.get(health, headers={"Host": "evil.example"}).status_code == 403, "DNS rebinding"
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 0, log.read_text()[-4000:]
    assert "not-a-secret" not in log.read_text()


def test_the_command_says_what_is_missing(registered: Registered, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nobody@champion"]) == 2
    assert "has no model 'nobody@champion'" in capsys.readouterr().err
