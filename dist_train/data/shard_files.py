"""The files of one shard, and what a clip's record holds."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from dist_train.data.shards import Record, shard_name

# Names of a shard's files, of any store.
SHARD_FILE = re.compile(r"shard-[0-9]{6,}\.(tar|rejected\.csv)")


@dataclass(frozen=True)
class Shard:
    """The files of one shard of a store, written or not."""

    number: int
    folder: Path

    @property
    def path(self) -> Path:
        return self.folder / shard_name(self.number)

    @property
    def rejects_path(self) -> Path:
        return self.path.with_suffix(".rejected.csv")

    def is_written(self) -> bool:
        return self.path.is_file() and self.rejects_path.exists()


def to_record(row: Record) -> Record:
    """What a clip's record says of its row of the manifest."""
    crowd = row["crowd_score"]
    record = {name: value for name, value in row.items() if name != "key"}
    return record | {"crowd_score": None if math.isnan(crowd) else crowd}
