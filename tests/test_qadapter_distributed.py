"""Two CPU processes with DDP against one process with twice the batch."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ddp_worker import main as train_alone
from safetensors.torch import load_file
from tiny_models import tiny_model

from qadapter.policy import QAdapterForCausalLM

TESTS = Path(__file__).parent


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["residual", "paper"])
def test_two_processes_are_one_with_twice_the_batch(tmp_path: Path, objective: str):
    """2 processes × 2 pairs × 2 micro-batches = 1 process × 4 pairs × 2: same steps, same logs, same evaluation."""
    # On CPU, `accelerate launch` starts several processes through MPI only; torchrun is what it calls on GPUs.
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    command += [str(TESTS / "ddp_worker.py"), str(tmp_path / "two"), objective, "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert finished.returncode == 0, finished.stderr[-3000:]
    train_alone(str(tmp_path / "one"), objective, 4)
    one, two = (load_file(tmp_path / name / "result.safetensors") for name in ("one", "two"))
    assert (one.pop("world").item(), two.pop("world").item()) == (1, 2)
    assert set(one) == set(two)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=2e-6, rtol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
    loaded = QAdapterForCausalLM.from_pretrained(tmp_path / "two" / "adapter", base_model=tiny_model())
    saved = {f"{n}": p for n, p in loaded.named_parameters() if "lora_" in n}
    assert all(torch.equal(saved[name], two[name]) for name in saved)
