"""A model card, as JSON and as Markdown: what a model is, what it saw, and what it is worth.

Its parts are those of Mitchell et al., "Model cards for model reporting" (FAT* 2019), as far as a
run knows them.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, PackageLoader, StrictUndefined
from pydantic import BaseModel, ConfigDict, ValidationError

from dist_train.errors import FileError
from dist_train.files import MIB, check_replaceable, read_plain, write_whole
from dist_train.safe_text import printable
from dist_train.targets import Kind

TITLE = "# Model card: "
MOST_BYTES = 64 * MIB
#: What Markdown or HTML would read as its own.
_MARKUP = str.maketrans(
    {"<": "&lt;", "&": "&amp;", "`": "'"} | {letter: f"\\{letter}" for letter in "\\|*_[]~"}
)


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Spread(_Part):
    """The values of some clips."""

    least: float
    median: float
    most: float


class CardModel(_Part):
    """What the file holds."""

    name: str
    parameters: int
    """Of one network."""
    networks: int
    """Whose scores are averaged."""
    steps: list[int]
    """After which their weights were saved."""
    weights: Literal["snapshots", "snapshot", "checkpoint"]
    settings: dict[str, Any]
    precision: str
    target: Kind
    classes: list[str]
    """(negative, positive) of binary; the names of labels, or of values of regression."""
    trained: str
    """When the last session began."""
    versions: dict[str, str | None]
    """Of the libraries in the last session."""
    code_from_outside: list[dict[str, Any]]


class CardData(_Part):
    """The clips of the training's store, and which part they took; None or empty without it."""

    store: str
    content: str
    """SHA-256 over key, label and pixels' checksum of each clip."""
    fingerprint: str
    """Of what the store was made from."""
    clips: int
    """Of the store, some of which may take no part."""
    missing: str | None = None
    """Why the store could not be opened."""
    by_split: dict[str, dict[str, int]] = {}
    """Clips of each class, or with each label; of regression those with values."""
    split_by: Literal["table", "folds"] | None = None
    """Whether the table of clips gives the splits."""
    groups: dict[str, int] = {}
    """Groups with a name, by split."""
    shared_groups: int = 0
    """Groups that are in more than one split."""
    rejected: int = 0
    """Files that could not be prepared."""
    frames: Spread | None = None
    height: Spread | None = None
    width: Spread | None = None


class CardInput(_Part):
    """What clips must be."""

    channels: list[str]
    dtype: str | None
    """Of the store's pixels."""
    size: tuple[int, int]
    """Height and width."""
    max_frames: int | None
    intensity: dict[str, Any]
    """What ``prepare`` was told, and found, of black and white."""
    frame_rate: Spread | None = None
    """Frames a second of the store's clips, where they say it."""
    spacing: dict[str, Spread] = {}
    """Distance of voxels in um of the store's clips by axis (z, y, x), where they say it."""
    preparation: dict[str, str]
    """How a clip becomes the model's input."""


class CardSelection(_Part):
    """How the weights were chosen."""

    steps: int
    """Of the whole training; early stopping may end it before."""
    epochs: int
    snapshots: Any
    """The setting ``snapshots.at``."""
    early_stopping: dict[str, Any] | None
    ema: float | None
    split: dict[str, Any]
    select: dict[str, Any]
    seed: int
    held_out_seen: int
    """Held-out clips that the weights were trained on before, under another split."""


class CardMetric(_Part):
    value: float | None
    """None if it is not defined."""
    ci95: tuple[float, float] | None = None


class CardEvaluation(_Part):
    """What ``evaluation.json`` says."""

    split: str
    clips: int
    classes: dict[str, int]
    """Evaluated clips of each class, or with each label."""
    metrics: dict[str, CardMetric]
    resampled: str
    """What the intervals redraw."""
    threshold: float | dict[str, float] | None
    threshold_rule: str | None
    optimistic: bool
    """Whether the threshold was fitted on the evaluated clips."""
    worst: list[Any] = []
    """The slices with the worst metrics."""


class CardDecision(_Part):
    """How a probability becomes an answer; what the file itself holds."""

    threshold: float | dict[str, float] | None
    """Of the calibrated probability."""
    rule: str | None
    calibration: str | None
    """In words."""
    prior: float | dict[str, float] | None
    """The shares that calibrated probabilities are for."""


class ModelCard(_Part):
    """The content of ``x.json``."""

    card: Literal["dist_train model card 1"] = "dist_train model card 1"
    file: str
    crc32c: int
    """Of the weights, as in the header of the file."""
    dist_train: str
    """Version that wrote the card."""
    model: CardModel
    data: CardData
    input: CardInput
    selection: CardSelection
    evaluation: CardEvaluation | None
    decision: CardDecision
    limits: list[str]
    use: list[str]
    """Lines of Python."""


def card_paths(out: Path) -> tuple[Path, Path]:
    """The Markdown and the JSON file of the card of an exported file: of ``x.safetensors`` ``x.md``
    and ``x.json``, of ``net-0.1`` ``net-0.1.md`` and ``net-0.1.json``."""
    name = out.name.removesuffix(".safetensors")
    return out.with_name(f"{name}.md"), out.with_name(f"{name}.json")


def check_card_places(out: Path) -> None:
    """Refuse an export whose card would replace something else than a card.

    Raises:
        FileError: a file of that name is there and is no card, or the card of another file.
    """
    text, content = card_paths(out)
    for path in (text, content):
        check_replaceable(path)
        if not os.path.lexists(path):
            continue
        found = read_plain(path, most_bytes=MOST_BYTES)
        if path == text and found.startswith(TITLE.encode()):
            continue
        try:
            of = ModelCard.model_validate_json(found).file
        except ValidationError:
            raise FileError(
                "is no model card, and the card of the export would replace it",
                where=path,
                fix="Move it away, or give the export another name.",
            ) from None
        if of != out.name:
            raise FileError(
                f"is the model card of {printable(of)}",
                where=path,
                fix="Move both away, or give the export another name.",
            )


def write_card(card: ModelCard, out: Path) -> None:
    """Write both files beside an exported one.

    Raises:
        OSError: they cannot be written.
    """
    text, content = card_paths(out)
    write_whole(text, as_markdown(card))
    write_whole(content, card.model_dump_json(indent=2) + "\n")


def as_markdown(card: ModelCard) -> str:
    """The card for people."""
    environment = Environment(
        loader=PackageLoader("dist_train.evaluation", "."),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {"plain": plain, "number": number, "spread": spread}
    return environment.get_template("model_card.md.j2").render(card=card, title=TITLE)


def plain(text: object) -> str:
    """Text in which nothing is markup."""
    return printable(str(text)).translate(_MARKUP)


def number(value: float | None) -> str:
    """Three decimals, or four digits of a large number."""
    if value is None:
        return "not defined"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:,.4g}"


def spread(values: Spread) -> str:
    """Least, median and most in words."""
    if values.least == values.most:
        return f"{values.least:g}"
    return f"{values.least:g} to {values.most:g} (median {values.median:g})"
