"""A disk that fills up while `prepare` writes: one message, and the next run goes on."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, contents, dist_train, environment, run_well

from dist_train.data.store.reader import INDEX, MARKER, Store

CLIPS, SHARD_CLIPS = 24, 4
UNSHARE = ("unshare", "--user", "--map-root-user", "--mount")
# A tmpfs of $SIZE bytes, seen by this shell alone; the store goes to $KEPT when it is finished.
SCRIPT = """
mount -t tmpfs -o size=$SIZE tmpfs "$OUT" || exit 77
{prepare} && exit 1
ls "$OUT"/*.json "$OUT"/shards > "$KEPT.before"
mount -o remount,size=64m "$OUT"
{prepare} || exit 2
cp -r "$OUT" "$KEPT"
"""


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    rng = np.random.default_rng(0)
    for number in range(CLIPS):
        np.save(folder / f"v{number:02d}.npy", rng.integers(0, 256, (16, 64, 64), np.uint8))
    rows = "".join(f"v{number:02d}.npy,{number % 2}\n" for number in range(CLIPS))
    (folder / "clips.csv").write_text(f"filename,label\n{rows}")
    return folder


def prepare(raw: Path, out: Path | str) -> list[str]:
    return dist_train(
        *("prepare", "--manifest", raw / "clips.csv", "--source", raw, "--out", out),
        *("--roi", "none", "--shard-clips", SHARD_CLIPS, "--workers", 2),
    )


def pages(paths: Iterable[Path]) -> int:
    """Bytes that files take on a tmpfs."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in paths if path.is_file())


@pytest.mark.parametrize("fails_in", ["shards", "index"])
def test_full_disk(raw: Path, tmp_path: Path, fails_in: str) -> None:
    straight, out, kept = tmp_path / "straight", tmp_path / "out", tmp_path / "kept"
    run_well(prepare(raw, straight))
    all_but_index = pages(path for path in straight.rglob("*") if path.name != INDEX)
    size = all_but_index // 2 if fails_in == "shards" else all_but_index + 2 * 4096
    out.mkdir()
    command = " ".join(f"'{word}'" for word in prepare(raw, out))
    done = subprocess.run(
        [*UNSHARE, "sh", "-c", SCRIPT.format(prepare=command)],
        env=environment(OUT=str(out), KEPT=str(kept), SIZE=str(size)),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    if "unshare" in done.stderr or done.returncode == 77:
        pytest.skip(f"no mount of one's own is allowed here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    (message,) = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert "No space left on device" in message
    assert "Traceback" not in done.stderr
    assert "Make room" in message
    before = Path(f"{kept}.before").read_text()
    assert MARKER not in before
    assert ".partial" not in before
    assert contents(kept) == contents(straight)
    assert len(Store(kept).table) == CLIPS
