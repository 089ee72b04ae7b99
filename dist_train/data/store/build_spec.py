"""What a store is made from, and which clips go to which shard.

``job.json`` and then ``manifest.csv`` are written before the first shard. Together with the raw
files they determine every byte of the store.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, field_validator

from dist_train.data.raw.clip import PrepareSettings
from dist_train.data.store.reader import MANIFEST, SHARDS, ClassNames, Digest
from dist_train.data.store.shards import Form, Shard
from dist_train.data.types import DTYPES, Record, metadata_columns
from dist_train.errors import ConfigError, FileError, StoreError
from dist_train.files import read_json, read_plain

JOB = "job.json"
# Longest files in bytes.
MOST_JOB, MOST_MANIFEST = 1 << 20, 1 << 36

_TYPES: dict[str, type[str] | type[bool] | str] = {
    "key": str,
    "filename": str,
    "label": "int16",
    "group": str,
    "weight": "float64",
    "split": str,
    "crowd_score": "float64",
    "tier1": bool,
}


@dataclass(frozen=True)
class Job:
    """What a store is made from, beside the raw files.

    Attributes:
        table: the manifest's.
        made_from: the manifest's digest, the settings and the decoder's version, as JSON.
    """

    table: pd.DataFrame
    made_from: dict[str, Any]

    @classmethod
    def of(cls, table: pd.DataFrame, **made_from: Any) -> Job:
        digest = hashlib.sha256(_to_csv(table)).hexdigest()
        # Through JSON, in which a tuple is a list: as it will be read back.
        return cls(table, json.loads(json.dumps({"manifest": digest} | made_from)))

    @property
    def fingerprint(self) -> str:
        return _fingerprint(self.made_from)

    @property
    def classes(self) -> dict[str, str] | None:
        """Names of the labels "0", "1" and so on; None if they are the default ones."""
        return self.made_from.get("classes")

    @cached_property
    def settings(self) -> PrepareSettings:
        return settings_of(self.made_from)

    @property
    def form(self) -> Form:
        """The dtype and the number of channels of all clips."""
        return DTYPES[self.settings.store_dtype], len(self.settings.channel_names)

    @cached_property
    def manifest(self) -> bytes:
        """The content of ``manifest.csv``."""
        return _to_csv(self.table)

    def shards(self, out: Path) -> list[Shard]:
        """All shards in ``out``."""
        count = -(-len(self.table) // self.settings.shard_clips)
        return [Shard(number, out / SHARDS) for number in range(count)]

    def span(self, shard: Shard) -> slice:
        """The shard's rows of the manifest."""
        size = self.settings.shard_clips
        return slice(shard.number * size, (shard.number + 1) * size)

    def rows(self, shard: Shard) -> list[Record]:
        """The shard's rows of the manifest, as Python objects.

        Made on demand, as those of a large set take gigabytes.
        """
        part = self.table.iloc[self.span(shard)]
        return [
            {str(name): value for name, value in row.items()} for row in part.to_dict("records")
        ]

    def filenames(self, shard: Shard) -> list[str]:
        """The raw files of the shard's rows."""
        return list(self.table["filename"].iloc[self.span(shard)])


def read_job(out: Path) -> Job:
    """Return what the store in ``out`` is made from.

    Raises:
        StoreError: there is no store, or ``job.json`` or ``manifest.csv`` is lost or damaged.
    """
    if not (out / SHARDS).is_dir():
        raise StoreError(
            "there is no store here",
            where=out,
            fix="Make one with 'dist-train prepare', or check the path.",
        )
    made_from = read_made_from(out)
    path = out / MANIFEST
    try:
        text = read_plain(path, most_bytes=MOST_MANIFEST)
        if hashlib.sha256(text).hexdigest() != made_from["manifest"]:
            raise _damaged(path, "is not the table that the store was made from")
        return Job(_read_table(text), made_from)
    except FileError as error:
        raise _damaged(path, error.what) from None
    except (ValueError, OverflowError) as error:
        raise _damaged(path, f"is no clip table ({error})") from None


def _read_table(text: bytes) -> pd.DataFrame:
    table = pd.read_csv(
        io.BytesIO(text),
        # Further columns are metadata.
        dtype=defaultdict(lambda: str, _TYPES),
        keep_default_na=False,
        na_values={"crowd_score": [""]},
        float_precision="round_trip",
        # A name may hold a carriage return.
        lineterminator="\n",
    )
    if table.columns.tolist() != [*_TYPES, *metadata_columns(table)]:
        raise ValueError(f"its columns are not {', '.join(_TYPES)}")
    return table


def read_made_from(out: Path) -> dict[str, Any]:
    """Read the ``made_from`` of a store's ``job.json``.

    Raises:
        StoreError: it is missing or damaged.
    """
    path = out / JOB
    try:
        content = read_json(path, most_bytes=MOST_JOB)
        fingerprint = content.pop("fingerprint", None) if isinstance(content, dict) else None
        if fingerprint is None or _fingerprint(content) != fingerprint:
            raise _damaged(path, "its fingerprint is not that of its content")
        # In JSON mode, where a list is a valid tuple.
        _MadeFrom.model_validate_json(json.dumps(content), strict=True)
    except FileError as error:
        raise _damaged(path, error.what) from None
    except ValidationError as error:
        name = ".".join(map(str, error.errors()[0]["loc"]))
        raise _damaged(path, f"its '{name}' is not valid") from None
    made_from: dict[str, Any] = content
    return made_from


def settings_of(made_from: dict[str, Any]) -> PrepareSettings:
    """The settings of a store's ``made_from``."""
    # The first version of records has no number.
    settings = {"record_version": 1} | made_from["settings"]
    return TypeAdapter(PrepareSettings).validate_python(settings)


def as_in(store: Path, settings: PrepareSettings) -> PrepareSettings:
    """Return settings that give pixels as those of ``store``: for clips to predict, for example.

    The size of shards and the limits stay those of ``settings``.

    Raises:
        StoreError: there is no store, or its ``job.json`` is damaged.
    """
    other = settings_of(read_made_from(store))
    return replace(
        other,
        shard_clips=settings.shard_clips,
        clip_seconds=settings.clip_seconds,
        clip_memory=settings.clip_memory,
    )


class _MadeFrom(BaseModel):
    """The entries of ``job.json``. A later version may add others."""

    model_config = ConfigDict(extra="allow")

    manifest: Digest
    pixels_version: int
    settings: PrepareSettings
    npz: Digest | None = None
    classes: ClassNames | None = None

    @field_validator("settings")
    @classmethod
    def _check_bounds(cls, settings: PrepareSettings) -> PrepareSettings:
        counts = (settings.shard_clips, settings.clip_memory)
        if not all(0 < count < 1 << 31 for count in counts) or settings.clip_seconds <= 0:
            raise ValueError("out of bounds")
        return settings


def _damaged(path: Path, what: str) -> StoreError:
    return StoreError(
        what,
        where=path,
        fix="Delete it if it is there, and run 'dist-train prepare' again with the same settings: "
        "finished shards are kept.",
    )


def _fingerprint(made_from: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()


def _to_csv(table: pd.DataFrame) -> bytes:
    return table.to_csv(index=False, lineterminator="\n").encode()


@dataclass(frozen=True)
class Part:
    """Number ``index`` (from 1) of ``count`` processes that write a store together."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Part:
        """Read "i/N".

        Raises:
            ConfigError: it is not of that form, or i is not one of 1 to N.
        """
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        part = cls(int(match[1]), int(match[2])) if match else None
        if part is None or not 1 <= part.index <= part.count:
            raise ConfigError(
                f"'{text}' is not a part", where="--part", fix="It is i/N with i from 1 to N."
            )
        return part

    def of(self, shards: Sequence[Shard]) -> Sequence[Shard]:
        return shards[self.index - 1 :: self.count]
