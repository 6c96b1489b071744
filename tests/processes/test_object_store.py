"""Finished stages and MLflow's files in an object store: S3's protocol over HTTP, served by moto on loopback.

Runs where s3fs, boto3 and moto's server are installed; `make test` does not need them (docs/scaling.md).
"""

from __future__ import annotations

import json
import logging
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from qadapter.files.artifacts import digest_tree
from tasks.stages import remote as remote_store
from tasks.tracking.models import find_served_model
from tests.processes.test_mlflow_server import promote_policy
from tests.support.real_runs import mlflow_server
from tests.tasks.test_remote_store import Work, cut_before, machine, run

pytestmark = pytest.mark.slow

for _package in ("moto.server", "s3fs", "boto3"):
    pytest.importorskip(_package, reason='no object store: pip install s3fs boto3 "moto[server]"')

URL = "s3://shared/stages"


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a server with the empty bucket `shared`."""
    import boto3
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    address = f"http://{host}:{port}"
    for name, value in (
        ("AWS_ENDPOINT_URL", address),
        ("MLFLOW_S3_ENDPOINT_URL", address),
        ("AWS_ACCESS_KEY_ID", "key"),
        ("AWS_SECRET_ACCESS_KEY", "secret"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
    ):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(remote_store, "_PAUSES", (0.0, 0.0))
    monkeypatch.setattr(remote_store, "_away_until", {})
    s3fs.S3FileSystem.clear_instance_cache()
    httpx.post(f"{address}/moto-api/reset").raise_for_status()  # moto's memory is one for the whole process
    boto3.client("s3").create_bucket(Bucket="shared")
    yield address
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def objects() -> dict[str, int]:
    """Name → bytes of everything in the bucket."""
    import boto3

    found = boto3.client("s3").list_objects_v2(Bucket="shared").get("Contents", [])
    return {str(each["Key"]): int(each["Size"]) for each in found}


def test_machines_share_a_stage_and_check_every_byte(
    tmp_path: Path, bucket: str, caplog: pytest.LogCaptureFixture
) -> None:
    import boto3

    work = Work()
    first = run(machine(tmp_path, "a", URL), work)
    second = run(machine(tmp_path, "b", URL), work)
    assert (first.cached, second.cached, work.calls) == (False, True, 1)
    assert digest_tree(second.path, exclude={"manifest.json"}) == second.digest == first.digest
    (weights,) = (name for name in objects() if name.endswith("weights.bin"))
    assert objects()[weights] == len(b"weights") * 1000
    assert len(objects()) == 3

    boto3.client("s3").put_object(Bucket="shared", Key=weights, Body=b"Weights" + b"weights" * 999)
    with caplog.at_level(logging.WARNING):
        assert run(machine(tmp_path, "c", URL), work).cached is False
    assert "damaged and will be computed here" in caplog.text
    assert run(machine(tmp_path, "d", URL), work).cached is True
    assert work.calls == 2


@pytest.mark.parametrize("writes", [0, 1, 2])
def test_a_half_uploaded_stage_is_not_seen(
    tmp_path: Path, bucket: str, writes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = Work()
    with monkeypatch.context() as patch:
        cut_before(patch, writes)
        with pytest.raises(KeyboardInterrupt):
            run(machine(tmp_path, "a", URL), work)
    assert len(objects()) == writes
    assert [run(machine(tmp_path, name, URL), work).cached for name in ("b", "c")] == [False, True]
    assert work.calls == 2


def test_an_unavailable_store_or_bucket_stops_no_run(
    tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import s3fs

    work = Work()
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        s3fs.S3FileSystem.clear_instance_cache()
        with caplog.at_level(logging.WARNING):
            assert run(machine(tmp_path, "a", URL), work).cached is False
    assert f"The store {URL} does not answer" in caplog.text
    assert "secret" not in caplog.text
    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.setattr(remote_store, "_away_until", {})
    assert objects() == {}
    assert run(machine(tmp_path, "a", URL), work).cached is True, "finished here, and pushed now"
    assert run(machine(tmp_path, "b", URL), work).cached is True
    assert work.calls == 1


def test_mlflow_keeps_its_files_there(tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model is registered by one machine and read by another, through the server, which alone knows the bucket."""
    kept = tmp_path / "server"
    kept.mkdir()
    server = mlflow_server(kept, files="s3://shared/mlflow").start()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "MLFLOW_S3_ENDPOINT_URL"):
        monkeypatch.delenv(name)
    try:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
        monkeypatch.setenv("QADAPTER_HOME", str(tmp_path / "a"))
        promote_policy(tmp_path)

        monkeypatch.setenv("QADAPTER_HOME", str(tmp_path / "b"))
        found = find_served_model("policy@champion")
        assert (found.adapter / "adapter_model.safetensors").read_text() == "adapter"
        assert (Path(found.base) / "model.safetensors").read_text() == "base"
    finally:
        server.send(signal.SIGKILL)
    for name, value in (
        ("AWS_ACCESS_KEY_ID", "key"),
        ("AWS_SECRET_ACCESS_KEY", "secret"),
        ("AWS_ENDPOINT_URL", bucket),
    ):
        monkeypatch.setenv(name, value)
    names = [name for name in objects() if name.startswith("mlflow/")]
    assert sum(name.endswith("model.safetensors") for name in names) == 2
    assert not list(kept.rglob("*.safetensors"))
    assert json.dumps(names).count("MLmodel") >= 1
