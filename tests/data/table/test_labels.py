"""Names of classes: the user says which are positive, and nothing is guessed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dist_train.data.table.labels import Naming
from dist_train.data.table.manifest import Manifest, read_manifest
from dist_train.errors import ConfigError, ManifestError


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return tmp_path / "clips.csv"


def labelled(
    path: Path, *labels: str, positive: tuple[str, ...] = (), names: tuple[str, ...] = ()
) -> Manifest:
    rows = [f"{number}.npy,{label}" for number, label in enumerate(labels)]
    path.write_text("\n".join(["filename,label", *rows]) + "\n", encoding="utf-8")
    return read_manifest(path, naming=Naming.parse(positive, names))


def test_two_names(table: Path) -> None:
    manifest = labelled(table, "flowing", " Stalled", "stalled", positive=("STALLED",))
    assert manifest.table["label"].tolist() == [0, 1, 1]
    assert manifest.classes == {0: "flowing", 1: "Stalled"}
    assert "meta:class" not in manifest.table


def test_more_names_are_kept_as_metadata(table: Path, caplog: pytest.LogCaptureFixture) -> None:
    manifest = labelled(
        table, "a", "b", "c", "d", "c", positive=("c", "d"), names=("c=stalled", "a=flowing")
    )
    assert manifest.table["label"].tolist() == [0, 0, 1, 1, 1]
    assert manifest.table["meta:class"].tolist() == ["flowing", "b", "stalled", "d", "stalled"]
    assert manifest.classes == {0: "b or flowing", 1: "d or stalled"}
    assert "positive clips are those of d (1), stalled (2)" in caplog.text
    assert labelled(table, "a", "c", positive=("stalled",), names=("c=stalled",)).classes[0] == "a"


def test_numbers_may_be_names(table: Path) -> None:
    manifest = labelled(table, "1", "2.0", "2", positive=("2",))
    assert manifest.table["label"].tolist() == [0, 1, 1]
    assert manifest.classes == {0: "1", 1: "2"}


def test_labels_of_0_and_1_may_get_names(table: Path) -> None:
    manifest = labelled(table, "0", "true", names=("0=flowing,1=stalled",))
    assert manifest.table["label"].tolist() == [0, 1]
    assert manifest.classes == {0: "flowing", 1: "stalled"}
    assert labelled(table, "0", "1").classes == {0: "negative", 1: "positive"}


def test_spellings_of_one_name_are_told(table: Path, caplog: pytest.LogCaptureFixture) -> None:
    manifest = labelled(table, "flowing", "FLOWING", "flowing", "x", positive=("x",))
    assert manifest.table["label"].tolist() == [0, 0, 0, 1]
    assert "labels 'flowing' and 'FLOWING' differ in case, and are one class" in caplog.text
    assert "positive clips are those of x (1); negative clips are those of flowing (3)" in (
        caplog.text
    )


MISTAKES = {
    "names without a positive one": (
        (["flowing", "stalled"], (), ()),
        "label of '0.npy' is 'flowing', not 0 or 1 (line 2, 2 such rows). Write it so, or as true, "
        "false, yes or no. If labels are names, --positive NAME says which are positive (there "
        "are: flowing, stalled)",
    ),
    "no such class": (
        (["flowing", "stalled"], ("stall",), ()),
        "there is no class 'stall' (--positive). Did you mean 'stalled'?",
    ),
    "no such label": (
        (["0", "1"], (), ("2=x",)),
        "there is no class '2' (--label-names). There are: 0, 1.",
    ),
    "all positive": ((["a", "b"], ("a", "b"), ()), "there are no negative clips: all are a (1), b"),
    "a blank": ((["a", "b", ""], ("b",), ()), "label of '2.npy' is '', not the name of a class"),
    "a missing value": ((["a", "b", "NaN"], ("b",), ()), "is 'NaN', not the name of a class (line"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_named(table: Path, mistake: str) -> None:
    (labels, positive, names), message = MISTAKES[mistake]
    with pytest.raises(ManifestError, match=re.escape(message)):
        labelled(table, *labels, positive=positive, names=names)


def test_names_need_an_equals_sign() -> None:
    for text in ("flowing", "=flowing", "0=", "0=a,"):
        with pytest.raises(ConfigError, match="names no label"):
            Naming.parse([], [text])


def test_labels_of_another_table_may_be_names(tmp_path: Path, table: Path) -> None:
    labels = tmp_path / "labels.csv"
    labels.write_text("filename,label\nb.npy,stalled\na.npy,flowing\nc.npy,unclear\n")
    table.write_text("filename\na.npy\nb.npy\n")
    manifest = read_manifest(table, labels=labels, naming=Naming(["stalled"]))
    assert manifest.table["label"].tolist() == [0, 1]
    assert manifest.classes == {0: "flowing", 1: "stalled"}
    with pytest.raises(ManifestError, match="--positive or --label-names and --unlabelled contra"):
        read_manifest(table, unlabelled=True, naming=Naming(["stalled"]))
