"""Job templates against Prefect's own, and an image whose recipe is read, not built: there is no Docker here."""

from __future__ import annotations

import asyncio
import json
import re
import shlex
from fnmatch import fnmatch
from importlib import import_module
from importlib.resources import files
from typing import Any

import jsonschema
import pytest
import yaml
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.utilities.templating import apply_values, find_placeholders
from prefect.workers.process import ProcessJobConfiguration

from flows.commands.table import COMMANDS
from tests.support.paths import PROJECT_ROOT

FOLDER = PROJECT_ROOT / "configs" / "work_pools"
TYPES = {"process": "prefect", "docker": "prefect-docker", "kubernetes": "prefect-kubernetes"}


def template(kind: str) -> dict[str, Any]:
    return dict(json.loads((FOLDER / f"{kind}.json").read_text(encoding="utf-8")))


def published(kind: str) -> dict[str, Any]:
    """The base job template that Prefect publishes for a worker type; `get-default-base-job-template` prints it."""
    views = files("prefect.server.api") / "collections_data" / "views" / "aggregate-worker-metadata.json"
    metadata = json.loads(views.read_text(encoding="utf-8"))
    return dict(metadata[TYPES[kind]][kind]["default_base_job_configuration"])


def defaults(found: dict[str, Any]) -> dict[str, Any]:
    return {name: p["default"] for name, p in found["variables"]["properties"].items() if "default" in p}


def rendered(kind: str, **values: Any) -> dict[str, Any]:
    """The job that a worker would submit: Prefect's own templating with the defaults and these job variables."""
    found = template(kind)
    return dict(apply_values(found["job_configuration"], {**defaults(found), **values}, remove_notset=True))


def test_there_is_a_template_for_each_type() -> None:
    assert sorted(file.stem for file in FOLDER.glob("*.json")) == sorted(TYPES)


@pytest.mark.parametrize("kind", TYPES)
def test_a_template_is_prefects_own_with_other_defaults(kind: str) -> None:
    """What a worker of the type reads is all there, under the same names and types; additions are declared."""
    ours, theirs = template(kind), published(kind)
    assert set(theirs["job_configuration"]) == set(ours["job_configuration"])
    mine, base = ours["variables"]["properties"], theirs["variables"]["properties"]
    for name, schema in base.items():
        same = {k: v for k, v in mine[name].items() if k not in ("default", "example")}
        assert same == {k: v for k, v in schema.items() if k not in ("default", "example")}, name
    assert set(mine) - set(base) == ({"gpus", "volume_claim"} if kind == "kubernetes" else set())
    used = {p.name for p in find_placeholders(ours["job_configuration"])}
    assert used == set(mine) | ({"name"} if "name" not in mine else set())


@pytest.mark.parametrize("kind", TYPES)
def test_defaults_are_of_their_types(kind: str) -> None:
    found = template(kind)
    schema = {**found["variables"], "definitions": found["variables"].get("definitions", {})}
    jsonschema.Draft7Validator.check_schema(schema)
    jsonschema.validate(defaults(found), schema, jsonschema.Draft7Validator)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**defaults(found), "env": {"A": 1}}, schema, jsonschema.Draft7Validator)


def test_a_docker_run_shares_the_workspace() -> None:
    job = rendered("docker")
    assert job["image"] == "qadapter-pipeline:latest"
    assert job["volumes"] == ["qadapter-work:/work"]
    assert job["env"]["QADAPTER_HOME"] == "/work"
    assert job["privileged"] is False
    assert "{{" not in json.dumps(job)


def test_a_kubernetes_job_has_its_volume_its_gpus_and_no_rights() -> None:
    job = rendered("kubernetes", gpus=2, volume_claim="fast", memory_limit="64Gi")["job_manifest"]
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"memory": "64Gi", "nvidia.com/gpu": 2}
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts == {"work": "/work", "shared-memory": "/dev/shm"}
    assert {volume["name"] for volume in pod["volumes"]} == set(mounts)
    assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "fast"}
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert container["securityContext"] == {"allowPrivilegeEscalation": False}
    assert job["spec"]["backoffLimit"] == 0  # Prefect decides about another attempt
    assert "{{" not in json.dumps(job)


async def check_server() -> None:
    async with get_client() as client:
        for kind in TYPES:
            made = await client.create_work_pool(
                WorkPoolCreate(name=f"qadapter-{kind}", type=kind, base_job_template=template(kind))
            )
            assert made.type == kind
            read = await client.read_work_pool(f"qadapter-{kind}")
            assert read.base_job_template == template(kind)
        process = await client.read_work_pool("qadapter-process")
        job = await ProcessJobConfiguration.from_template_and_values(process.base_job_template, {"name": "x"})
        assert job.env["DO_NOT_TRACK"] == "1"
        assert job.name == "x"


@pytest.mark.slow
def test_prefects_server_takes_the_templates(harness: None) -> None:
    """The server checks defaults against the schema; the process worker, which is installed, reads its own."""
    asyncio.run(check_server())


# ---- the image


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile as (instruction, arguments), continued lines joined."""
    text = (PROJECT_ROOT / "Dockerfile").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines())]


def copied() -> list[str]:
    """Names that the image gets from the project."""
    return [name for word, rest in instructions() if word == "COPY" for name in shlex.split(rest)[:-1]]


def test_the_image_is_pinned_small_and_not_root() -> None:
    words = [word for word, _ in instructions()]
    assert {"ARG", "FROM", "ENV", "WORKDIR", "COPY", "RUN", "USER", "VOLUME", "CMD"} == set(words)
    assert instructions()[:2] == [("ARG", "BASE=python:3.11-slim"), ("FROM", "${BASE}")]
    assert words.index("USER") > max(i for i, word in enumerate(words) if word in ("RUN", "COPY"))
    assert dict(instructions())["USER"] == "1000"
    installs = [rest for word, rest in instructions() if word == "RUN" and "pip install" in rest]
    assert len(installs) == 2
    assert installs[0].count("--require-hashes") == installs[0].count("pip install") == 2
    assert "-c constraints.txt" in installs[1]
    text = (PROJECT_ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert not re.search(r"https?://|--index-url|--extra-index|--trusted-host|HF_TOKEN|API_KEY|SECRET|PASSWORD", text)


def test_the_image_gets_what_it_copies_and_a_run_needs() -> None:
    assert [name for name in copied() if not (PROJECT_ROOT / name).exists()] == []
    assert {"configs", "qadapter", "tasks", "flows", "prefect.toml", "pyproject.toml", "constraints.txt"} <= set(
        copied()
    )
    command = json.loads(dict(instructions())["CMD"])
    assert command[:3] == ["python", "-m", "qadapter"]
    assert command[3] in COMMANDS


def test_nothing_else_is_sent_to_the_builder() -> None:
    lines = (PROJECT_ROOT / ".dockerignore").read_text(encoding="utf-8").split("\n")
    rules = [line for line in lines if line and not line.startswith("#")]

    def sent(name: str) -> bool:
        """Docker's rule: the last matching line decides; one for a folder covers what is below it."""
        kept = True
        for rule in rules:
            pattern = rule.removeprefix("!").removeprefix("**/")
            parts = name.split("/")
            paths = ["/".join(parts[: i + 1]) for i in range(len(parts))]
            candidates = parts if "**/" in rule else paths
            if any(fnmatch(candidate, pattern) for candidate in candidates):
                kept = rule.startswith("!")
        return kept

    assert all(sent(name) for name in copied())
    assert sent("qadapter/training/adapt.py")
    for private in (".env", "flows/.env", "mlflow.db", "mlruns/1/meta.yaml", ".qadapter/stages/x", ".git/config"):
        assert not sent(private), private
    for useless in ("tests/conftest.py", ".venv/bin/python", "qadapter/__pycache__/x.pyc"):
        assert not sent(useless), useless


@pytest.mark.slow
def test_the_containers_deployments_find_their_code_in_the_image() -> None:
    found = yaml.safe_load((FOLDER / "deployments.yaml").read_text(encoding="utf-8"))
    (step,) = found["pull"]
    assert step == {"prefect.deployments.steps.set_working_directory": {"directory": dict(instructions())["WORKDIR"]}}
    pools = ("qadapter-docker", "qadapter-kubernetes")
    flows = ("flows/full_paper_repro.py:full_paper_repro", "flows/customize.py:customize_on_new_preferences")
    expected = [(entrypoint, pool) for entrypoint in flows for pool in pools]
    assert [(d["entrypoint"], d["work_pool"]["name"]) for d in found["deployments"]] == expected
    for deployment in found["deployments"]:
        path, _, name = deployment["entrypoint"].partition(":")
        flow = getattr(import_module(path.removesuffix(".py").replace("/", ".")), name)
        flow.validate_parameters(deployment["parameters"])
