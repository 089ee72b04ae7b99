"""What all tests share: property tests that are the same every time, the folder of real data, and
the server that starts launches of several ranks."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem
    from launcher import Launcher
    from room import LittleRoom

try:
    from hypothesis import HealthCheck, settings
except ImportError:
    # A GPU machine may lack it, and its tests need none.
    pass
else:
    settings.register_profile(
        "deterministic",
        derandomize=True,
        deadline=None,
        database=None,
        max_examples=60,
        # Fixtures of module scope hold nothing that an example changes.
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
    settings.load_profile("deterministic")


@pytest.fixture(scope="session", autouse=True)
def _warm_fork_server() -> None:
    """Worker processes are forks of one server, that of the first test which has any. Without
    PyTorch in it, each worker of each loader would import PyTorch for itself."""
    multiprocessing.set_forkserver_preload(
        ["dist_train.data.loading.loader", "dist_train.data.store.shard_task"]
    )
    forkserver.ensure_running()


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real clips and volumes, which is not part of the repository."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"the real data is not here: {folder}")
    return folder


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny store of most tests that train; not to be changed. Copy it to change it."""
    # It imports the product, which many tests do not need.
    from helpers import tiny_store

    return tiny_store(tmp_path_factory.mktemp("tiny") / "store")


@pytest.fixture(scope="session")
def trained(store: Path) -> Path:
    """A run of one epoch on ``store`` with one snapshot; not to be changed."""
    from helpers import tiny_config

    from dist_train.training.train import train

    out = store.parent / "trained"
    train(tiny_config(store, out, "train.epochs=1", "snapshots.at=[1]"))
    return out


#: Files of a single long test or so. They come first, so that two workers end at the same time.
LONGEST = ("test_gpu.py", "test_same_numbers.py", "test_fused_norm.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs the launcher, which takes seconds to be warm, and begin with the longest."""
    for item in items:
        if "launcher" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(LONGEST)))


@pytest.fixture
def little_room() -> Iterator[LittleRoom]:
    from room import limited

    with limited() as set_limit:
        yield set_limit


@pytest.fixture(scope="session")
def launcher() -> Iterator[Launcher]:
    from launcher import Launcher

    with Launcher() as launcher:
        yield launcher


@pytest.fixture(scope="session")
def s3_server() -> Iterator[dict[str, str]]:
    """The environment for the clients of an S3 server of another maker."""
    from moto.server import ThreadedMotoServer

    moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    moto.start()
    url = "http://{}:{}".format(*moto.get_host_and_port())
    yield {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_ENDPOINT_URL": url,
    }
    moto.stop()


@pytest.fixture
def bucket(
    s3_server: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[AbstractFileSystem]:
    """The bucket "lab" of that server, for one test. This process is a client of the server."""
    import fsspec

    from dist_train import objects

    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(objects, "FIRST_WAIT", 0.01)
    files = fsspec.filesystem(
        "s3", endpoint_url=s3_server["AWS_ENDPOINT_URL"], use_listings_cache=False
    )
    # The server's state is that of the process, as is any other server's of this maker.
    if files.exists("lab"):
        files.rm("lab", recursive=True)
    files.mkdir("lab")
    yield files
    files.rm("lab", recursive=True)
