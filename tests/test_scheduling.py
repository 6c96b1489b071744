"""Which test process gets which file: those that share a server stay together, and no test is left out or run twice."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from tests.support.scheduling import SharedServers, family_of

REAL = ["tests/processes/test_killed.py", "tests/processes/test_outages.py", "tests/processes/test_kill_needs.py"]
HARNESS = ["tests/processes/test_pipeline.py", "tests/flows/test_announce.py"]
OTHER = ["tests/qadapter/gate/test_gate.py", "tests/qadapter/test_public_names.py"]


class Node:
    """A test process that does at once what it is sent."""

    def __init__(self, name: str) -> None:
        self.gateway, self.shutting_down = SimpleNamespace(id=name), False
        self.waiting: list[int] = []

    def send_runtest_some(self, indices: list[int]) -> None:
        self.waiting += indices

    def shutdown(self) -> None:
        self.shutting_down = True


def distributed(files: list[str], processes: int) -> dict[str, list[str]]:
    """The files that each process ran, in order, where each runs one test of three in turn."""
    tests = [f"{file}::test_{number}" for file in files for number in range(3)]
    options = SimpleNamespace(loadscopereorder=False, tx=["popen"] * processes, verbose=0)
    config: Any = SimpleNamespace(option=options, getvalue=lambda name: getattr(options, name))
    scheduler, nodes = SharedServers(config), [Node(f"gw{number}") for number in range(processes)]
    for node in nodes:
        scheduler.add_node(node)
    for node in nodes:
        scheduler.add_node_collection(node, tests)
    scheduler.schedule()
    ran: dict[str, list[str]] = {node.gateway.id: [] for node in nodes}
    while any(node.waiting for node in nodes):
        for node in nodes:
            if node.waiting:
                index = node.waiting.pop(0)
                ran[node.gateway.id].append(tests[index])
                scheduler.mark_test_complete(node, index)
    assert sorted(test for own in ran.values() for test in own) == sorted(tests)
    return {name: list(dict.fromkeys(test.partition("::")[0] for test in own)) for name, own in ran.items()}


def test_files_know_their_server() -> None:
    assert {family_of(file) for file in REAL} == {"real runs"}
    assert {family_of(file) for file in HARNESS} == {"the harness"}
    assert {family_of(file) for file in OTHER} == {None}


def test_a_family_stays_in_one_process() -> None:
    ran = distributed([REAL[0], HARNESS[0], *OTHER, *REAL[1:], *HARNESS[1:]], 2)
    assert [file for file in ran["gw0"] if file in REAL] == REAL
    assert [file for file in ran["gw1"] if file in HARNESS] == HARNESS


def test_an_idle_process_takes_what_is_left() -> None:
    ran = distributed(REAL + OTHER, 3)
    assert sorted(file for own in ran.values() for file in own) == sorted(REAL + OTHER)
    assert all(ran.values())
