"""A raw file that is read by a process with little memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from helpers import ROOT, environment

# Reads a file under a limit of memory, and prints what was said and how much was taken (MiB).
UNDER_LIMIT = """
import resource, sys
import av.subtitles.stream, imagecodecs, tifffile
from pathlib import Path
from dist_train.data.raw.clip import PrepareSettings, read_clip
from dist_train.data.raw.video import VIDEO_SUFFIXES, Video
from dist_train.errors import DecodeError

def taken(kind):
    return int(Path("/proc/self/status").read_text().split(kind + ":")[1].split()[0]) << 10

path, before = Path(sys.argv[1]), taken("VmHWM")
limit = taken("VmData") + (int(sys.argv[2]) << 20)
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
try:
    if path.suffix in VIDEO_SUFFIXES:
        print(sum(1 for _ in Video(path)))
    else:
        read_clip(path, path.name, str(path), PrepareSettings(roi="none"))
except DecodeError as error:
    print(error)
print(taken("VmHWM") - before >> 20)
"""


def read_under_limit(path: Path, limit: int) -> tuple[str, int]:
    """What reading says in a process that may take ``limit`` MiB more, and how many it took."""
    done = subprocess.run(
        [sys.executable, "-c", UNDER_LIMIT, str(path), str(limit)],
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    said, took = done.stdout.splitlines()
    return said, int(took)
