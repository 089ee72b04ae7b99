"""Two hosts, as network namespaces joined by one cable, which is cut in the middle of training.

Each has its own ``accelerate launch``; tests/faults/test_network.py does the same without them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from helpers import ROOT, environment, launched, metrics_of, overrides

EPOCHS, STEPS = 10, 60
# Seconds that a process waits for the other one, and within which both must have ended then.
TIMEOUT, PATIENCE = 6, 45


@dataclass
class Hosts:
    """Names of the two namespaces, and of each one's end of the cable."""

    names: list[str]
    cards: list[str]

    def start(self, *arguments: object, **env: str) -> list[subprocess.Popen[str]]:
        """The command ``dist-train`` under ``accelerate launch``, on each host."""
        processes = []
        for rank, (name, card) in enumerate(zip(self.names, self.cards, strict=True)):
            launch = launched("cpu_2proc.yaml", *arguments)
            launch[launch.index("-m", 2) : launch.index("-m", 2)] = [
                *("--num_machines", "2", "--machine_rank", f"{rank}"),
                *("--main_process_ip", "10.213.7.1", "--main_process_port", "29500"),
            ]
            processes.append(
                subprocess.Popen(
                    ["ip", "netns", "exec", name, *launch],
                    env=environment(**{"GLOO_SOCKET_IFNAME": card} | env),
                    cwd=ROOT,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
        return processes

    def cable(self, state: str) -> None:
        ip("-n", self.names[1], "link", "set", self.cards[1], state)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and the command ip (iproute2)")
    names = [f"dist-train-{os.getpid()}-{end}" for end in "ab"]
    cards = [f"dt{os.getpid() % 10**7}{end}" for end in "ab"]
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("link", "add", cards[0], "type", "veth", "peer", "name", cards[1])
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces or veth here: {error.stderr.strip()}")
        for number, (name, card) in enumerate(zip(names, cards, strict=True), start=1):
            ip("link", "set", card, "netns", name)
            ip("-n", name, "addr", "add", f"10.213.7.{number}/24", "dev", card)
            for link in ("lo", card):
                ip("-n", name, "link", "set", link, "up")
        yield Hosts(names, cards)
    finally:
        # With a namespace its end of the cable goes, and so the other.
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def wait_until(reached: Callable[[], bool], processes: list[subprocess.Popen[str]]) -> None:
    deadline = time.monotonic() + 90
    while not reached():
        for process in processes:
            assert process.poll() is None, f"it ended too soon: {process.communicate()[0]}"
        assert time.monotonic() < deadline, "it never came so far"
        time.sleep(0.002)


def ended(processes: list[subprocess.Popen[str]], seconds: float) -> list[str]:
    """What each said, once it has ended by itself."""
    try:
        return [process.communicate(timeout=seconds)[0] for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                for member in [process, *psutil.Process(process.pid).children(recursive=True)]:
                    member.kill()


@pytest.mark.soak
def test_a_run_over_two_hosts_outlives_a_cut_cable(
    hosts: Hosts, store: Path, tmp_path: Path
) -> None:
    longer = (f"train.epochs={EPOCHS}", "snapshots.at=[10]", f"train.timeout={TIMEOUT}")
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    processes = hosts.start("train", *overrides(store, straight, *longer))
    said = ended(processes, 100)
    assert [process.returncode for process in processes] == [0, 0], said

    settings = overrides(store, cut, *longer)
    processes = hosts.start("train", *settings)
    wait_until((cut / "checkpoints" / "step-8").exists, processes)
    hosts.cable("down")
    try:
        began = time.monotonic()
        said = ended(processes, PATIENCE)
        assert time.monotonic() - began < PATIENCE
    finally:
        hosts.cable("up")
    for process, lines in zip(processes, said, strict=True):
        assert process.returncode != 0
        assert "another process of the run has ended, or cannot be reached" in lines
        assert "--resume auto" in lines
    left = max(int(path.name[5:]) for path in (cut / "checkpoints").glob("step-*[0-9]"))
    assert 8 <= left < STEPS, "the cut came too late to show anything"

    processes = hosts.start("train", "--resume", "auto", *settings)
    said = ended(processes, 100)
    assert [process.returncode for process in processes] == [0, 0], said
    sessions = json.loads((cut / "run.json").read_text())["sessions"]
    assert [session["resumed_from_step"] for session in sessions] == [None, left]
    assert metrics_of(cut) == metrics_of(straight)
