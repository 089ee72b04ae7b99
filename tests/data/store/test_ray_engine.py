"""`prepare` on a Ray cluster of two nodes, one of which is killed half way."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from helpers import ROOT, contents, dist_train, environment, said
from ray.cluster_utils import Cluster

from dist_train.data.store.reader import SHARDS, Store
from dist_train.data.store.verify import verify
from dist_train.data.synthetic.render import synthesize

CLIPS, SHARDS_IN_ALL = 24, 12
#: Ray takes 20 seconds to believe that a node is gone, unless told to look more often.
HEALTH = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 300,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 3,
}


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head that runs no tasks, and two nodes that run one each, on this machine."""
    small = {"object_store_memory": 80 << 20, "include_dashboard": False}
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": HEALTH, **small}
    )
    for _ in range(2):
        cluster.add_node(num_cpus=1, object_store_memory=80 << 20)
    cluster.wait_for_nodes()
    yield cluster
    cluster.shutdown()


@pytest.mark.slow
def test_a_node_killed_half_way(tmp_path: Path, cluster: Cluster) -> None:
    raw, out = tmp_path / "raw", tmp_path / "store"
    synthesize(raw, clips=CLIPS, seed=3, stall_rate=0.25)
    (raw / "videos" / "100007.mp4").write_bytes(b"no video")

    def arguments(out: Path, engine: str) -> list[object]:
        return [
            *("prepare", "--manifest", raw / "train_metadata.csv", "--source", raw / "videos"),
            *("--out", out, "--shard-clips", CLIPS // SHARDS_IN_ALL, "--engine", engine),
            *("--max-rejected", "0.1"),
        ]

    said(*arguments(tmp_path / "straight", "local"))
    lost = cluster.worker_nodes.copy().pop()
    with (tmp_path / "errors").open("wb") as errors:
        process = psutil.Popen(
            dist_train(*arguments(out, "ray")),
            env=environment(RAY_ADDRESS=cluster.address),
            cwd=ROOT,
            stdout=errors,
            stderr=errors,
        )
        deadline = time.monotonic() + 120
        while len(list((out / SHARDS).glob("*.tar"))) < SHARDS_IN_ALL // 3:
            assert process.poll() is None, (tmp_path / "errors").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert len(list((out / SHARDS).glob("*.tar"))) < SHARDS_IN_ALL, "it came too late"
        cluster.remove_node(lost, allow_graceful=False)
        assert process.wait(timeout=120) == 0, (tmp_path / "errors").read_text()

    assert contents(out) == contents(tmp_path / "straight")
    assert len(Store(out).table) == CLIPS - 1
    assert verify(out) == []
