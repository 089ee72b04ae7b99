"""Parts of a store, written by several processes: joined, they are the store of one ``prepare``."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from helpers import LAUNCH, contents, run_well, said
from make_media import write_manifest, write_volumes
from stores import WHOLE, make, stamps, start

from dist_train.data.store.build import finalize, prepare_part
from dist_train.data.store.build_spec import Part
from dist_train.data.store.reader import INDEX, MARKER, REJECTED, SHARDS, Store
from dist_train.data.store.shards import shard_name
from dist_train.errors import ConfigError, StoreError


def part_processes(folder: Path, *parts: str) -> list[subprocess.Popen[str]]:
    """Processes that have claimed their parts, and go on at each line that they are sent."""
    processes = [start(folder, part) for part in parts]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "0\n"
    return processes


def part_here(folder: Path, names: Sequence[str], part: str, out: str = "store") -> None:
    manifest = write_manifest(folder / "clips.csv", names)
    prepare_part(manifest, folder / "raw", folder / out, WHOLE, Part.parse(part), workers=1)


def test_processes_at_work_at_once_make_the_same_store(tmp_path: Path, raw: Path) -> None:
    """They start together, so they claim the new folder together."""
    names = write_volumes(raw, 27)
    (raw / names[5]).write_bytes(b"x")
    plain = make(tmp_path, names, "plain", max_rejected=0.1)
    store = tmp_path / "store"
    processes = part_processes(tmp_path, "1/3", "2/3", "3/3")
    assert list(stamps(store)) == []
    for process in processes:
        process.communicate("\n" * 9)
        assert process.returncode == 0
    assert sorted(stamps(store)) == [shard_name(i) for i in range(7)]
    assert not any((store / name).exists() for name in (INDEX, MARKER, REJECTED))
    with pytest.raises(StoreError, match=r"not finished.*finalize"):
        Store(store)
    for _ in range(2):
        assert finalize(store, max_rejected=0.1)["clips"] == 26
        assert contents(store) == contents(plain)


def test_a_part_has_every_nth_shard(tmp_path: Path, raw: Path) -> None:
    names = write_volumes(raw, 27)
    for part in ("2/3", "9/9"):
        part_here(tmp_path, names, part)
        assert sorted(stamps(tmp_path / "store")) == [shard_name(1), shard_name(4)]
    with pytest.raises(
        StoreError,
        match=r"5 of 7 shards are not written yet, the first is shard-000000.tar.*: 0, 2, 3, 5, 6",
    ):
        finalize(tmp_path / "store")
    assert not (tmp_path / "store" / MARKER).exists()
    with pytest.raises(StoreError, match=r"other settings \(manifest changed\)"):
        part_here(tmp_path, names[::-1], "1/3")


def test_a_part_needs_only_its_own_files(tmp_path: Path, raw: Path) -> None:
    names = write_volumes(raw, 8)
    (raw / names[0]).unlink()
    part_here(tmp_path, names, "2/2")
    part_here(tmp_path, names, "1/2")
    with pytest.raises(StoreError, match=r"1 of 8 clips were rejected \(1 neg.*clip000.*missing"):
        finalize(tmp_path / "store")
    assert finalize(tmp_path / "store", max_rejected=0.2)["rejected"] == {"0": 1}
    # Nothing is written for a part that has none of its files.
    with pytest.raises(StoreError, match=r"the file is missing \(4 of 4 files are"):
        part_here(tmp_path, [f"no-{name}" for name in names], "2/2", "other")
    assert not (tmp_path / "other").exists()


def test_a_whole_run_goes_on_from_parts(tmp_path: Path, raw: Path) -> None:
    names = write_volumes(raw, 12)
    part_here(tmp_path, names, "1/2")
    before = stamps(tmp_path / "store")
    make(tmp_path, names)
    assert stamps(tmp_path / "store").items() >= before.items()
    assert contents(tmp_path / "store") == contents(make(tmp_path, names, "plain"))


def test_who_may_write_beside_a_part(tmp_path: Path, raw: Path) -> None:
    names = write_volumes(raw, 12)
    write_manifest(tmp_path / "clips.csv", names)
    (running,) = part_processes(tmp_path, "1/3")
    with pytest.raises(StoreError, match="another process is writing part 1 of this store"):
        part_here(tmp_path, names, "1/3")
    with pytest.raises(StoreError, match=r"is writing a part \(of 3\) of this store"):
        part_here(tmp_path, names, "2/2")
    with pytest.raises(StoreError, match="another process is writing this store"):
        make(tmp_path, names)
    with pytest.raises(StoreError, match="another process is writing this store"):
        finalize(tmp_path / "store")
    part_here(tmp_path, names, "2/3")
    running.kill()
    running.communicate()
    part_here(tmp_path, names, "1/2")

    def beside_a_whole_run(done: int, total: int) -> None:
        with pytest.raises(StoreError, match="another process is writing this store"):
            part_here(tmp_path, names, "1/2")

    make(tmp_path, names, progress=beside_a_whole_run)


def test_finalize_of_no_store(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="there is no store here"):
        finalize(tmp_path)


def test_clips_behind_a_damaged_header_are_not_left_out(tmp_path: Path, raw: Path) -> None:
    """Tar readers take a damaged header for the end of the archive."""
    store = make(tmp_path, write_volumes(raw, 8))
    path = store / SHARDS / shard_name(1)
    path.write_bytes(path.read_bytes().replace(b"clip006.npy", b"clip106.npy"))
    (store / INDEX).unlink()
    with pytest.raises(StoreError, match=r"shard-000001.tar: is not a readable.*--repair"):
        finalize(store)


@pytest.mark.parametrize("text", ["", "1", "0/3", "4/3", "1/0", "-1/3", "1/3/5", " 1/3"])
def test_not_a_part(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--part: '.*' is not a part"):
        Part.parse(text)


def test_the_commands_in_a_slurm_array(tmp_path: Path, raw: Path) -> None:
    names = write_volumes(raw, 12)
    (raw / names[2]).write_bytes(b"x")
    (raw / names[7]).write_bytes(b"x")
    manifest, store = tmp_path / "clips.csv", tmp_path / "store"
    write_manifest(manifest, names)
    options = ("--manifest", manifest, "--source", raw, "--out", store, "--roi", "none")
    script = [LAUNCH / "prepare_slurm.sh", *options, "--shard-clips", "4"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for task in (2, 1):
        array = {"SLURM_ARRAY_TASK_ID": f"{task}", "SLURM_ARRAY_TASK_COUNT": "2"}
        run_well([*map(str, script)], PATH=path, SLURM_CPUS_PER_TASK="2", **array)
    assert said("finalize", store, "--max-rejected", 0.2).splitlines()[:2] == [
        f"10 clips in {store}",
        f"rejected: 2 (1 negative, 1 positive), see {store / REJECTED}",
    ]
    assert contents(store) == contents(make(tmp_path, names, "plain", max_rejected=0.2))
