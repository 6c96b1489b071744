"""The page "Your own model in ten minutes", followed to the letter: commands and what they print."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import httpx
import pytest

from qadapter.command.parser import main
from qadapter.config.customization import load_customization
from qadapter.config.experiment import load_experiment
from qadapter.planning.own_profile import look_at
from tests.support.paths import PROJECT_ROOT
from tests.support.real_runs import free_port
from tests.support.tiny_toy import make_tiny_toy

pytestmark = pytest.mark.slow

PAGE = PROJECT_ROOT / "docs" / "tutorial" / "own-model.md"
MINUTES = 10


def commands() -> list[tuple[str, list[str]]]:
    """The page's commands in order, each with the lines that are shown under it."""
    found: list[tuple[str, list[str]]] = []
    for block in re.findall(r"```console\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.S):
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith("$ "):
                found.append((line[2:], []))
            else:
                found[-1][1].append(line)
    return found


def shows(printed: str, expected: list[str]) -> None:
    """Each expected line is printed, in this order; numbers may differ, and `…` stands for anything."""
    lines = iter(printed.splitlines())
    for line in (line for line in expected if line.strip("… ")):
        number = re.sub(r"\d[\d.,]*", "0", line)
        pattern = re.compile(re.escape(number).replace(re.escape("…"), ".*").replace("0", r"\d[\d.,]*"))
        assert any(pattern.fullmatch(candidate.rstrip()) for candidate in lines), (
            f"{line!r} is not in:\n{printed[-3000:]}"
        )


@pytest.fixture(scope="module")
def folder(harness: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the stages of a first run, as far as the page takes its files from there; the workspace too."""
    root = tmp_path_factory.mktemp("mine")
    toy = make_tiny_toy(root / "toy")
    stages = root / "home" / ".qadapter" / "stages"
    for name, made in {"helpful-sft/1/model": toy.base, "toy-world/1": toy.world}.items():
        (stages / name).parent.mkdir(parents=True)
        (stages / name).symlink_to(made)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QADAPTER_HOME", str(root / "home"))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.chdir(root / "home")
        yield root / "home"


@contextmanager
def served(arguments: list[str], folder: Path) -> Iterator[str]:
    """The server of a command as a process of its own; yields its address."""
    from tests.support.forked_run import run

    port, context = free_port(), multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.forked_run"])
    environment = {"QADAPTER_HOME": str(folder)}
    log = folder / "server.log"
    process = context.Process(
        target=run, args=("qadapter.command.parser", [*arguments, "--port", str(port)], environment, str(log), None)
    )
    process.start()
    address = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 120
    while True:
        try:
            httpx.get(f"{address}/v1/models").raise_for_status()
            break
        except httpx.HTTPError:
            assert process.is_alive(), log.read_text()[-2000:]
            assert time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.2)
    try:
        yield address
    finally:
        os.kill(int(process.pid or 0), signal.SIGINT)
        process.join(60)
        assert process.exitcode == 0, log.read_text()[-2000:]


def asked(command: str, address: str) -> Any:
    """What a `curl` line of the page gets, from a server at another port."""
    words = shlex.split(command)
    body = words[words.index("-d") + 1]
    url = next(word for word in words if word.startswith("http")).replace("http://127.0.0.1:8000", address)
    answer = httpx.post(url, content=body, headers={"Content-Type": "application/json"}, timeout=60)
    return answer.raise_for_status().json()


def test_the_page_is_followed_to_the_letter(folder: Path) -> None:
    began = time.monotonic()
    todo = commands()
    assert {"init", "plan", "run", "customize", "history", "serve-model", "train"} <= {
        command.split()[1] for command, _ in todo if command.startswith("qadapter ")
    }
    while todo:
        command, expected = todo.pop(0)
        words = shlex.split(command)
        if words[:2] == ["qadapter", "serve-model"]:
            curl, _ = todo.pop(0)
            with served(words[1:], folder) as address:
                answer = asked(curl, address)
            assert answer["model"] == "mine"
            assert answer["choices"][0]["message"]["role"] == "assistant"
        elif words[0] == "qadapter":
            printed = io.StringIO()
            with redirect_stdout(printed), redirect_stderr(printed):
                code = main(words[1:])
            assert code == 0, f"{command}: {printed.getvalue()[-3000:]}"
            shows(printed.getvalue(), expected)
        else:
            subprocess.run(command, shell=True, check=True, cwd=folder)
            assert expected == []
    assert time.monotonic() - began < 60 * MINUTES
    metrics = json.loads((folder / "out/metrics.json").read_text())
    assert {"retention/quiz/acc", "forgetting/quiz/acc", "adaptation/speaks"} <= metrics.keys()
    report = (folder / "reports/latest/report.md").read_text()
    assert "quiz" in report  # its own benchmark is in the report like any other
    assert load_experiment(str(folder / "mine.yaml")).methods.run == ("q-adapter", "sft", "dpo")  # none needs `replay`
    weekly = load_customization(str(folder / "mine-weekly.yaml"))
    assert weekly.experiment().evaluation.retention.own == {"quiz": str(folder / "quiz.jsonl")}


def test_init_asks_on_a_terminal_and_refuses_without(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["init", "--output", str(tmp_path)]) == 2
    assert "--model, --pairs, --benchmark are required without a terminal" in capsys.readouterr().err
    for arguments, expected in (
        (["--model", "./away", "--pairs", "pairs.jsonl", "--benchmark", "quiz.jsonl"], "there is no model at './away'"),
        (["--model", "org/name", "--pairs", "away.jsonl", "--benchmark", "quiz.jsonl"], "away.jsonl"),
        (["--model", "org/name", "--pairs", "pairs.jsonl", "--benchmark", "toy_fact"], "did you mean toy_facts"),
        (["--model", "org/name", "--pairs", "pairs.jsonl", "--benchmark", "pairs.jsonl"], "line 1 has no 'question'"),
        (["--model", "o/n", "--pairs", "pairs.jsonl", "--benchmark", "quiz.jsonl", "--name", "My Own"], "lower-case"),
        (["--model", "o/n", "--pairs", "pairs.jsonl", "--benchmark", "quiz.jsonl", "--name", "mine"], "already exists"),
    ):
        assert main(["init", *arguments]) == 2
        assert expected in capsys.readouterr().err.splitlines()[-1]
    answers = iter(["org/chat-8b", "hub:owner/pairs", "gsm8k_cot mmlu", "own"])
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("typer.prompt", lambda *_, **__: next(answers))
    assert main(["init", "--output", str(tmp_path)]) == 0
    written = load_experiment(str(tmp_path / "own.yaml"))
    assert written.model.pretrained == "org/chat-8b"
    assert (written.model.dtype, written.training.gradient_checkpointing) == ("bfloat16", True)
    assert written.sources["pairs"].path == "hub:owner/pairs"
    assert written.evaluation.retention.tasks == ("gsm8k_cot", "mmlu")


def test_the_settings_fit_the_data(folder: Path) -> None:
    """80 pairs: 40 of 80 prompts are held out, and ⌈30 · 8 / 40⌉ = 6 passes over the others are 30 steps of 8."""
    found = look_at("base", "pairs.jsonl", ["quiz.jsonl"])
    assert (found.usable, found.prompts, found.templated) == (80, 80, True)
    written = load_experiment(str(folder / "mine.yaml"))
    assert written.sources["pairs"].heldout == 40
    assert (written.training.epochs, written.training.batch_size) == (6, 8)
    assert written.training.max_length <= (found.context or 0)
    weekly = load_customization(str(folder / "mine-weekly.yaml"))
    assert weekly.source.heldout == 0.5
    assert weekly.gate.adaptation.min_items == 30
