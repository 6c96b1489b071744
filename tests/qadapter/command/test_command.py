"""The command `qadapter`: what it trains, writes, scores and says is what the library's own calls give."""

from __future__ import annotations

import gc
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from peft import get_peft_model
from safetensors.torch import load_file
from typer.main import get_command

from flows.commands.table import COMMANDS as PIPELINE
from qadapter.command import chat as chat_module
from qadapter.command import parser as parser_module
from qadapter.command.app import add_command, call, new_app
from qadapter.command.flags import from_flags
from qadapter.command.generate import read_prompts
from qadapter.command.options import TrainOptions
from qadapter.command.parser import COMMANDS, main
from qadapter.command.speaking import LONGEST_ANSWER
from qadapter.command.train import fitting_epochs, say_small
from qadapter.config.model import LoraSettings, ModelSettings
from qadapter.config.training import OptimizerSettings
from qadapter.evaluation import distance
from qadapter.evaluation.lm_eval.model import PolicyLM
from qadapter.evaluation.preference import distinct_prompts, preference_metrics, score_pairs
from qadapter.evaluation.speech import repetition
from qadapter.files.shown import visible
from qadapter.inference.generate import generate_replies
from qadapter.methods import q_adapter
from qadapter.policy.dial import Dial
from qadapter.policy.files import saved_dial
from qadapter.policy.loading import load_base, load_policy
from qadapter.policy.model import QAdapterForCausalLM
from qadapter.preferences.pair import load_pairs
from qadapter.training.adapt import train_adapter
from qadapter.training.trainer import QAdapterTrainer
from tests.support.forked_process import ForkedProcess, be_module, completed
from tests.support.paths import PROJECT_ROOT
from tests.support.real_runs import wait_for
from tests.support.tiny_chat import byte_tokenizer, tiny_llama
from tests.support.tiny_models import lora
from tests.support.tiny_toy import rows

DOCS = PROJECT_ROOT / "docs" / "command.md"
TOKENIZER = byte_tokenizer()
COLOURS = ("red", "green", "blue", "grey", "black")
MODEL = ModelSettings(pretrained="named by the test")
# An odd number of pairs a step and dropout: resuming has to find its place in the data and the random state.
TRAIN = (
    "--preset residual --beta 0.2 --learning-rate 1e-2 --max-steps 6 --batch-size 6 --micro-batch-size 3 --seed 3 "
    "--max-length 96 --lora-rank 2 --lora-dropout 0.1 --heldout 0.25 --logging-steps 2 --save-steps 2"
).split()


def write_base(folder: Path, template: bool = True) -> Path:
    tiny_llama(context=512).save_pretrained(folder)
    tokenizer = byte_tokenizer()
    if not template:
        tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    return folder


def write_pairs(file: Path, count: int = 24) -> Path:
    pairs = [
        {
            "prompt": f"Which colour is thing {i}?",
            "chosen": "I do not say." + "." * (i % 3),
            "rejected": COLOURS[i % 5],
        }
        for i in range(count)
    ]
    pairs += [{"prompt": "?", "chosen": "", "rejected": "x"}, {"prompt": "?", "chosen": "x", "rejected": "x"}]
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs) + "{broken\n", encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base`, `pairs.jsonl` and two trained adapters, `out` and `other`."""
    root = tmp_path_factory.mktemp("command")
    write_base(root / "base")
    write_pairs(root / "pairs.jsonl")
    data = ["--base", str(root / "base"), "--data", str(root / "pairs.jsonl")]
    assert main(["train", *data, "--output", str(root / "out"), *TRAIN]) == 0
    assert main(["train", *data, "--output", str(root / "other"), *TRAIN, "--seed", "4", "--max-steps", "2"]) == 0
    return root


@pytest.fixture(scope="module")
def policy(place: Path) -> QAdapterForCausalLM:
    return QAdapterForCausalLM.from_pretrained(place / "out", place / "base")


@pytest.fixture(scope="module")
def base(place: Path) -> Any:
    return load_base(place / "base", MODEL)[0]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must be refused, and gives its one line."""

    def run(*arguments: str) -> str:
        capsys.readouterr()
        assert main(arguments) == 2
        lines = capsys.readouterr().err.splitlines()
        assert lines[-1].startswith("error: ")
        assert "Traceback" not in lines[0]
        return lines[-1]

    return run


def reply_of(model: Any, prompt: Any, **options: Any) -> str:
    """What a model answers by its own `generate`, alone and without padding."""
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    ids = TOKENIZER.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, **options}
    with torch.no_grad():
        output = model.generate(torch.tensor([ids]), **settings)
    return str(TOKENIZER.decode(output[0, len(ids) :], skip_special_tokens=True)).strip()


def printed_reply(model: Any, prompt: Any, **options: Any) -> str:
    """As a terminal shows it: a control character is written out."""
    return visible(reply_of(model, prompt, **options))


# ---- help and refusals ------------------------------------------------------------------------------------------


def test_help_of_every_command_has_examples_and_is_quick() -> None:
    """Nothing heavy is loaded for it, of the library or of the pipeline."""
    code = (
        "import sys, time\nfrom qadapter.command.parser import COMMANDS, main\n"
        "from flows.commands.table import COMMANDS as PIPELINE\n"
        "for command in ([], *([name] for name in [*COMMANDS, *PIPELINE]), ['eval']):\n"
        "    assert main([*command, '--help']) == 0\n"
        "heavy = ('torch', 'transformers', 'peft', 'datasets', 'numpy', 'pandas', 'lm_eval', 'prefect', 'mlflow')\n"
        "print('HEAVY', [name for name in heavy if name in sys.modules])\n"
        "print('SECONDS', time.process_time())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PROJECT_ROOT)
    assert done.returncode == 0, done.stderr[-1000:]
    assert "HEAVY []" in done.stdout
    assert float(done.stdout.rpartition("SECONDS")[2]) < 3  # of the CPU, for the help of all of them
    for command in [*COMMANDS, *PIPELINE, "eval"]:
        assert f"  qadapter {command} " in done.stdout, command
    text = " ".join(done.stdout.split())
    assert "--learning-rate, --lr X" in text
    assert "(default: 0.0003)" in text
    assert "(default: q-weight)" in text
    assert "--preset paper|published-code|residual" in text
    for section in ("Commands of the pipeline:", "Preference data, in any of the formats of docs/data.md:"):
        assert section in done.stdout


def test_without_a_checkout_only_the_library_has_commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A wheel has no pyproject.toml beside it; one of another project, or a stranger's `flows`, adds nothing."""
    package = tmp_path / "site-packages" / "qadapter" / "command"
    package.mkdir(parents=True)
    monkeypatch.setattr(parser_module, "__file__", str(package / "parser.py"))
    monkeypatch.setattr(parser_module, "_checkout_commands", parser_module._checkout_commands.__wrapped__)
    own = (PROJECT_ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for content in (None, "[project]\nname = 'another'\n", own):
        if content is not None:
            (tmp_path / "site-packages" / "pyproject.toml").write_text(content, encoding="utf-8")
        assert parser_module._checkout_commands() == ()
        assert set(get_command(parser_module.build_app()).commands) == {*COMMANDS, "eval"}  # type: ignore[attr-defined]


def test_the_shell_completes_commands_flags_and_names(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("_QADAPTER_COMPLETE", "complete_bash")

    def completed(line: str) -> list[str]:
        monkeypatch.setenv("COMP_WORDS", line)
        monkeypatch.setenv("COMP_CWORD", str(len(line.split(" ")) - 1))
        with pytest.raises(SystemExit):
            main([])
        return capsys.readouterr().out.split()

    assert completed("qadapter tr") == ["train"]
    assert completed("qadapter s") == ["score", "serve", "sweep", "spread", "serve-model"]
    assert completed("qadapter train --lear") == ["--learning-rate"]
    assert completed("qadapter train --preset p") == ["paper", "published-code"]
    assert completed("qadapter run --profile smo") == ["smoke"]


def test_a_missing_pipeline_is_one_sentence(monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]) -> None:
    monkeypatch.setattr("flows.commands.table.find_spec", lambda name: None if name == "mlflow" else True)
    assert refused("history") == (
        'error: `qadapter history` needs mlflow; install the pipeline in its checkout: pip install -e ".[pipeline]"'
    )


def test_the_process_ends_with_2_and_one_line() -> None:
    command = [sys.executable, "-m", "qadapter", "train", "--base", "x", "--alpha0", "0.1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT_ROOT)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: unknown flag --alpha0, did you mean '--alpha-0'?\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", "no command was given"),
        ("tran", "unknown command 'tran', did you mean 'train'?"),
        ("train --base b --output o", "--data is required"),
        ("train x", "unexpected argument 'x'"),
        ("train --beta -1 --preset papr", "--beta: Input should be greater than or equal to 0 (given: '-1')"),
        ("train --beta -1 --preset papr", "--preset: Input should be 'paper', 'published-code' or 'residual'"),
        ("train --preset papr", "did you mean 'paper'? (given: 'papr')"),
        ("train --lr", "option '--lr' requires an argument; see qadapter"),
        ("serve --adapter =x", "--adapter: expected FOLDER or NAME=FOLDER"),
        ("serve --adapter a=x --adapter a=y", "--adapter: two adapters have the same name"),
        ("serve --adapter a --port 70000", "--port: Input should be less than or equal to 65535"),
        ("run --profil smoke", "unknown flag --profil, did you mean '--profile'?"),
        ("run --profile smok", "there is no profile 'smok', did you mean 'smoke'?"),
        ("customize --config smok", "there is no customization 'smok', did you mean 'smoke'?"),
        ("rollback --to x", "invalid value for '--to'"),
        ("drop --kind god", "there is no kind 'god', did you mean 'good'?"),
        ("drop --part 3 --out nowhere", "the toy world's preferences come in 2 parts"),
        ("compare x", "missing option '--output'; see qadapter compare --help"),
        ("sweep smoke", "not of the form key.path=value"),
        ("up now", "unexpected argument 'now'"),
        ("train --base b --output o --data d --batch-size 6 --micro-batch-size 4", "6 is not a multiple of"),
        ("train --config nowhere.yaml", "nowhere.yaml cannot be read: No such file"),
        ("generate --adapter nowhere", "no prompt was given"),
        ("generate --adapter nowhere --prompt Hi", "nowhere is no adapter"),
        ("generate --adapter nowhere --prompts nowhere.txt", "nowhere.txt cannot be read"),
        ("score --data x.jsonl", "--adapter is required"),
        ("chat --adapter nowhere --temperature hot", "--temperature: Input should be a valid number"),
    ],
)
def test_refusals(refused: Callable[..., str], arguments: str, expected: str) -> None:
    assert expected in refused(*arguments.split())


def test_a_config_names_its_own_mistakes(refused: Callable[..., str], tmp_path: Path) -> None:
    file = tmp_path / "train.yaml"
    file.write_text("base: b\ndata: d\noutput: o\nlearnig_rate: 1\nepochs: many\n")
    line = refused("train", "--config", str(file))
    assert f"unknown key 'learnig_rate' in {file}, did you mean 'learning_rate'?" in line
    assert f"epochs in {file}: Input should be a valid number" in line
    file.write_text("- a\n")
    assert "contains list; expected a mapping of keys" in refused("train", "--config", str(file))


@pytest.mark.slow
def test_what_is_not_there_is_refused_before_anything_is_written(
    refused: Callable[..., str], place: Path, tmp_path: Path
) -> None:
    out, base, data = tmp_path / "new", str(place / "base"), str(place / "pairs.jsonl")
    assert "did you mean" in refused("train", "--base", base, "--data", data[:-1], "--output", str(out)).lower()
    assert "could not be loaded" in refused("train", "--base", "no/model", "--data", data, "--output", str(out))
    assert "has no config.json" in refused("train", "--base", str(place), "--data", data, "--output", str(out))
    assert not out.exists()
    assert "holds no training" in refused(
        "train", "--base", base, "--data", data, "--output", str(place), "--overwrite"
    )
    assert (place / "pairs.jsonl").is_file()


def test_a_file_that_cannot_be_used_is_named_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What no command foresaw, such as a folder where a file is written, is one sentence without Python's words."""

    def write() -> None:
        (tmp_path / "a").write_text("x")

    def move() -> None:
        (tmp_path / "no").rename(tmp_path / "b")

    app = new_app()
    add_command(app, "write", write, summary="write")
    add_command(app, "move", move, summary="move")
    (tmp_path / "a").mkdir()
    assert call(app, ["write"]) == 1
    assert capsys.readouterr().err == f"error: {tmp_path / 'a'}: Is a directory\n"
    assert call(app, ["move"]) == 1
    assert capsys.readouterr().err == f"error: {tmp_path / 'no'} → {tmp_path / 'b'}: No such file or directory\n"


def test_traceback_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--adapter", "nowhere", "--prompt", "Hi", "--traceback"]) == 2
    assert "Traceback" in capsys.readouterr().err


# ---- train ------------------------------------------------------------------------------------------------------


def test_trains_bitwise_what_the_pipeline_trains(place: Path, tmp_path: Path) -> None:
    train_adapter(
        q_adapter.train,
        q_adapter.QAdapterSettings(preset="residual", beta=0.2),
        place / "base",
        place / "out/data/train.jsonl",
        model=MODEL,
        lora=LoraSettings(rank=2, dropout=0.1),
        training=OptimizerSettings(
            learning_rate=1e-2, max_steps=6, batch_size=6, micro_batch_size=3, max_length=96, logging_steps=2
        ),
        seed=3,
        needs={},
        out=tmp_path,
        scratch=tmp_path / "scratch",
    )
    expected = load_file(tmp_path / "adapter/adapter_model.safetensors")
    trained = load_file(place / "out/adapter_model.safetensors")
    assert trained.keys() == expected.keys()
    assert all(torch.equal(trained[name], expected[name]) for name in expected)
    moved = [name for name in expected if "lora_B" in name and expected[name].abs().max() > 1e-3]
    assert len(moved) == 14  # every linear layer of two blocks
    mine, theirs = (json.loads((folder / "metrics.json").read_text()) for folder in (place / "out", tmp_path))
    for name in ("train/final_loss", "train/steps", "cost/train_tokens", "cost/trainable_parameters"):
        assert mine[name] == theirs[name]


def test_every_record_is_accounted_for(place: Path) -> None:
    summary = json.loads((place / "out/data/summary.json").read_text())
    assert (summary["read"], summary["used"]) == (27, 24)
    assert summary["quarantined"] == {
        "broken JSON": 1,
        "chosen and rejected are identical": 1,
        "empty reply": 1,
    }
    assert [row["line"] for row in rows(place / "out/data/quarantine.jsonl")] == [25, 26, 27]
    assert summary["train_pairs"] + summary["heldout_pairs"] == 24
    assert not (place / "out/checkpoints").exists()
    assert sorted(yaml.safe_load((place / "out/train.yaml").read_text())) == sorted(
        set(TrainOptions.model_fields)
        - {"resume", "overwrite"}
        - {"trainer", "lora", "model", "eval_steps", "eval_pairs", "best_by", "early_stopping"}  # empty: not written
    )


def test_the_heldout_measures_are_those_of_the_saved_adapter(place: Path, policy: Any, base: Any) -> None:
    metrics = json.loads((place / "out/metrics.json").read_text())
    pairs = load_pairs(place / "out/data/heldout.jsonl")
    scores = score_pairs(policy, TOKENIZER, pairs, max_length=96, batch_size=3)
    base_scores = score_pairs(base, TOKENIZER, pairs, max_length=96, batch_size=3)
    expected = {f"adaptation/{name}": value for name, value in preference_metrics(scores, base_scores).items()}
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert metrics["adaptation/n"] == len(pairs) > 2
    assert metrics["adaptation/speaks"] in (0, 1)
    # `residual` with α0 = α̃ = 1: the objective's reward is the log-ratio to the base
    assert metrics["heldout/rewards/margins"] == pytest.approx(expected["adaptation/margin"], rel=1e-4)
    assert metrics["heldout/rewards/margins"] > 0.1
    assert metrics["heldout/kl/base"] > 0


@pytest.mark.slow
def test_a_stopped_training_goes_on_bitwise(
    place: Path,
    tmp_path: Path,
    refused: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = ["--base", str(place / "base"), "--data", str(place / "pairs.jsonl"), "--output", str(tmp_path / "out")]
    command = ["train", *data, *TRAIN]
    step, taken = QAdapterTrainer.training_step, []

    def stop_in_step_6(trainer: Any, *arguments: Any, **options: Any) -> Any:
        taken.append(trainer.state.global_step)
        if len(taken) == 11:  # two micro-batches a step
            raise KeyboardInterrupt
        return step(trainer, *arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(QAdapterTrainer, "training_step", stop_in_step_6)
        assert main(command) == 130
    assert "--resume continues" in capsys.readouterr().err
    assert sorted(folder.name for folder in (tmp_path / "out/checkpoints").iterdir()) == [
        "checkpoint-2",
        "checkpoint-4",
    ]

    assert "holds an unfinished training; add --resume to continue" in refused(*command)
    assert "beta was 0.2 and is 0.3" in refused(*command, "--resume", "--beta", "0.3")
    assert "is not finished; resume it" in refused("chat", "--adapter", str(tmp_path / "out"))

    with monkeypatch.context() as patched:
        patched.setattr(QAdapterTrainer, "training_step", lambda *a, **o: (taken.append(0), step(*a, **o))[1])
        taken.clear()
        assert main(["train", "--config", str(tmp_path / "out/train.yaml"), "--resume"]) == 0
    assert len(taken) == 4  # steps 5 and 6
    trained, expected = (load_file(root / "out/adapter_model.safetensors") for root in (tmp_path, place))
    assert all(torch.equal(trained[name], expected[name]) for name in expected)
    mine, theirs = (json.loads((root / "out/metrics.json").read_text()) for root in (tmp_path, place))
    same = [name for name in theirs if name.startswith(("heldout/", "adaptation/", "train/"))]
    assert {name: mine[name] for name in same} == {name: theirs[name] for name in same}

    capsys.readouterr()
    assert main([*command, "--resume"]) == 0  # nothing to do, so that a job can be sent again
    assert "finished already" in capsys.readouterr().err
    assert "holds a finished training; add --overwrite" in refused(*command)
    assert main([*command, "--overwrite", "--max-steps", "1", "--heldout", "0"]) == 0
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert metrics["train/steps"] == 1
    assert not any(name.startswith(("heldout/", "adaptation/")) for name in metrics)


@pytest.mark.slow
def test_evaluation_while_training_and_the_best_checkpoint(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    """Every second step on training pairs that are set aside; an early stop; the adapter is that of the best one."""
    saved: dict[int, Any] = {}
    whole = QAdapterTrainer._save_checkpoint

    def keep(trainer: Any, *arguments: Any) -> None:
        whole(trainer, *arguments)
        folder = Path(trainer.args.output_dir) / f"checkpoint-{trainer.state.global_step}"
        saved[trainer.state.global_step] = load_file(folder / "adapter_model.safetensors")

    monkeypatch.setattr(QAdapterTrainer, "_save_checkpoint", keep)
    data = ["--base", str(place / "base"), "--data", str(place / "pairs.jsonl"), "--output", str(tmp_path / "out")]
    # A learning rate that overshoots: the first evaluations are the best ones
    asked = ["--eval-steps", "2", "--eval-pairs", "4", "--early-stopping", "2", "--learning-rate", "0.3"]
    without = TRAIN[:-2]  # --save-steps: each evaluation saves
    assert main(["train", *data, *without, *asked, "--max-steps", "40"]) == 0
    history = [json.loads(line) for line in (tmp_path / "out/history.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["eval/loss"] for row in history if "eval/loss" in row}
    assert [*losses] == [*range(0, max(losses) + 1, 2)]
    best = min((step for step in losses if step), key=lambda step: losses[step])
    assert max(losses) == best + 4 < 40
    trained = load_file(tmp_path / "out/adapter_model.safetensors")
    assert all(torch.equal(value, saved[best][name]) for name, value in trained.items())
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert metrics["train/steps"] == best + 4
    assert metrics["heldout/loss"] != losses[best]
    again = [*data[:-1], str(tmp_path / "other"), *without]
    assert "best_by has no effect without eval_steps" in refused("train", *again, "--best-by", "loss")
    assert "the evaluation has no 'accuracy'; it has" in refused(
        "train", *again, "--eval-steps", "2", "--eval-pairs", "4", "--best-by", "accuracy"
    )


@pytest.mark.slow
def test_a_training_that_diverges_ends_with_its_best_checkpoint(
    place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A learning rate of 3 makes NaN of the weights; without evaluations there is no checkpoint to end with."""
    data = [*TRAIN[:-2], "--base", str(place / "base"), "--data", str(place / "pairs.jsonl"), "--learning-rate", "3"]
    asked = ["--eval-steps", "2", "--eval-pairs", "4", "--best-by", "loss", "--max-steps", "40"]
    assert main(["train", *data, *asked, "--output", str(tmp_path / "best")]) == 0
    (said,) = (line for line in caplog.messages if "diverged" in line)
    found = re.search(r"diverged by step (\d+) of 40; it ends with its best checkpoint, checkpoint-(\d+)", said)
    assert found is not None
    last, best = map(int, found.groups())
    history = [json.loads(line) for line in (tmp_path / "best/history.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["eval/loss"] for row in history if "eval/loss" in row}
    assert best == min((step for step in losses if step), key=lambda step: losses[step]) < last
    assert all(map(math.isfinite, losses.values()))
    trained = load_file(tmp_path / "best/adapter_model.safetensors")
    assert all(bool(value.isfinite().all()) for value in trained.values())
    assert main(["train", *data, "--max-steps", "40", "--output", str(tmp_path / "none")]) == 2
    assert not list((tmp_path / "none").glob("adapter_model*"))


@pytest.mark.slow
def test_flags_win_over_the_config(place: Path, tmp_path: Path) -> None:
    settings = {"base": str(place / "base"), "data": str(place / "pairs.jsonl"), "output": str(tmp_path / "a")}
    settings |= {"max-steps": 3, "batch_size": 4, "target_modules": ["q_proj"], "heldout": 4, "lr": "1e-3"}
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(settings))
    assert main(["train", "--config", str(tmp_path / "train.yaml"), "--max-steps", "1", "--preset", "paper"]) == 0
    metrics = json.loads((tmp_path / "a/metrics.json").read_text())
    assert metrics["train/steps"] == 1
    assert len(load_pairs(tmp_path / "a/data/heldout.jsonl")) == 4
    objective = json.loads((tmp_path / "a/q_adapter.json").read_text())["objective"]
    assert (objective["alpha_0"], objective["beta"], objective["parametrization"]) == (0.01, 0.1, "absolute")
    assert len(load_file(tmp_path / "a/adapter_model.safetensors")) == 4  # A and B of one layer in two blocks
    assert yaml.safe_load((tmp_path / "a/train.yaml").read_text())["learning_rate"] == 1e-3


def test_the_residual_objective_is_the_default_and_lr_an_alias() -> None:
    given = {"base": "b", "data": "d", "output": "o"}
    assert TrainOptions(**given).objective()["objective"] == "residual"
    seen: list[TrainOptions] = []
    app = new_app()
    add_command(app, "train", from_flags(TrainOptions, seen.append), summary="train")
    add_command(app, "other", from_flags(TrainOptions, seen.append), summary="train")
    words = [word for name, value in given.items() for word in (f"--{name}", value)]
    assert call(app, ["train", *words, "--lr", "2e-5"]) == 0
    assert (seen[0].learning_rate, seen[0].preset) == (2e-5, "residual")


@pytest.mark.slow
def test_a_folder_with_held_out_files_after_a_failed_start(
    place: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    (tmp_path / "data").mkdir()
    write_pairs(tmp_path / "data/a.jsonl", count=5)
    write_pairs(tmp_path / "data/b.jsonl", count=9)  # the first 5 again
    write_pairs(tmp_path / "heldout.jsonl", count=3)
    undivided = [one for one in TRAIN if one not in ("--heldout", "0.25")]
    command = ["train", "--base", str(place / "base"), "--data", str(tmp_path / "data"), *undivided]
    command += ["--output", str(tmp_path / "out"), "--max-steps", "1"]
    assert "only 9 distinct prompts" in refused(*command, "--heldout", "50")
    assert main([*command, "--heldout-data", str(tmp_path / "heldout.jsonl")]) == 0  # nothing is in the way
    summary = json.loads((tmp_path / "out/data/summary.json").read_text())
    assert {name: summary[name] for name in ("read", "duplicates", "cross_split_pairs", "train_pairs")} == {
        "read": 26,
        "duplicates": 5,
        "cross_split_pairs": 3,
        "train_pairs": 6,
    }
    assert json.loads((tmp_path / "out/metrics.json").read_text())["adaptation/n"] == 3


@pytest.mark.slow
def test_a_training_that_diverges_is_no_finished_training(
    place: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    command = ["train", "--base", str(place / "base"), "--data", str(place / "pairs.jsonl"), *TRAIN]
    assert "the training diverged" in refused(*command, "--output", str(tmp_path / "out"), "--learning-rate", "1e30")
    assert not (tmp_path / "out/metrics.json").exists()


# ---- generate ---------------------------------------------------------------------------------------------------

PROMPTS = ["Which colour is thing 3?", "Hello", "A much longer prompt than the others, with more words in it"]
SHORT = ["--max-new-tokens", "12"]


@pytest.mark.slow
def test_greedy_replies_are_those_of_the_policys_own_generate(
    place: Path, policy: Any, base: Any, tmp_path: Path
) -> None:
    conversation = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "Why?"},
    ]
    lines = [json.dumps({"prompt": PROMPTS[0]}), json.dumps(PROMPTS[1]), json.dumps({"messages": conversation})]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    out = tmp_path / "answers.jsonl"
    command = ["generate", "--adapter", str(place / "out"), "--prompts", str(tmp_path / "prompts.jsonl")]
    command += ["--output", str(out), "--compare-base", "--batch-size", "2", *SHORT]
    assert main(command) == 0
    prompts: list[Any] = [PROMPTS[0], PROMPTS[1], conversation]
    assert [row["reply"] for row in rows(out)] == [reply_of(policy, prompt) for prompt in prompts]
    assert [row["base_reply"] for row in rows(out)] == [reply_of(base, prompt) for prompt in prompts]
    assert rows(out)[2]["prompt"] == conversation
    assert [row["reply"] for row in rows(out)] != [row["base_reply"] for row in rows(out)]


def test_an_answer_file_is_not_replaced_unasked(place: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    out = tmp_path / "answers.jsonl"
    out.write_text("mine")
    command = ["generate", "--adapter", str(place / "out"), "--prompt", "Hi", "--output", str(out), *SHORT]
    assert "already exists" in refused(*command)
    assert out.read_text() == "mine"
    assert main([*command, "--overwrite"]) == 0
    assert len(rows(out)) == 1
    assert sorted(file.name for file in tmp_path.iterdir()) == ["answers.jsonl"]


@pytest.mark.slow
def test_dials_and_composition_are_the_policys(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n\n")
    command = ["generate", "--adapter", str(place / "out"), "--adapter", str(place / "other"), *SHORT]
    command += ["--weights", "0.5,2", "--alpha-0", "0.9", "--alpha-tilde", "1.5", "--prompts"]
    assert main([*command, str(tmp_path / "prompts.txt"), "--output", str(tmp_path / "answers.jsonl")]) == 0
    assert "alpha_0 0.9, alpha_tilde 1.5, weights: default 0.5, adapter_2 2" in capsys.readouterr().err
    both = QAdapterForCausalLM.from_pretrained(place / "out", place / "base")
    both.attach(place / "other", "second")
    both.set_adapter_weights({"default": 0.5, "second": 2.0})
    both.config.alpha_0, both.config.alpha_tilde = 0.9, 1.5
    replies = [row["reply"] for row in rows(tmp_path / "answers.jsonl")]
    assert replies == [reply_of(both, prompt) for prompt in PROMPTS]
    both.set_adapter_weights({"default": 1.0})
    assert replies != [reply_of(both, prompt) for prompt in PROMPTS]


@pytest.mark.slow
def test_sampling_follows_the_seed(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def replies(seed: str) -> str:
        capsys.readouterr()
        prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
        command = ["generate", "--adapter", str(place / "out"), *prompts, *SHORT, "--temperature", "1"]
        assert main([*command, "--seed", seed]) == 0
        return capsys.readouterr().out

    first = replies("1")
    assert first == replies("1") != replies("2")
    assert re.findall(r"^user: (.*)$", first, flags=re.M) == PROMPTS


def test_refusals_about_adapters_and_prompts(place: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    out = str(place / "out")
    assert "2 numbers for 1 adapters" in refused("generate", "--adapter", out, "--weights", "1,1", "--prompt", "Hi")
    (tmp_path / "prompts.jsonl").write_text('"fine"\n{"question": "no"}\n')
    assert "line 2: no prompt" in refused("generate", "--adapter", out, "--prompts", str(tmp_path / "prompts.jsonl"))
    assert "do not fit" in refused("generate", "--adapter", out, "--prompt", "Hi", "--max-new-tokens", "512")


def test_a_prompt_is_a_line_of_a_text_file(tmp_path: Path) -> None:
    """Not less: U+2028 and U+0085 are characters of a prompt. A byte-order mark is none."""
    (tmp_path / "prompts.txt").write_bytes("\ufeffone\u2028still one\r\n \r\ntwo\x85still two\nthree".encode())
    prompts = [turn["content"] for turns in read_prompts(tmp_path / "prompts.txt") for turn in turns]
    assert prompts == ["one\u2028still one", "two\x85still two", "three"]


@pytest.mark.parametrize("indent", [None, 1])
def test_prompts_are_the_texts_of_a_json_list(tmp_path: Path, indent: int | None) -> None:
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps(["one", {"prompt": "two"}], indent=indent))
    assert [turn["content"] for turns in read_prompts(file) for turn in turns] == ["one", "two"]


# ---- small trainings --------------------------------------------------------------------------------------------


def test_few_pairs_are_read_more_often() -> None:
    """54 pairs of 60, 16 per step: nine passes are ⌈54/16 · 9⌉ = 31 steps; many pairs are read once."""
    assert fitting_epochs(54, 16) == 9
    assert fitting_epochs(480, 16) == 1
    assert fitting_epochs(16, 16) == 10


def test_what_is_too_small_is_said_with_what_to_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = TrainOptions(base="base", data="pairs.jsonl", output=str(tmp_path / "out"))
    say_small(options, 54, 2, 31, 9.0)
    said = capsys.readouterr().err
    assert "54 pairs are few: 9 passes over them make 31 steps" in said
    assert "only 2 held-out pairs: what was learnt shows in steps of 1/2; hold out at least 20 prompts" in said
    assert "hardly change a model" not in said
    say_small(options.model_copy(update={"max_steps": 4}), 54, 40, 4, 1.0)
    said = capsys.readouterr().err
    assert "4 steps of 16 pairs hardly change a model; give --max-steps 30\n" in said  # passes would have no effect
    assert "held-out" not in said
    say_small(options.model_copy(update={"epochs": 1.0}), 54, 0, 4, 1.0)
    said = capsys.readouterr().err
    assert "4 steps of 16 pairs hardly change a model; give --epochs 9, or --batch-size 2\n" in said  # 4 · 16 / 30
    assert "no held-out pairs: what was learnt is not measured; hold out at least 20 prompts with --heldout 20" in said
    say_small(options.model_copy(update={"epochs": 1.0}), 12, 20, 1, 1.0)
    assert "1 step of 16 pairs hardly changes a model; give --epochs 10 and --batch-size 4" in capsys.readouterr().err
    say_small(options.model_copy(update={"epochs": 1.0}), 1000, 100, 63, 1.0)
    assert capsys.readouterr().err == ""


# ---- score ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_score_is_preference_metrics_of_policy_and_base(
    place: Path, tmp_path: Path, policy: Any, base: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    command = ["score", "--adapter", str(place / "out"), "--data", str(place / "out/data/heldout.jsonl")]
    assert main([*command, "--output", str(tmp_path / "scores.jsonl")]) == 0
    printed = json.loads(capsys.readouterr().out)
    pairs = load_pairs(place / "out/data/heldout.jsonl")
    scores = score_pairs(policy, TOKENIZER, pairs, max_length=96, batch_size=8)
    base_scores = score_pairs(base, TOKENIZER, pairs, max_length=96, batch_size=8)
    assert printed["policy"] == pytest.approx(preference_metrics(scores, base_scores), rel=1e-6)
    assert printed["base"] == pytest.approx(preference_metrics(base_scores, base_scores), rel=1e-6)
    assert printed["max_length"] == 96  # as in training
    prompts = distinct_prompts(pairs, 8)
    replies = generate_replies(policy, TOKENIZER, prompts, max_new_tokens=LONGEST_ANSWER, batch_size=8)
    assert printed["answers"]["repetition"] == pytest.approx(np.mean([repetition(reply) for reply in replies]))
    assert {"broken_replies", "replies_ended", "reply_nll", "speaks"} <= printed["answers"].keys()
    written = rows(tmp_path / "scores.jsonl")
    assert [row["chosen_log_prob"] for row in written] == pytest.approx(scores.chosen.tolist(), rel=1e-6)
    assert [row["base_rejected_log_prob"] for row in written] == pytest.approx(base_scores.rejected.tolist(), rel=1e-6)
    assert sum(row["margin"] for row in written) / len(written) == pytest.approx(printed["policy"]["margin"])
    assert [row["prompt"] for row in written] == [list(pair.prompt) for pair in pairs]
    assert (printed["base"]["implied_reward_accuracy"], printed["base"]["margin"]) == (0.5, 0.0)


@pytest.mark.slow
def test_raw_data_are_scored_with_what_is_unusable_counted(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["score", "--adapter", str(place / "out"), "--data", str(place / "pairs.jsonl"), "--max-length", "64"]
    assert main([*command, "--limit", "5"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["policy"]["n"] == 5
    assert "27 pairs read, 3 of them quarantined, 5 to score" in captured.err


@pytest.mark.slow
def test_a_plain_peft_adapter_has_the_dial_and_no_alphas(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], refused: Callable[..., str]
) -> None:
    network, _ = load_base(place / "base", MODEL)
    torch.manual_seed(5)
    get_peft_model(network, lora(init_lora_weights=False)).save_pretrained(tmp_path / "sft")
    heldout = place / "out/data/heldout.jsonl"
    command = ["--adapter", str(tmp_path / "sft"), "--data", str(heldout), "--max-length", "64"]
    capsys.readouterr()
    assert main(["score", *command]) == 0
    printed = json.loads(capsys.readouterr().out)
    network, _ = load_base(place / "base", MODEL)
    base_scores = score_pairs(network, TOKENIZER, load_pairs(heldout), max_length=64, batch_size=8)
    plain = load_policy(network, tmp_path / "sft")
    scores = score_pairs(plain, TOKENIZER, load_pairs(heldout), max_length=64, batch_size=8)
    assert printed["policy"] == pytest.approx(preference_metrics(scores, base_scores), rel=1e-5)
    assert "plain PEFT adapter" in refused("score", *command, "--alpha-0", "1")
    assert main(["score", *command, "--dial", "scale=0.5"]) == 0
    turned = score_pairs(
        load_policy(load_base(place / "base", MODEL)[0], tmp_path / "sft", Dial("scale", 0.5)),
        TOKENIZER,
        load_pairs(heldout),
        max_length=64,
        batch_size=8,
    )
    printed = json.loads(capsys.readouterr().out)
    assert printed["policy"] == pytest.approx(preference_metrics(turned, base_scores), rel=1e-5)
    assert abs(turned.chosen - scores.chosen).max() > 0.01
    mixed = ["generate", "--adapter", str(tmp_path / "sft"), "--adapter", str(place / "out"), "--weights", "0.5,0.5"]
    assert main([*mixed, "--dial", "q-weight=0.8", "--prompt", PROMPTS[0], *SHORT]) == 0
    captured = capsys.readouterr()
    assert "plain PEFT adapter, weights: default 0.5, adapter_2 0.5, dial q-weight=0.8" in captured.err
    both = QAdapterForCausalLM.from_pretrained(tmp_path / "sft", place / "base")
    both.attach(place / "out", "second")
    both.set_adapter_weights({"default": 0.5, "second": 0.5})
    both.dial = Dial("q-weight", 0.8)
    assert f"reply: {printed_reply(both, PROMPTS[0])}\n" in captured.out
    assert "expected scale=VALUE or q-weight=VALUE" in refused(*mixed, "--prompt", "Hi", "--dial", "half")


# ---- chat -------------------------------------------------------------------------------------------------------


@pytest.fixture
def talk(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., list[str]]:
    """Lines that `chat` writes, given the lines on stdin."""

    def run(*lines: str, flags: tuple[str, ...] = ()) -> list[str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
        capsys.readouterr()
        assert main(["chat", "--adapter", str(place / "out"), *SHORT, *flags]) == 0
        return capsys.readouterr().out.splitlines()

    return run


@pytest.mark.slow
def test_a_conversation_of_several_turns(talk: Callable[..., list[str]], policy: Any, base: Any) -> None:
    first, second = "Which colour is thing 3?", "And thing 4?"
    turns: list[dict[str, str]] = [{"role": "user", "content": first}]
    turns += [{"role": "assistant", "content": reply_of(policy, turns)}, {"role": "user", "content": second}]
    lines = talk(first, "/base", second, "/reset", second)
    assert "\n".join(lines) == "\n".join(
        [
            printed_reply(policy, first),
            "(the base replies too)",
            f"policy> {printed_reply(policy, turns)}",
            f"base>   {printed_reply(base, turns)}",
            "(the conversation is forgotten)",
            f"policy> {printed_reply(policy, second)}",
            f"base>   {printed_reply(base, second)}",
        ]
    )
    assert reply_of(policy, turns) != reply_of(policy, second)


def test_the_dials_change_the_next_reply(talk: Callable[..., list[str]], policy: Any) -> None:
    prompt = PROMPTS[0]
    turned = [printed_reply(policy, prompt, alpha_0=value) for value in (1.0, 0.2)]
    assert turned[0] != turned[1]
    lines = talk(prompt, "/reset", "/alpha0 0.2", prompt, "/alphatilde 2", "/alpha0", "/quit", prompt)
    assert "\n".join(lines) == "\n".join(
        [
            turned[0],
            "(the conversation is forgotten)",
            "(alpha_0 0.2, alpha_tilde 1, weights: default 1)",
            turned[1],
            "(alpha_0 0.2, alpha_tilde 2, weights: default 1)",
            "(alpha_0 0.2, alpha_tilde 2, weights: default 1)",
        ]
    )


def test_the_dial_of_a_chat(talk: Callable[..., list[str]], policy: Any) -> None:
    prompt = PROMPTS[0]
    replies = [printed_reply(policy, prompt, dial=dial) for dial in ("scale=1.5", "scale=0", "q-weight=1")]
    assert len(set(replies)) > 1
    given = ("/dial", prompt, "/reset", "/dial scale=0", prompt, "/reset", "/dial q-weight=1", prompt, "/dial x")
    lines = talk(*given, flags=("--dial", "scale=1.5"))
    forgotten = "(the conversation is forgotten)"
    expected = ["(dial scale=1.5)", replies[0], forgotten, "(dial scale=0)", replies[1], forgotten, "(dial q-weight=1)"]
    assert "\n".join(lines).startswith("\n".join([*expected, replies[2], "'x' is no dial"]))


@pytest.mark.slow
def test_a_system_message_and_sampling(talk: Callable[..., list[str]], policy: Any) -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    assert "\n".join(talk("Hello", flags=("--system", "Be brief."))) == printed_reply(policy, turns)
    torch.manual_seed(7)
    sampled = printed_reply(policy, "Hello", do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    assert "\n".join(talk("Hello", flags=("--temperature", "1", "--seed", "7"))) == sampled
    assert talk("/temperature 0.5", "/temperature -1") == ["(temperature 0.5)", "'-1' is not a number of at least 0"]


def test_mistakes_do_not_end_it(talk: Callable[..., list[str]]) -> None:
    lines = talk("/alpa0 1", "/alphatilde 0", "/alpha0 nan", "", "/help")
    assert lines[:3] == [
        "unknown command /alpa0, did you mean '/alpha0'?",
        "'0' is not a number above 0",
        "'nan' is not a number of at least 0",
    ]
    assert "/quit" in lines[-1]


@pytest.mark.slow
@pytest.mark.parametrize("kinds", ["q-weight", "scale"])
def test_a_dial_is_chosen_saved_and_taken(
    kinds: str,
    place: Path,
    policy: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`qadapter dial --save`; then `generate`, `chat` and lm-eval take the adapter with that dial."""
    turned = tmp_path / "turned"
    shutil.copytree(place / "out", turned)
    quiz = [{"question": f"Thing {i}?", "choices": ["red", "I do not say."], "answer": "red"} for i in range(40)]
    (tmp_path / "quiz.jsonl").write_text("".join(json.dumps(row) + "\n" for row in quiz))
    command = ["dial", str(turned), "--data", str(write_pairs(tmp_path / "pairs.jsonl", 60)), "--budget", "1"]
    command += ["--retain", str(tmp_path / "quiz.jsonl"), "--kinds", kinds, "--points", "3", "--values", "0.75"]
    capsys.readouterr()
    assert main([*command, "--save"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    dial = Dial(found["kind"], found["dial"])
    assert {point["dial"] for point in found["points"]} >= {f"{kinds}={value}" for value in ("0", "0.75", "1")}
    assert (found["kind"], found["split"], found["sure"]) == (kinds, "dial-1", True)
    assert 0 < dial.value < 1, "a smaller one of equals is taken"
    assert f"dial {dial}: adaptation " in printed.err
    assert saved_dial(turned) == dial
    card = (turned / "README.md").read_text()
    assert f"Its dial stands at `{dial}`" in card
    assert "the half of the items that the dial was not chosen on (split dial-1)" in card
    expected = printed_reply(policy, "Which colour is thing 3?", dial=dial)
    assert main(["generate", "--adapter", str(turned), "--prompt", "Which colour is thing 3?", *SHORT]) == 0
    assert capsys.readouterr().out.strip() == f"user: Which colour is thing 3?\nreply: {expected}"
    monkeypatch.setattr(sys, "stdin", io.StringIO("Which colour is thing 3?\n"))
    assert main(["chat", "--adapter", str(turned), *SHORT]) == 0
    assert capsys.readouterr().out.strip() == expected
    assert PolicyLM(str(turned), base=str(place / "base"), tokenizer=TOKENIZER).model.dial == dial


def test_a_dial_needs_something_that_is_kept(place: Path, refused: Callable[..., str]) -> None:
    message = refused("dial", str(place / "out"), "--data", str(place / "pairs.jsonl"))
    assert "no benchmark measures what is kept; give --tasks, or --retain" in message


def test_ctrl_c_stops_a_reply_and_then_the_chat(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lines() -> Iterator[str]:
        yield "Hello"
        yield "/alpha0"
        raise KeyboardInterrupt

    given = lines()
    monkeypatch.setattr("builtins.input", lambda _: next(given))

    def interrupted(*_: Any) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(chat_module.Chat, "_stream", interrupted)
    assert main(["chat", "--adapter", str(place / "out")]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out == ["", "(stopped; this turn is forgotten)", "(alpha_0 1, alpha_tilde 1, weights: default 1)"]


# ---- a base without a chat template -------------------------------------------------------------------------------


@pytest.mark.slow
def test_without_a_chat_template_conversations_are_transcripts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = write_base(tmp_path / "base", template=False)
    data = write_pairs(tmp_path / "pairs.jsonl")
    assert distance.LARGE_KL == 0.5
    monkeypatch.setattr(distance, "LARGE_KL", 0.0)  # any training is above it
    assert main(["train", "--base", str(base), "--data", str(data), "--output", str(tmp_path / "out"), *TRAIN]) == 0
    said = capsys.readouterr().err
    assert "no chat template; conversations are written as plain transcripts" in said
    moved = json.loads((tmp_path / "out/metrics.json").read_text())["heldout/kl/base"]
    assert moved > 0
    assert f"WARNING: the policy is far from its base (KL {moved:.2f} per token; trainings that keep the base's" in said
    assert "Lower --learning-rate, train fewer steps, or take --preset residual." in said
    policy = QAdapterForCausalLM.from_pretrained(tmp_path / "out")
    ids = TOKENIZER("\n\nHuman: Hello\n\nAssistant:", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        output = policy.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    expected = TOKENIZER.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()
    command = ["generate", "--adapter", str(tmp_path / "out"), "--prompt", "Hello", *SHORT]
    assert main([*command, "--output", str(tmp_path / "answers.jsonl")]) == 0
    assert [row["reply"] for row in rows(tmp_path / "answers.jsonl")] == [expected]
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
    capsys.readouterr()
    assert main(["chat", "--adapter", str(tmp_path / "out"), *SHORT]) == 0
    assert capsys.readouterr().out.strip() == visible(expected)


def test_the_end_of_the_process_searches_for_no_cycles(monkeypatch: pytest.MonkeyPatch) -> None:
    """However often `main` is called, once."""
    at_end: list[Any] = []
    monkeypatch.setattr("atexit.register", at_end.append)
    monkeypatch.setattr("atexit.unregister", lambda function: at_end.remove(function) if function in at_end else None)
    for _ in range(2):
        assert main(["--version"]) == 0
    assert at_end == [gc.freeze]


# ---- the real thing -----------------------------------------------------------------------------------------------


def be_chat(typed: str, *arguments: str) -> None:
    """Be `qadapter chat`; what is typed comes through a pipe."""
    with Path(typed).open(encoding="utf-8") as sys.stdin:
        be_module("qadapter", "chat", *arguments)


@pytest.mark.slow
def test_from_preferences_to_a_chat(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each in a process of its own, the chat until Ctrl-C; `tests/processes/test_wheel.py` starts the real command."""
    write_base(tmp_path / "base")
    write_pairs(tmp_path / "pairs.jsonl")
    data = ["--base", "base", "--data", "pairs.jsonl", "--output", "out"]  # relative to where it runs
    quiz = [{"question": f"Which colour is thing {i}?", "answer": COLOURS[i % 5]} for i in range(4)]
    (tmp_path / "My quiz.jsonl").write_text("".join(json.dumps(row) + "\n" for row in quiz))
    command = ("qadapter", "train", *data, *TRAIN, "--retain", "My quiz.jsonl")
    trained = completed(be_module, *command, cwd=tmp_path, env=os.environ)
    assert trained.returncode == 0, trained.stderr[-1500:]
    assert "retain: my-quiz: 4 questions, short answer\n" in trained.stderr
    kept = json.loads((tmp_path / "out/metrics.json").read_text())
    quizzed = re.search(
        r"retain: my-quiz (\S+) before, (\S+) after: (\S+) \(4 questions: \d lost, \d won\)", trained.stderr
    )
    assert quizzed is not None
    assert float(quizzed[2]) == pytest.approx(kept["retention/my-quiz/acc"], abs=5e-4)
    assert float(quizzed[1]) - float(quizzed[2]) == pytest.approx(kept["forgetting/my-quiz/acc"], abs=1e-3)
    assert [row["target"] for row in rows(tmp_path / "out/retained.jsonl")] == [row["answer"] for row in quiz]
    assert "27 pairs read (trl-plain), 24 used, 3 quarantined" in trained.stderr
    adapters = [load_file(folder / "out/adapter_model.safetensors") for folder in (tmp_path, place)]
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[1])
    monkeypatch.chdir(tmp_path)
    assert main(["generate", "--adapter", "out", "--prompt", "Hello", "--output", "answers.jsonl", *SHORT]) == 0
    capsys.readouterr()
    assert main(["score", "--adapter", "out", "--data", "out/data/heldout.jsonl"]) == 0
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    scored = json.loads(capsys.readouterr().out)
    assert scored["policy"]["margin"] == pytest.approx(metrics["adaptation/margin"], rel=1e-4)

    typed, said, errors = tmp_path / "typed", tmp_path / "said", tmp_path / "errors"
    os.mkfifo(typed)
    chat = ForkedProcess(
        be_chat, str(typed), "--adapter", "out", *SHORT, cwd=tmp_path, env=os.environ, stdout=said, stderr=errors
    )
    with typed.open("w") as keyboard:
        keyboard.write("Hello\n/alpha0\n")
        keyboard.flush()
        wait_for(lambda: "(alpha_0" in said.read_text(), 120, "the answers", errors.read_text)
        shown = said.read_text()
        chat.send_signal(signal.SIGINT)  # while it waits at the prompt
        assert chat.wait(60) == 0, errors.read_text()[-1000:]
    assert said.read_text() == shown
    assert shown.partition("(alpha_0")[0].strip() == visible(rows(tmp_path / "answers.jsonl")[0]["reply"])


@pytest.mark.slow
def test_every_command_of_the_guide_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = DOCS.read_text(encoding="utf-8")
    readme = (
        (PROJECT_ROOT / "README.md")
        .read_text(encoding="utf-8")
        .replace("path/or/hub-id", "base")
        .replace(" out", " mine")
    )
    own = re.compile(r"\$ qadapter (train|generate|score|chat) ")
    text += "\n".join(line for line in readme.splitlines() if own.match(line)) + "\n"
    commands = re.findall(r"^\$ qadapter (?!serve|eval|dial)(.*)\n(?=(.*)$)", text.replace("\\\n", " "), flags=re.M)
    assert {command.split()[0] for command, _ in commands} == set(COMMANDS) - {
        "serve",
        "dial",
    }  # dial asks benchmarks: test_curve.py runs it
    assert len(commands) == len(re.findall(r"^\$ qadapter (?!serve|eval|dial)", text, flags=re.M))
    write_base(tmp_path / "base")
    write_pairs(tmp_path / "pairs.jsonl")
    for name, content in re.findall(r"```\w+\n# (\S+)\n(.*?)```", text, flags=re.S):
        (tmp_path / name).write_text(content, encoding="utf-8")
    (tmp_path / "prompts.txt").write_text("Hello\n")
    monkeypatch.chdir(tmp_path)
    for command, answer in commands:
        monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n/alpha0 0.5\n/quit\n"))
        code = main(shlex.split(command))
        errors = capsys.readouterr().err
        assert code == (2 if answer.startswith("error: ") else 0), (command, errors[-1000:])
        assert code == 0 or errors.strip() == answer


def test_what_the_guide_names_exists() -> None:
    text = DOCS.read_text(encoding="utf-8")
    flags = {"--" + name.replace("_", "-") for command in COMMANDS.values() for name in command.options.model_fields}
    flags |= {"--config", "--lr", "--traceback", "--help", "--install-completion"}
    flags |= {f"--no-{name[2:]}" for name in flags}
    for named in re.findall(r"`(?:qadapter )?(--[a-z0-9-]+)", text):
        assert named in flags, named
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (DOCS.parent / target).exists(), target
