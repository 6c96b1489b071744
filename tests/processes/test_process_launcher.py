"""Training stages through `accelerate launch`: two CPU processes against one, killed, refused, broken."""

from __future__ import annotations

import json
import logging
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from prefect.logging import disable_run_logger
from safetensors.torch import load_file

from flows.running.forking import forking
from qadapter.config.execution import CONFIG_FOLDER, LaunchSettings, RunnerSettings
from qadapter.config.experiment import load_experiment
from qadapter.errors import QAdapterError
from qadapter.files.artifacts import digest_tree
from qadapter.methods import sft
from qadapter.methods.needs.reward_model import RewardModelSettings, train_reward_model
from qadapter.preferences.prepare import prepare
from qadapter.training.adapt import train_adapter as train_function
from qadapter.training.arguments import trainer_arguments
from qadapter.training.checkpoints import SEAL
from qadapter.training.worker import read_job, write_job
from tasks.candidate import train_candidate
from tasks.judge import train_judge
from tasks.stages.code_version import code_digest
from tasks.stages.context import Cell, RunContext
from tasks.stages.process_launcher import ProcessLauncher, TrainingProcessError
from tasks.stages.stage_run import StageResult
from tasks.stages.store import StageOutput, StageStore
from tasks.tracking.tracker import Tracker
from tasks.train import Base, train_adapter
from tests.support.forked_launch import drive
from tests.support.tiny_toy import CHOICES, LORA, MODEL, NO_DROPOUT, TRAINING, TinyToy, make_tiny_toy, rows

TWO = {"launch.engine": "accelerate", "launch.processes": 2}
SETTINGS_OF_TWO = LaunchSettings(engine="accelerate", processes=2)
PAIRS = 8  # a whole number of batches: an epoch's odd end is filled up differently by several processes


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> TinyToy:
    root = tmp_path_factory.mktemp("toy")
    made = make_tiny_toy(root)
    train = root / "world/hh-rlhf"
    prepare(
        [train / "harmless.jsonl"],
        root / "eight",
        heldout_files=[train / "harmless-heldout.jsonl"],
        max_train_pairs=PAIRS,
        max_heldout_pairs=4,
    )
    made.pairs = root / "eight/train.jsonl"
    return made


def settings(**changes: Any) -> dict[str, Any]:
    small = {"learning_rate": 1e-2, "max_steps": 4, "batch_size": 4, "max_length": 64, "logging_steps": 1}
    return {
        "training": {**small, **changes.pop("training", {})},
        "lora": {"rank": 2, "alpha": 4, "dropout": 0.0},
        **changes,
    }


def run_stage(
    toy: TinyToy, home: Path, method: str, champion: StageOutput | None = None, **changes: Any
) -> StageOutput:
    """The pipeline's own training task, or with a champion the candidate's, in a workspace of its own."""
    experiment = load_experiment("smoke", settings(**changes))
    tracker = Tracker.for_project(home)
    parent = tracker.start_parent("launching", "test")
    context = RunContext(experiment, StageStore(home / ".qadapter"), tracker, parent)
    folder = toy.pairs.parent
    data = StageOutput("prepare", "0" * 64, folder, digest_tree(folder), cached=True, seconds=0.0)
    cell = Cell("harmless", method, 0)
    base, pairs = Base(str(toy.base), None, "helpful"), StageResult(data, parent)
    with disable_run_logger():
        if champion:
            done = train_candidate.fn(context, cell, base, pairs, StageResult(champion, parent))
        else:
            done = train_adapter.fn(context, cell, base, pairs, {})
    result = done.data if hasattr(done, "data") else done
    assert isinstance(result, StageResult)
    return result.output


def weights(output: StageOutput) -> dict[str, torch.Tensor]:
    (file,) = output.path.glob("*/*.safetensors")
    return load_file(file)


@pytest.mark.slow
def test_two_processes_are_one_with_the_same_batch(toy: TinyToy, tmp_path: Path) -> None:
    """Batch 4 = 1 process × 4 = 2 processes × 1 pair × 2 accumulated: the same curve and the same adapter."""
    one = run_stage(toy, tmp_path, "dpo")
    two = run_stage(toy, tmp_path, "dpo", training={"micro_batch_size": 1}, **TWO)
    assert_same(one, two)


@pytest.mark.slow
@pytest.mark.usefixtures("forked_launch")
def test_a_candidate_is_trained_on_by_two_processes_as_by_one(toy: TinyToy, tmp_path: Path) -> None:
    """A Q-Adapter by two processes as by one, and then both go on from it."""
    champion = run_stage(toy, tmp_path, "q-adapter")
    assert_same(champion, run_stage(toy, tmp_path, "q-adapter", training={"micro_batch_size": 1}, **TWO))
    one = run_stage(toy, tmp_path, "q-adapter", champion)
    two = run_stage(toy, tmp_path, "q-adapter", champion, training={"micro_batch_size": 1}, **TWO)
    assert_same(one, two)
    assert one.history()[0]["train/loss"] < champion.history()[0]["train/loss"], "it goes on"


@pytest.mark.slow
@pytest.mark.usefixtures("forked_launch")
def test_a_judge_is_trained_by_two_processes_as_by_one(toy: TinyToy, tmp_path: Path) -> None:
    folder, world = tmp_path / "pairs", toy.pairs.parents[1] / "world/hh-rlhf"
    heldout = [world / "harmless-heldout.jsonl"]
    prepare([world / "harmless.jsonl"], folder, heldout_files=heldout, judge_pairs=PAIRS, max_heldout_pairs=4)
    data = StageOutput("prepare", "0" * 64, folder, digest_tree(folder), cached=True, seconds=0.0)

    def run_judge(**changes: Any) -> StageOutput:
        judged: dict[str, Any] = {f"sources.{name}.judge_pairs": PAIRS for name in load_experiment("smoke").sources}
        judged["evaluation.adaptation.judge"] = "reward-model"
        experiment = load_experiment("smoke", settings(**judged, **changes))
        tracker = Tracker.for_project(tmp_path)
        parent = tracker.start_parent("launching", "test")
        context = RunContext(experiment, StageStore(tmp_path / ".qadapter"), tracker, parent)
        with disable_run_logger():
            done = train_judge.fn(context, "harmless", Base(str(toy.base), None, "helpful"), StageResult(data, parent))
        result = done.data if hasattr(done, "data") else done
        assert isinstance(result, StageResult)
        return result.output

    one, two = run_judge(), run_judge(training={"micro_batch_size": 1}, **TWO)
    assert_same(one, two)
    assert one.metrics()["judge/accuracy"] == two.metrics()["judge/accuracy"]


@pytest.mark.slow
@pytest.mark.usefixtures("forked_launch")
def test_a_methods_reward_model_is_trained_by_two_processes_as_by_one(toy: TinyToy, tmp_path: Path) -> None:
    """Only one of the processes has the files that were written; the scale of the rewards is measured by both."""
    scales, heads = [], []
    for name, launch, micro in (("one", LaunchSettings(), 4), ("two", SETTINGS_OF_TWO, 1)):
        out = tmp_path / name
        for folder in (out, tmp_path / f"{name}-scratch"):
            folder.mkdir()
        training = TRAINING.model_copy(update={"micro_batch_size": micro, "max_steps": 4, "save_steps": None})
        ProcessLauncher(launch)(
            train_reward_model,
            toy.base,
            toy.pairs,
            model=MODEL,
            settings=RewardModelSettings(),
            batch_size=4,
            seed=0,
            out=out,
            scratch=tmp_path / f"{name}-scratch",
            lora=NO_DROPOUT,
            training=training,
            heldout_file=toy.heldout,
        )
        scales.append(json.loads((out / "scale.json").read_text()))
        heads.append(load_file(out / "reward_model/adapter_model.safetensors"))
    assert scales[1] == pytest.approx(scales[0], rel=1e-3, abs=1e-4)
    assert scales[0]["deviation"] not in (0.0, 1.0)
    assert heads[1].keys() == heads[0].keys()
    assert all(torch.allclose(heads[1][key], heads[0][key], rtol=1e-3, atol=1e-4) for key in heads[0])


def assert_same(one: StageOutput, two: StageOutput) -> None:
    """The same training, by one process and by two: curve, adapter, counts, files."""
    assert one.key != two.key
    curves = [[row["train/loss"] for row in output.history()] for output in (one, two)]
    assert len(curves[0]) == 4
    assert curves[1] == pytest.approx(curves[0], rel=1e-3, abs=1e-4)
    assert curves[0][-1] < curves[0][0]
    a, b = weights(one), weights(two)
    assert a.keys() == b.keys()
    largest = max(tensor.abs().max().item() for tensor in a.values())
    apart = max((a[name] - b[name]).abs().max().item() for name in a)
    assert apart < 2e-3 * largest, f"{apart} of {largest}"
    for name in ("train/steps", "cost/train_tokens", "cost/trainable_parameters", "cost/adapter_bytes"):
        assert one.metrics().get(name) == two.metrics().get(name), name
    assert sorted(file.name for file in two.path.rglob("*")) == sorted(file.name for file in one.path.rglob("*"))


STEPS = 40


def driver(toy: TinyToy, out: Path, scratch: Path) -> Any:
    """A pipeline process of its own that launches a training of two processes; it prints into `out`.log."""
    arguments = (toy.base, toy.pairs, out, scratch, STEPS, out.with_suffix(".log"))
    process = forking().Process(target=drive, args=arguments)
    process.start()
    return process


@pytest.mark.slow
def test_killed_it_leaves_no_orphan_and_goes_on_where_it_stopped(toy: TinyToy, tmp_path: Path) -> None:
    """kill -9 of the pipeline's process in mid-training; LORA has dropout, so each process's random state counts."""
    scratch = tmp_path / "scratch"
    killed = driver(toy, tmp_path / "killed", scratch)
    deadline = time.monotonic() + 250
    while not (scratch / "checkpoint-10" / SEAL).exists():
        assert time.monotonic() < deadline
        assert killed.exitcode is None, (tmp_path / "killed.log").read_text()[-3000:]
        time.sleep(0.01)
    assert (scratch / "job" / "job.json").exists(), "what a kill leaves lies in the stage's folder"
    children = psutil.Process(killed.pid).children(recursive=True)
    assert len(children) >= 3, "a launcher and two workers"
    killed.kill()
    killed.join()
    assert psutil.wait_procs(children, timeout=60)[1] == []
    assert not (tmp_path / "killed" / "adapter").exists()
    reached = max(int(folder.name.split("-")[1]) for folder in scratch.glob("checkpoint-*"))
    assert 10 <= reached < STEPS

    (scratch / "checkpoint-35").mkdir()  # begun and not finished: passed over, and said so by one process
    drivers = {
        "resumed": driver(toy, tmp_path / "resumed", scratch),
        "whole": driver(toy, tmp_path / "whole", tmp_path / "scratch-whole"),
    }
    said = {}
    for name, process in drivers.items():
        process.join(timeout=500)
        said[name] = (tmp_path / f"{name}.log").read_text()
        assert process.exitcode == 0, said[name][-3000:]
    assert len(re.findall(r"INFO:tasks\.stages\.process_launcher:.*checkpoint-35 is not whole", said["resumed"])) == 1
    assert "is not whole" not in said["whole"]
    a, b = (load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("resumed", "whole"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    curves = [rows(tmp_path / name / "history.jsonl") for name in ("resumed", "whole")]
    assert len(curves[0]) == STEPS
    assert curves[0] == curves[1]
    steps_of_each = [
        json.loads((tmp_path / n / "metrics.json").read_text())["train/steps"] for n in ("resumed", "whole")
    ]
    assert steps_of_each == [STEPS, STEPS]


@pytest.mark.usefixtures("forked_launch")
def test_a_failing_process_reports(toy: TinyToy, tmp_path: Path) -> None:
    """A mistake that no user can make: the message has the error, not torchrun's summary."""
    launcher = ProcessLauncher(LaunchSettings(engine="accelerate", processes=1))
    with pytest.raises(TrainingProcessError, match=r"ddp\.yaml, 1 process\) ended with code 1") as failed:
        call(launcher, toy, toy.base, tmp_path, seed="no number")
    assert "Error" in str(failed.value).splitlines()[-1]
    assert "torch.distributed.elastic" not in str(failed.value)
    assert len(str(failed.value).splitlines()) < 60


@pytest.mark.usefixtures("forked_launch")
def test_what_a_process_refuses_is_a_refusal_here(toy: TinyToy, tmp_path: Path) -> None:
    """The base is there, and its weights are not what they say."""
    launcher = ProcessLauncher(LaunchSettings(engine="accelerate", processes=1))
    broken = tmp_path / "base"
    shutil.copytree(toy.base, broken)
    (broken / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(QAdapterError, match=r"the model '.*base' could not be loaded") as refused:
        call(launcher, toy, broken, tmp_path)
    assert "Traceback" not in str(refused.value)


def call(launcher: ProcessLauncher, toy: TinyToy, base: Path, home: Path, seed: Any = 3) -> None:
    for name in ("out", "scratch"):
        (home / name).mkdir()
    launcher(
        train_function,
        sft.train,
        sft.SFTSettings(),
        base,
        toy.pairs,
        model=MODEL,
        lora=LORA,
        training=TRAINING.model_copy(update={"max_steps": 2}),
        seed=seed,
        needs={},
        out=home / "out",
        scratch=home / "scratch",
    )


def test_a_killed_process_has_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A process that the system kills (out of memory) writes no failure: what was printed last is all there is."""
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "failure-0.json").write_text("of a run that was killed: not of this one")
    script = (
        "import os, sys; print('progress: sft: step 1 of 2, loss 0.5'); print('loading shards'); "
        "print('Killed', file=sys.stderr, flush=True); sys.stdout.flush(); os.kill(os.getpid(), 9)"
    )
    caplog.set_level(logging.INFO, logger="tasks.stages.process_launcher")
    original = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda _, **options: original([sys.executable, "-c", script], **options))
    with pytest.raises(TrainingProcessError, match=r"(?s)ended with code -9.*loading shards\nKilled"):
        ProcessLauncher(LaunchSettings(engine="accelerate", processes=2))(
            train_function, out=tmp_path, scratch=tmp_path
        )
    assert list(tmp_path.iterdir()) == []
    assert caplog.messages == ["sft: step 1 of 2, loss 0.5"]


def test_an_interrupt_ends_the_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C, a cancelled run: no child goes on."""
    script = (
        "import subprocess, sys, time\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)\n"
        "print('progress: started', flush=True)\ntime.sleep(600)"
    )
    original, started = subprocess.Popen, []

    def popen(_: Any, **options: Any) -> Any:
        started.append(original([sys.executable, "-c", script], **options))
        return started[-1]

    family: list[psutil.Process] = []

    def interrupt(*_: Any) -> None:
        family.extend(psutil.Process(started[0].pid).children(recursive=True))
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", popen)
    monkeypatch.setattr("tasks.stages.process_launcher._LOGGER.info", interrupt)
    with pytest.raises(KeyboardInterrupt):
        ProcessLauncher(LaunchSettings(engine="accelerate", processes=2))(
            train_function, out=tmp_path, scratch=tmp_path
        )
    assert len(family) == 1
    assert started[0].poll() is not None
    assert psutil.wait_procs(family, timeout=10)[1] == []


def test_a_call_survives_as_json(tmp_path: Path) -> None:
    named = {
        "out": tmp_path,
        "training": TRAINING,
        "choice": CHOICES["replay"],
        "seed": 3,
        "needs": {"answers": tmp_path},
    }
    positional = [sft.train, [[{"role": "user", "content": "ü"}]]]
    write_job(tmp_path / "job.json", train_function, positional, named)
    job = read_job(tmp_path / "job.json")
    assert job["function"] is train_function
    assert (job["positional"], job["named"]) == (positional, named)
    assert {name: type(value) for name, value in job["named"].items()} == {n: type(v) for n, v in named.items()}


def test_a_job_runs_nothing_but_trainings(tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text(json.dumps({"function": "os:system", "positional": ["true"], "named": {}}))
    with pytest.raises(ValueError, match=r"os is not below qadapter\.training"):
        read_job(tmp_path / "job.json")
    with pytest.raises(TypeError, match="object cannot be handed"):
        write_job(tmp_path / "job.json", train_function, [object()], {})


# ---- settings


def test_in_process_adds_nothing_to_a_key() -> None:
    assert ProcessLauncher(LaunchSettings()).keyed() == {}
    two, four = (ProcessLauncher(LaunchSettings(engine="accelerate", processes=n)).keyed()["launch"] for n in (2, 4))
    assert (two["processes"], four["processes"]) == (2, 4)
    assert two["config"] == four["config"]
    assert two["config"]["distributed_type"] == "MULTI_GPU"
    assert "num_processes" not in two["config"]


def test_the_engine_is_no_part_of_the_code_digest() -> None:
    def digest(launcher: ProcessLauncher) -> str:
        def compute(out: Path, scratch: Path) -> None:
            launcher(train_function, out=out, scratch=scratch)

        return code_digest("qadapter.errors", compute)

    assert digest(ProcessLauncher(LaunchSettings())) == digest(
        ProcessLauncher(LaunchSettings(engine="accelerate", processes=2))
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"launch.processes": 3, "training.batch_size": 16},
            "training.batch_size 16 is not a multiple of launch.processes 3",
        ),
        (
            {"launch.processes": 2, "helpful_sft.micro_batch_size": 32},
            "helpful_sft.batch_size 32 is not a multiple of helpful_sft.micro_batch_size 32 × launch.processes 2",
        ),
        ({"launch.engine": "in-process", "launch.processes": 2}, "launch: config and processes belong to engine"),
        ({"launch.engine": "torchrun"}, "launch.engine: "),
        ({"launch.machines": 2}, "launch.machines: unknown key"),
    ],
)
def test_what_cannot_be_launched_is_refused_with_its_path(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(QAdapterError) as refused:
        load_experiment("smoke", {"launch.engine": "accelerate", **changes})
    assert message in str(refused.value)


def test_a_batch_that_divides_is_accepted() -> None:
    changes = {"training.batch_size": 16, "training.micro_batch_size": 2, "launch.processes": 4}
    experiment = load_experiment("smoke", {"launch.engine": "accelerate", **changes})
    assert experiment.launch.processes == 4
    assert load_experiment("smoke").launch == LaunchSettings()


@pytest.mark.parametrize(
    ("processes", "micro", "expected"), [(1, None, (8, 1)), (2, None, (4, 1)), (2, 2, (2, 2)), (4, 1, (1, 2))]
)
def test_the_batch_is_that_of_all_processes(
    processes: int, micro: int | None, expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    training = TRAINING.model_copy(update={"batch_size": 8, "micro_batch_size": micro})
    arguments = trainer_arguments(training, seed=0, scratch=tmp_path)
    found = arguments["per_device_train_batch_size"], arguments["gradient_accumulation_steps"]
    assert found == expected
    assert found[0] * found[1] * processes == 8
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(QAdapterError, match="is not a multiple of micro-batch"):
        trainer_arguments(training, seed=0, scratch=tmp_path)


def test_every_shipped_config_is_one_that_accelerate_reads() -> None:
    kinds = {}
    for file in sorted(CONFIG_FOLDER.glob("*.yaml")):
        config = load_config_from_file(str(file))  # refuses unknown keys
        kinds[file.name] = str(config.distributed_type).rpartition(".")[2]
        assert (config.num_machines, config.mixed_precision, config.use_cpu) == (1, "no", False)
    assert kinds == {"ddp.yaml": "MULTI_GPU", "fsdp.yaml": "FSDP", "zero2.yaml": "DEEPSPEED", "zero3.yaml": "DEEPSPEED"}
    for stage in (2, 3):
        config = load_config_from_file(str(CONFIG_FOLDER / f"zero{stage}.yaml"))
        options = vars(launch_command_parser().parse_args(["script.py"]))
        assert config.deepspeed_config["zero_stage"] == stage
        assert set(config.deepspeed_config) <= options.keys()  # each becomes an option of `accelerate launch`


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"there is no file '.*mine\.yaml'; known are ddp\.yaml, fsdp\.yaml, zero2\.yaml, zero3\.yaml"),
        ("a: [", "is not YAML"),
        ("distributed_type: XLA", "distributed_type of .* is 'XLA'; expected one of MULTI_GPU, FSDP, DEEPSPEED"),
        ("- 1", r"launch\.config: .*mine\.yaml contains list; expected a mapping"),
        ("{distributed_type: MULTI_GPU, num_machines: 2}", "is for 2 machines; expected 1"),
        ("{distributed_type: DEEPSPEED}", "needs DeepSpeed, which is missing: pip install deepspeed"),
        ("{distributed_type: FSDP}", "splits the base's weights .*quantization is int8"),
    ],
)
def test_a_config_that_cannot_work_is_refused(
    tmp_path: Path, content: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qadapter.config.execution.find_spec", lambda _: None)
    file = tmp_path / "mine.yaml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(QAdapterError, match=message):
        LaunchSettings(engine="accelerate", config=str(file), processes=2).check("int8")


def test_fsdp_takes_a_base_that_is_not_quantised() -> None:
    LaunchSettings(engine="accelerate", config="fsdp.yaml", processes=2).check("none")


@pytest.mark.parametrize("engine", ["dask", "ray"])
def test_a_runner_that_is_not_installed_is_refused(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qadapter.config.execution.find_spec", lambda _: None)
    with pytest.raises(QAdapterError, match=rf"needs prefect-{engine}; install it \(pip install .*\[{engine}\]"):
        RunnerSettings(engine=engine).check()
    with pytest.raises(ValueError, match="address belongs to"):
        RunnerSettings(address="tcp://scheduler:8786")
