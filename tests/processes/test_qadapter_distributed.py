"""Two CPU processes against one: DDP through `accelerate launch`, and sharding (FSDP2)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file

from flows.running.forking import forking
from qadapter.policy.model import QAdapterForCausalLM
from tests.qadapter.training.test_qadapter_trainer import pairs
from tests.support.distributed_worker import gradient_policy, loss_of, train, whole_totals
from tests.support.forked_launch import launch
from tests.support.paths import PROJECT_ROOT
from tests.support.real_runs import free_port
from tests.support.tiny_models import tiny_model


def run_two(folder: Path, launcher: list[str], *arguments: str) -> None:
    """Run the worker in two processes of a launcher; `test_process_launcher.py` starts one as its command."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    environment["PYTHONPATH"] = os.pathsep.join([str(PROJECT_ROOT), os.environ.get("PYTHONPATH", "")])
    command, log = [*launcher[1:], "-m", "tests.support.distributed_worker", *arguments], folder / "launcher.log"
    log.touch()
    process = forking().Process(target=launch, args=(launcher[0], command, environment, str(log)))
    process.start()
    process.join(300)
    assert process.exitcode == 0, log.read_text()[-3000:]


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_batch(tmp_path: Path):
    """2 processes × 2 pairs × 2 micro-batches = 1 process × 4 pairs × 2: same steps, same logs, same evaluation."""
    config = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_GPU", "use_cpu": True}
    config |= {"num_machines": 1, "num_processes": 2, "mixed_precision": "no", "machine_rank": 0}
    (tmp_path / "accelerate.yaml").write_text(yaml.safe_dump(config))
    launcher = ["accelerate.commands.launch", f"--config_file={tmp_path / 'accelerate.yaml'}"]
    launcher += [f"--main_process_port={free_port()}"]
    run_two(tmp_path, launcher, "train", str(tmp_path / "two"), "residual", "2")
    train(tmp_path / "one", "residual", 4)
    one, two = (load_file(tmp_path / name / "result.safetensors") for name in ("one", "two"))
    assert (one.pop("world").item(), two.pop("world").item()) == (1, 2)
    assert set(one) == set(two)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=2e-6, rtol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert_saved(tmp_path / "two" / "adapter", two)


@pytest.mark.slow
def test_sharding_keeps_the_gradient_and_saves_the_adapter(tmp_path: Path):
    launcher = ["torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    run_two(tmp_path, launcher, "shard", str(tmp_path))
    policy = gradient_policy()
    loss_of(policy, pairs(8), whole_totals(policy)).backward()
    sharded = load_file(tmp_path / "result.safetensors")
    expected = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    assert set(sharded) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(sharded[name], value, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    assert_saved(tmp_path / "adapter", {n: p.detach() for n, p in policy.named_parameters() if "lora_" in n})


def assert_saved(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    loaded = QAdapterForCausalLM.from_pretrained(folder, base_model=tiny_model())
    saved = {name: p for name, p in loaded.named_parameters() if "lora_" in name}
    assert len(saved) == 28
    assert all(torch.equal(saved[name], expected[name]) for name in saved)


def test_the_fsdp_config_is_one_that_accelerate_reads():
    file = PROJECT_ROOT / "configs" / "accelerate" / "fsdp.yaml"
    config = load_config_from_file(str(file))
    assert str(config.distributed_type).endswith("FSDP")
    assert config.fsdp_config["fsdp_version"] == 2
    assert config.fsdp_config["fsdp_state_dict_type"] == "FULL_STATE_DICT"
