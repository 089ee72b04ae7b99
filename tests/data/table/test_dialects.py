"""A clip table reads the same, whichever program wrote it."""

from __future__ import annotations

import csv
import io
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dist_train.data.table.manifest import plain_group, read_manifest

#: Letters of names, among them every delimiter, quotes, and letters of two forms (NFC and NFD).
LETTERS = "ab1_ -,;|\t\"'=#\u00e4a\u0308\u00b5\u00e9\u7d30"
TEXT = st.text(LETTERS, max_size=6).map(str.strip)
ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "filename": TEXT.map(lambda text: f"clip{text}.npy"),
            "label": st.sampled_from([0, 1]),
            "group": TEXT,
            "weight": st.integers(0, 10_000).map(lambda cents: cents / 100),
            "note": st.text(LETTERS + "\n", max_size=8),
        }
    ),
    min_size=2,
    max_size=6,
    unique_by=lambda row: unicodedata.normalize("NFC", str(row["filename"])),
)
DIALECTS = st.fixed_dictionaries(
    {
        "encoding": st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "cp1252"]),
        "delimiter": st.sampled_from(",;\t|"),
        "quoting": st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
        "line": st.sampled_from(["\n", "\r\n", "\r"]),
        "header": st.sampled_from(["filename", "Filename ", "FILE", "path", "File Name"]),
        "words": st.sampled_from([("0", "1"), ("no", "Yes"), ("FALSE", "TRUE"), ("0,0", "1.0")]),
        "comma": st.booleans(),
        "told": st.booleans(),
        "blanks": st.booleans(),
        "index": st.booleans(),
    }
)


def written(rows: list[dict[str, Any]], how: dict[str, Any]) -> str:
    out = io.StringIO()
    if how["told"]:
        out.write(f"sep={how['delimiter']}{how['line']}")
    # ``csv`` leaves a line break unquoted that is not the end of its lines.
    quoting = csv.QUOTE_ALL if how["line"] == "\r" else how["quoting"]
    writer = csv.writer(
        out, delimiter=how["delimiter"], quoting=quoting, lineterminator=how["line"]
    )
    index = [""] if how["index"] else []
    writer.writerow([*index, how["header"], "Label", "group ", "WEIGHT", "note"])
    for number, row in enumerate(rows):
        weight = f"{row['weight']:.2f}".replace(".", "," if how["comma"] else ".")
        if how["blanks"]:
            writer.writerow([""] * (5 + len(index)))
        cells = [row["filename"], how["words"][row["label"]], row["group"], weight, row["note"]]
        pad = "  " if how["blanks"] and quoting == csv.QUOTE_MINIMAL else ""
        writer.writerow([str(number)] * len(index) + [f"{cell}{pad}" for cell in cells])
    return out.getvalue()


@settings(max_examples=60, deadline=None)
@given(ROWS, DIALECTS)
def test_every_dialect_gives_the_same_table(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], how: dict[str, Any]
) -> None:
    text = written(rows, how)
    try:
        content = text.encode(how["encoding"])
    except UnicodeEncodeError:
        assume(False)
    if how["encoding"] == "utf-16-be":
        content = b"\xfe\xff" + content
    if how["encoding"] == "cp1252":
        # By chance it may be valid UTF-8, with other letters.
        assume(content.decode("utf-8", "replace") == text or b"\xff" not in content)
        assume("\ufffd" in content.decode("utf-8", "replace") or text.isascii())
    path: Path = tmp_path_factory.getbasetemp() / "clips.csv"
    path.write_bytes(content)
    table = read_manifest(path).table
    assert table["filename"].tolist() == [row["filename"] for row in rows]
    assert table["label"].tolist() == [row["label"] for row in rows]
    assert table["group"].tolist() == [plain_group(row["group"]) for row in rows]
    assert table["weight"].tolist() == pytest.approx([row["weight"] for row in rows])
    notes = [unicodedata.normalize("NFC", " ".join(row["note"].split())) for row in rows]
    assert ("meta:note" in table) == any(notes)
    if any(notes):
        assert table["meta:note"].tolist() == notes
