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


def test_more_than_two_names_have_codes_in_the_order_of_people(
    table: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = labelled(table, "stage 10", "Stage 9", "none left", "stage 9", "stage 9")
    assert manifest.classes == {0: "none left", 1: "stage 9", 2: "stage 10"}
    assert manifest.table["label"].tolist() == [2, 1, 0, 1, 1]
    assert "3 classes, from code 0: none left (1), stage 9 (3), stage 10 (1)" in caplog.text


def test_names_that_are_given_come_first(table: Path) -> None:
    names = ("s=severe,m=mild", "x=other")
    manifest = labelled(table, "m", "s", "x", "a", "m", names=names)
    assert manifest.classes == {0: "severe", 1: "mild", 2: "other", 3: "a"}
    assert manifest.table["label"].tolist() == [1, 0, 2, 3, 1]


@pytest.mark.parametrize("names", [(), ("2=worst,0=best",)])
def test_numbers_from_0_keep_their_code(table: Path, names: tuple[str, ...]) -> None:
    labels = [str(number) for number in (10, *range(10), 2)]
    manifest = labelled(table, *labels, names=names)
    assert manifest.table["label"].tolist() == [int(label) for label in labels]
    assert manifest.classes[2] == ("worst" if names else "2")
    assert manifest.table["label"].dtype == "int16"


def test_other_numbers_are_names(table: Path) -> None:
    manifest = labelled(table, "30", "7", "100", "7")
    assert manifest.classes == {0: "7", 1: "30", 2: "100"}
    assert manifest.table["label"].tolist() == [1, 0, 2, 0]


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        (("0", "1", "O"), (), "label of '2.npy' is 'O', not 0 or 1"),
        (("true", "false", "flase"), (), "label of '2.npy' is 'flase', not 0 or 1"),
        (("a", "b", ""), (), "label of '0.npy' is 'a', not 0 or 1"),
        (("a", "b", "c", "nan"), (), "label of '3.npy' is 'nan', not the name of a class"),
        (("0", "1", "2", "-1"), (), "label of '3.npy' is '-1', not"),
        (("0.5", "1", "2.5"), (), "label of '0.npy' is '0.5', not a class"),
        (("a", "b", "c"), ("a=x,b=x",), "there are two classes: c (1), x (2). Say by --positive"),
        (("a", "b", "c"), ("d=x",), "there is no class 'd' (--label-names)"),
    ],
)
def test_labels_that_are_no_classes(
    table: Path, labels: tuple[str, ...], names: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ManifestError, match=re.escape(message)):
        labelled(table, *labels, names=names)


def test_more_classes_than_a_store_has_are_refused(table: Path) -> None:
    with pytest.raises(ManifestError, match="there are 10001 classes, more than 10000"):
        labelled(table, *map(str, range(10_001)))


def test_values_are_kept_as_metadata_of_clips_without_labels(table: Path) -> None:
    table.write_text("filename,label\na.npy,0.5\nb.npy,\nc.npy,1.5e3\n")
    manifest = read_manifest(table, unlabelled=True)
    assert manifest.table["label"].tolist() == [-1, -1, -1]
    assert manifest.table["meta:label"].tolist() == ["0.5", "", "1.5e3"]
    table.write_text("filename,Speed\na.npy,12\nb.npy,7\n")
    manifest = read_manifest(table, unlabelled=True, columns={"label": "speed"})
    assert manifest.table["meta:Speed"].tolist() == ["12", "7"]
    # Placeholders are no values.
    table.write_text("filename,label\na.npy,0\nb.npy,1\nc.npy,-1\n")
    assert "meta:label" not in read_manifest(table, unlabelled=True).table
