"""Two hosts whose network is cut, or wrongly set: both end by themselves, and say why."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from faults import Runs
from helpers import overrides
from launcher import Launcher
from run_files import DROPOUT, assert_same, sessions_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def host(launcher: Launcher) -> Iterator[Launcher]:
    """A launcher on a network of its own, which it may join others to."""
    with launcher.within("ip link set lo up", network=True) as (inner, _):
        yield inner


def test_a_cut_cable_ends_both_and_they_go_on_when_it_is_mended(
    host: Launcher, store: Path, straight: Path, tmp_path: Path
) -> None:
    settings = overrides(store, tmp_path, DROPOUT)
    cut = Runs(1, 6, command="ip link set far down")
    group = host.run(2, [*settings, "train.timeout=8"], faults=[cut], networks=True)
    assert group.codes(20) == [75, 75], group.said()
    for rank in (0, 1):
        said = group.said(rank)
        assert "the network between them is gone" in said or "cannot be reached" in said
        assert "Go on by --resume auto" in said
    host.run(2, settings, resume=True, networks=True).well()
    assert_same(tmp_path, straight)
    assert sessions_of(tmp_path)[1] == (2, 4)


def test_the_doctor_says_that_two_hosts_do_not_find_each_other(
    host: Launcher, tmp_path: Path
) -> None:
    """They meet, but then look for each other on a network of one host only."""
    doctor = ["-m", "dist_train", "doctor", "--timeout", 2, "--folder", tmp_path]
    wrong = {"GLOO_SOCKET_IFNAME": "lo", "COLUMNS": "900"}
    group = host.program(2, doctor, networks=True, **wrong)
    assert group.codes() == [1, 1], group.said()
    for rank in (0, 1):
        lines = group.said(rank).splitlines()
        (line,) = [line for line in lines if "processes find each other" in line]
        assert "bad" in line
        assert "10.77.0.1:" in line
        assert "GLOO_SOCKET_IFNAME" in line
