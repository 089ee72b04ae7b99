"""The clip table: every form that is read, and every mistake that is named."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dist_train.data.table.manifest import read_manifest
from dist_train.errors import ManifestError


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return tmp_path / "clips.csv"


def write(path: Path, *lines: str, encoding: str = "utf-8") -> Path:
    path.write_text("\n".join(lines) + "\n", encoding=encoding)
    return path


def test_plain_table_gets_defaults(table: Path) -> None:
    manifest = read_manifest(write(table, "filename,label", "a.mp4,1", "b.mp4,0"))
    rows = manifest.table.drop(columns="crowd_score").to_dict("records")
    shared = {"group": "", "weight": 1.0, "split": "", "tier1": True}
    assert rows == [
        {"key": "a", "filename": "a.mp4", "label": 1, **shared},
        {"key": "b", "filename": "b.mp4", "label": 0, **shared},
    ]
    assert manifest.table["crowd_score"].isna().all()


def test_every_optional_column_is_read(table: Path) -> None:
    write(
        table,
        "filename,label,group,weight,split,crowd_score,tier1",
        "a.mp4,1,p1,2.5,train,0.7,True",
        "b.mp4,0.0,p2,,val,,false",
    )
    first, second = read_manifest(table).table.to_dict("records")
    assert (first["group"], first["weight"], first["split"]) == ("p1", 2.5, "train")
    assert (first["crowd_score"], first["tier1"]) == (0.7, True)
    assert (second["weight"], second["tier1"], second["label"]) == (1.0, False, 0)
    assert second["crowd_score"] != second["crowd_score"]


def test_challenge_csvs_are_joined_by_name(tmp_path: Path) -> None:
    write(
        tmp_path / "train_metadata.csv",
        "filename,url,project_id,num_frames,crowd_score,tier1,micro,nano",
        "100.mp4,s3://x,M,54,0.0,True,False,False",
        "101.mp4,s3://y,N,60,0.9,False,True,False",
    )
    write(tmp_path / "train_labels.csv", "filename,stalled", "101.mp4,1", "9.mp4,1", "100.mp4,0")
    manifest = read_manifest(tmp_path / "train_metadata.csv")
    rows = manifest.table
    assert manifest.urls_by_name() == {"100.mp4": "s3://x", "101.mp4": "s3://y"}
    assert rows["label"].tolist() == [0, 1]
    assert rows["group"].tolist() == ["M", "N"]
    assert rows["tier1"].tolist() == [True, False]
    assert rows["crowd_score"].tolist() == [0.0, 0.9]


@pytest.mark.parametrize("columns", ["filename", "filename,stalled"])
def test_unlabelled_clips_have_minus_one(
    table: Path, caplog: pytest.LogCaptureFixture, columns: str
) -> None:
    manifest = read_manifest(write(table, columns, "a.mp4", "b.mp4"), unlabelled=True)
    assert manifest.table["label"].tolist() == [-1, -1]
    assert ("its labels are ignored" in caplog.text) == ("stalled" in columns)


def test_names_that_look_like_missing_values_stay_names(table: Path) -> None:
    manifest = read_manifest(write(table, "filename,label,group", "NA,1,nan", "007,0,null"))
    assert manifest.table["filename"].tolist() == ["NA", "007"]
    assert manifest.table["group"].tolist() == ["nan", "null"]


MISTAKES = {
    "header only": (["filename,label"], "has no rows"),
    "no filename column": (["name,label", "a,1"], "no column 'filename'"),
    "two file columns": (["file,path,label", "a,b,1"], "two columns for 'filename' (file, path)"),
    "two columns of a name": (["filename,label,x,x", "a,1,2,3"], "has two columns 'x'"),
    "unknown column": (["filename,label,grp", "a,1,x"], "unknown column 'grp'. Did you mean 'g"),
    "two letters swapped": (
        ["filename,Lable", "a,1"],
        "unknown column 'Lable'. Did you mean 'label",
    ),
    "column of no name": (["filename,label,", "a,1,x"], "has a column without a name"),
    "way out": (["filename,label", "a,1", "b/../../c,0"], "'b/../../c' (line 3) may lead out of"),
    "another drive": (["filename,label", r"C:\a.mp4,1"], r"'C:\a.mp4' (line 2) may lead out of"),
    "listed twice": (
        ["filename,label", "a,1", "b,0", "a,1"],
        "'a' is listed twice (lines 2 and 4)",
    ),
    "no name": (["filename,label", "a.mp4,1", ",0"], "line 3 has no filename"),
    "label 2": (["filename,label", "a.mp4,2"], "label of 'a.mp4' is '2', not 0 or 1"),
    "field missing": (["filename,label", "a,1", "b"], "label of 'b' is '', not 0 or 1 (line 3, "),
    "no label": (["filename,label", "a,", "b, "], "no label in any row. Fill the column"),
    "comma or thousands": (
        ["filename;label;weight", "a;1;1,500", "b;0;12,000"],
        "'1,500', not a number (line 2, 2 such",
    ),
    "comma and point": (["filename;label;weight", "a;1;1,5", "b;0;1.5"], "'1,5', not a number ("),
    "labels 1 and 2": (
        ["filename,label", "a,1", "b,2"],
        "label of 'b' is '2', not 0 or 1 (line 3, 1 such rows). Write it so, or as true, false, "
        "yes or no. If labels are names, --positive NAME says which are positive (there are: 1, 2)",
    ),
    "label nan": (["filename,label", "a,1", "b,nan"], "label of 'b' is 'nan', not 0 or 1 (line 3"),
    "some labels": (["filename,label", "a,1", "b,0", "c,"], "--where 'label >= 0' leaves out rows"),
    "long metadata": (
        ["filename,label,notes", f"a,1,{'x' * 20_001}"],
        "line 2 has 20006 characters in columns without a use (notes), more than 20000. Remove",
    ),
    "line break in quotes": (
        ["filename,label,notes", 'a,1,"two', 'lines"', "b,5,"],
        "not 0 or 1 (line 3, 1 such",
    ),
    "another spelling": (["filename,label", "a.mp4,1", "./a.mp4,0"], "is listed twice (lines"),
    "on Windows": (["filename,label", r"d\a.mp4,1", "d/a.mp4,0"], "is listed twice (lines 2 and 3"),
    "two forms of one letter": (["filename,label", "\u00e4,1", "a\u0308,0"], "is listed twice (li"),
    "open quote": (["filename,label", '"a.mp4,1', "b.mp4,0"], "is not a CSV file (line 3: "),
    "two names in other case": (["filename,Label,label", "a,1,1"], "has two columns for 'label'"),
    "split partly": (
        ["filename,label,split", "a,1,train", "b,0,"],
        "split of 'b' is '', not train, v",
    ),
    "after blank rows": (
        ["sep=;", "", "filename;label", "a;1", ";", "b;2"],
        "not 0 or 1 (line 5, 1 such",
    ),
    "split unknown": (["filename,label,split", "a,1,dev"], "split of 'a' is 'dev', not train, val"),
    "weight negative": (["filename,label,weight", "a,1,-1"], "weight of 'a' is '-1', not a finit"),
    "weight nan": (["filename,label,weight", "a,1,nan"], "weight of 'a' is 'nan', not a fini"),
    "tier1 in words": (["filename,label,tier1", "a,1,maybe"], "tier1 of 'a' is 'maybe', not true"),
    "one row too long": (["filename,label", "a,1", "b,1,2"], "line 3 has more fields than the"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_named(table: Path, mistake: str) -> None:
    lines, message = MISTAKES[mistake]
    with pytest.raises(ManifestError, match=re.escape(message)) as raised:
        read_manifest(write(table, *lines))
    assert raised.value.where == table
    assert "\n" not in str(raised.value)


def test_keys_are_unique_and_safe_in_a_tar_archive(table: Path) -> None:
    names = ["../x.mp4", "/etc/passwd", "..", ".hidden", "a b.mp4", "a_b.mp4", "a.b.mp4", "größe"]
    names += ["細胞.mp4", "a;b.mp4", "x" * 96, "y" * 250, "a/x.mp4", "b/x.mp4", "x.mov"]
    write(table, "filename,label", *(f"{name},1" for name in names))
    keys = read_manifest(table, allow_local=True).table["key"].tolist()
    assert len(set(keys)) == len(names)
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,95}", key) for key in keys)
    assert keys[5] == "a_b"
    # They depend on nothing but the names.
    write(table, "filename,label", *(f"{name},0" for name in reversed(names)))
    assert read_manifest(table, allow_local=True).table["key"].tolist() == keys[::-1]


def test_urls_are_kept_apart(table: Path) -> None:
    """The pixels do not depend on where a file lies, so the clip table does not either."""
    plain = read_manifest(write(table, "filename,label", "a.mp4,1", "b.mp4,0"))
    assert plain.urls is None
    write(table, "filename,url,label", "a.mp4, s3://x/a.mp4 ,1", "b.mp4,s3://y/other,0")
    manifest = read_manifest(table)
    assert manifest.table.equals(plain.table)
    assert manifest.urls_by_name() == {"a.mp4": "s3://x/a.mp4", "b.mp4": "s3://y/other"}


def test_missing_urls_matter_only_where_they_are_used(table: Path) -> None:
    rows = ["a.mp4,1,s3://x/a", "b.mp4,0,", "c.mp4,0,local.mp4"]
    manifest = read_manifest(write(table, "filename,label,url", *rows))
    message = r"url of 'b.mp4' is '', not of the form s3://bucket/name \(line 3, 2 such rows\)"
    with pytest.raises(ManifestError, match=message):
        manifest.urls_by_name()
    manifest = read_manifest(write(table, "filename,label,url", "a,1,s3://x/a", "b,0,s3://x/a"))
    with pytest.raises(
        ManifestError, match="line 2 and line 3 of the clip table have the same url"
    ):
        manifest.urls_by_name()
    with pytest.raises(ManifestError, match=r"has no column 'url'.*--source"):
        read_manifest(write(table, "filename,label", "a.mp4,1")).urls_by_name()


def test_table_of_many_parts_is_one_table(table: Path) -> None:
    """It is read by parts."""
    count = 150_000
    rows = [f"{i}.mp4,{i % 2},{i / 7:.3f},{i}" for i in range(count)]
    manifest = read_manifest(write(table, "filename,label,crowd_score,num_frames", *rows))
    assert manifest.table["filename"].tolist() == [f"{i}.mp4" for i in range(count)]
    assert manifest.table.index.tolist() == list(range(count))


def test_groups_that_look_the_same_are_one(table: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = ["m 3", "m  3 ", "m\u00a03", "\ufeffm 3", "m\u200b 3", "\uff4d 3"]
    names += ["M\u00e4us", "Ma\u0308us", " "]
    write(table, "filename,label,group", *(f"{i},{i % 2},{n}" for i, n in enumerate(names)))
    assert read_manifest(table).table["group"].tolist() == ["m 3"] * 6 + ["M\u00e4us"] * 2 + [""]
    assert caplog.text == ""
    write(table, "filename,label,group,split", "a,1,m3,Val ", "b,0,M3,val")
    rows = read_manifest(table).table
    assert rows["group"].tolist() == ["m3", "M3"]
    assert rows["split"].tolist() == ["val", "val"]
    assert "groups 'm3' and 'M3' differ in case, and are two groups" in caplog.text


SPREADSHEETS = {
    "byte order mark": b"\xef\xbb\xbffilename,label\r\na.npy,1\r\nb.npy,0\r\n",
    "semicolons": b"filename;label\na.npy;1\nb.npy;0\n",
    "tabs": b"filename\tlabel\na.npy\t1\nb.npy\t0\n",
    "told delimiter": b"sep=;\r\nfilename;label\r\na.npy;1\r\nb.npy;0\r\n",
    "UTF-16": "filename\tlabel\r\na.npy\t1\r\nb.npy\t0\r\n".encode("utf-16"),
    "other case": b" Filename,LABEL\na.npy,1\nb.npy,0\n",
    "rows of blanks": b"filename;label\na.npy;1\n ; \n\nb.npy;0; ;\n",
    "sizes": b"filename,label,height,width,site,slide,score,stage\na.npy,1,8,8,x,y,z,1\nb.npy,0\n",
    "comma at the end": b"filename,label,\na.npy,1,\nb.npy,0,\n",
    "yes and no": b"filename,label\na.npy,Yes\nb.npy,no\n",
    "quoted": b'"filename","label"\n"a.npy","1"\n"b.npy","0"\n',
    "blanks": b"filename, label\na.npy , 1\n b.npy,0 \n",
    "old Mac": b"filename,label\ra.npy,1\rb.npy,0\r",
    "bars": b"filename|label\na.npy|1\nb.npy|0\n",
    "UTF-16 big-endian": "\ufefffilename;label\na.npy;1\nb.npy;0\n".encode("utf-16-be"),
    "told delimiter in quotes": b'\xef\xbb\xbf"sep=|"\nfilename|label\na.npy|1\nb.npy|0\n',
    "index of pandas": b",filename,label\n0,a.npy,1\n1,b.npy,0\n",
    "decimal labels": b"filename;label\na.npy;1,0\nb.npy;0.0\n",
    "booleans": b"filename,label\na.npy,TRUE\nb.npy,False\n",
    "file": b"File,label\na.npy,1\nb.npy,0\n",
    "path": b"Path ;label \na.npy ;1 \nb.npy;0\n",
    "file name": b'"File Name ", "label"\na.npy,1\nb.npy,0\n',
    "path beside filename": b"filename,path,label\na.npy,/x,1\nb.npy,/y,0\n",
    "header on two lines": b'filename,"no\ntes",label\na.npy,,1\nb.npy,,0\n',
    "other delimiters in the header": b"filename;label;a,b|c\na.npy;1;\nb.npy;0;\n",
}


@pytest.mark.parametrize("kind", SPREADSHEETS)
def test_tables_of_spreadsheets(table: Path, kind: str) -> None:
    table.write_bytes(SPREADSHEETS[kind])
    manifest = read_manifest(table)
    assert manifest.table["filename"].tolist() == ["a.npy", "b.npy"]
    assert manifest.table["label"].tolist() == [1, 0]


NO_TABLES = {
    "workbook": (
        b"PK\x03\x04 more",
        "is an Excel workbook or a zip archive, not a CSV file. Unpack it. Save it",
    ),
    "picture": (b"\x89PNG\r\n\x1a\n\xff\xfe\x00", "it holds a byte 0"),
    "empty": (b"", "is empty"),
    "no code page": (b"filename,label\n\x81\x8d.npy,1\n", "Save it as 'CSV UTF-8'"),
    "UTF-32": ("filename,label\na,1\n".encode("utf-32"), "it holds a byte 0"),
    "cut UTF-16": ("filename,label\na,1".encode("utf-16")[:-1], "Save it as 'CSV UTF-8'"),
    "byte 0 at the end": (b"filename,label\n" + b"a,1\n" * 20_000 + b"\0", "it holds a byte 0"),
    "blank after quotes": (b'filename,label\n"a" ,1\n', "line 2: "),
    "UTF-16 unmarked": ("filename,label\na,1\n".encode("utf-16-le"), "it holds a byte 0"),
    "blank": (b"\n ,\n\n", "is empty"),
}


@pytest.mark.parametrize("kind", NO_TABLES)
def test_what_is_no_table_is_named(table: Path, kind: str) -> None:
    content, message = NO_TABLES[kind]
    table.write_bytes(content)
    with pytest.raises(ManifestError, match=re.escape(message)):
        read_manifest(table)


def test_a_folder_is_no_table(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"is a folder, not a table.*--from-folders"):
        read_manifest(tmp_path)


def test_further_columns_are_metadata(table: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(table, "filename,label,Notes ,micro,empty,key", 'a.mp4,1,"very\n good ",1,,k', "b.mp4,0")
    rows = read_manifest(table).table
    assert rows["label"].tolist() == [1, 0]
    assert [name for name in rows if name.startswith("meta:")] == ["meta:Notes", "meta:key"]
    assert rows["meta:Notes"].tolist() == ["very good", ""]
    assert rows["key"].tolist() == ["a", "b"]
    assert "these columns are kept as metadata: Notes, key (used are filename, label" in caplog.text
    caplog.clear()
    # A column close to one that is there is no slip.
    read_manifest(write(table, "filename,label,labels", "a.mp4,1,2"))
    assert "kept as metadata: labels" in caplog.text


def test_columns_may_have_other_names(table: Path, tmp_path: Path) -> None:
    write(table, "filename,label,Clip,Mouse,stall", "x,7,a.npy,m1,1", "x,8,b.npy,m2,0")
    columns = {"filename": "clip", "label": "Stall", "group": "mouse"}
    rows = read_manifest(table, columns=columns).table
    assert rows[["filename", "label", "group"]].to_dict("list") == {
        "filename": ["a.npy", "b.npy"], "label": [1, 0], "group": ["m1", "m2"],
    }  # fmt: skip
    assert rows["meta:label"].tolist() == ["7", "8"]
    assert rows["meta:filename"].tolist() == ["x", "x"]
    chosen = read_manifest(table, columns=columns, where="label == 1 and Mouse == 'm1'").table
    assert chosen["filename"].tolist() == ["a.npy"]
    with pytest.raises(ManifestError, match=r"no column 'clips'; its .*by --file-column"):
        read_manifest(table, columns={"filename": "clips"})
    with pytest.raises(
        ManifestError, match=r"no column 'stal' \(--label-column\). Did you mean 's"
    ):
        read_manifest(table, columns={"label": "stal"})
    labels = write(tmp_path / "other.csv", "file,verdict", "a.npy,1", "b.npy,0")
    write(table, "file", "a.npy", "b.npy")
    rows = read_manifest(table, labels=labels, columns={"label": "verdict"}).table
    assert rows["label"].tolist() == [1, 0]


def test_decimal_commas_and_latin_1(table: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = "file;label;group;weight;crowd_score\nM\u00e4us.npy;1;\u00e4;2,5;0,125\nb.npy;0;;;\n"
    table.write_bytes(content.encode("latin-1"))
    rows = read_manifest(table).table
    assert rows["filename"].tolist() == ["M\u00e4us.npy", "b.npy"]
    assert rows["weight"].tolist() == [2.5, 1.0]
    assert rows["crowd_score"].tolist()[0] == 0.125
    assert "is not UTF-8, and is read as Windows-1252 (Latin-1)" in caplog.text
    assert read_manifest(table, where="weight > 2").table["filename"].tolist() == ["M\u00e4us.npy"]


def test_groups_of_whole_and_decimal_numbers(table: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(table, "filename,label,group", "a,1,12.0", "b,0,12", "c,0,7.0", "d,0,")
    assert read_manifest(table).table["group"].tolist() == ["12", "12", "7", ""]
    assert "groups '12.0' and '12' are read as one group" in caplog.text
    # Where they cannot be mistaken, names stay as they are written.
    write(table, "filename,label,group", "a,1,12.0", "b,0,12.5", "c,0,7.0")
    assert read_manifest(table).table["group"].tolist() == ["12.0", "12.5", "7.0"]


def test_splits_may_have_other_names(table: Path) -> None:
    write(table, "filename,label,split", "a,1,Training", "b,0,validation", "c,0,valid", "d,1,TEST")
    assert read_manifest(table).table["split"].tolist() == ["train", "val", "val", "test"]


CHALLENGE = [
    "filename,url,project_id,num_frames,crowd_score,tier1,micro,nano,my notes",
    "1.mp4,s3://x/1,007,54,0.0,True,False,False,",
    "2.mp4,s3://x/2,7,60,0.9,False,True,False,good",
    "3.mp4,s3://x/3,7,17,,False,True,True,bad",
]
CONDITIONS = {
    "micro": "23",
    "not micro": "1",
    "micro and num_frames > 50": "2",
    "project_id == '007'": "1",
    "group in ['7', '8']": "23",
    "nano or tier1": "13",
    "`my notes` == 'good'": "2",
    "17 < num_frames <= 60": "12",
    "micro == nano": "13",
    "not (crowd_score >= 0)": "3",
    "'2.mp4' <= filename != \"3.mp4\"": "2",
    "num_frames not in (54, -1)": "23",
}


@pytest.mark.parametrize("condition", CONDITIONS)
def test_rows_are_chosen_by_any_column(table: Path, condition: str) -> None:
    rows = zip(CHALLENGE, ("stalled", "1", "1", "0"), strict=True)
    write(table, *(f"{row},{label}" for row, label in rows))
    manifest = read_manifest(table, where=condition)
    assert "".join(name[0] for name in manifest.table["filename"]) == CONDITIONS[condition]
    assert manifest.table.index.tolist() == list(range(len(manifest.table)))
    assert list(manifest.urls_by_name()) == manifest.table["filename"].tolist()


NO_CONDITIONS = {
    "mikro": "there is no column 'mikro'. Known: filename, url",
    "project_id > 3": "'project_id > 3' compares strings with numbers. Strings stand in quotes",
    "project_id not in ['007', -7]": "compares strings with numbers",
    "micro != 'False'": "compares strings with numbers",
    "micro and num_frames > 50 | tier1": "it may only compare columns",
    "micro or 1": "'1' is not true or false for each row",
    "not num_frames": "'num_frames' is not true or false for each row",
    "num_frames == [54, 60]": "a list may only stand after 'in'",
    "num_frames in 54": "a list may only stand after 'in'",
    "54 in [num_frames, micro]": "'in' takes a column and a list of numbers or strings",
    "num_frames in [num_frames]": "'in' takes a column and a list of numbers or strings",
    "1 in [1] and micro": "'in' takes a column and a list of numbers or strings",
    "num_frames == 99999999999999999999": "it holds for none",
    "not " * 1500 + "micro": "it is nested too deeply",
    "num_frames > -micro": "'-micro' is no column, number or string",
    "`my notes` == '&'": "it holds for none",
    "filename == 'd\\d.mp4'": "it is no expression over columns",
    "micro = True": "it is no expression over columns. Equal is ==",
    "1 == 1": "it names no column",
    "@table": "it is no expression over columns",
    "__import__('os').system('touch owned')": "it may only compare columns",
    "[x for x in micro]": "it may only compare columns",
    "micro; nano": "it is no expression over columns",
    "(" * 300 + "micro" + ")" * 300: "it is no expression over columns",
}


@pytest.mark.parametrize("condition", NO_CONDITIONS, ids=range(len(NO_CONDITIONS)))
def test_what_is_no_condition_is_refused(table: Path, condition: str) -> None:
    write(table, *CHALLENGE)
    with pytest.raises(ManifestError, match=re.escape(NO_CONDITIONS[condition])) as raised:
        read_manifest(table, where=condition, unlabelled=True)
    assert raised.value.where == "--where"
    assert "\n" not in str(raised.value)


def test_rows_are_chosen_by_labels_of_another_table(tmp_path: Path, table: Path) -> None:
    """Which need not have one for a row that is not chosen."""
    write(table, *CHALLENGE)
    write(tmp_path / "train_labels.csv", "filename,stalled", "3.mp4,0", "2.mp4,1")
    for condition in ("stalled == 1", "label == 1 and micro", "label > 0.5"):
        manifest = read_manifest(table, where=condition)
        assert manifest.table["filename"].tolist() == ["2.mp4"]
        assert manifest.table["label"].tolist() == [1]
    assert read_manifest(table, where="micro").table["label"].tolist() == [1, 0]
    with pytest.raises(ManifestError, match=r"no label for '1.mp4' \(1 such rows\)"):
        read_manifest(table)


def test_names_in_a_table_of_labels_are_read_as_those_of_clips(tmp_path: Path, table: Path) -> None:
    rows = ["d/a.mp4 ;1;x", "./b.mp4;0;y", "Ma\u0308us.mp4;1;z"]
    labels = write(tmp_path / "other.csv", "Filename;Stalled;note", *rows)
    write(table, "filename", r"d\a.mp4", "b.mp4", "M\u00e4us.mp4")
    assert read_manifest(table, labels=labels).table["label"].tolist() == [1, 0, 1]


def test_a_bad_label_is_named_where_it_stands(tmp_path: Path, table: Path) -> None:
    labels = write(tmp_path / "other.csv", "filename,label", "z.mp4,0", "b.mp4,0", "a.mp4,perhaps")
    write(table, "filename", "a.mp4", "b.mp4")
    with pytest.raises(
        ManifestError, match=r"of 'a.mp4' is 'perhaps', not 0 or 1 \(line 4"
    ) as told:
        read_manifest(table, labels=labels)
    assert told.value.where == labels
    with pytest.raises(ManifestError, match="cannot be read") as told:
        read_manifest(table, labels=tmp_path / "nowhere.csv")
    assert told.value.where == tmp_path / "nowhere.csv"
    with pytest.raises(ManifestError, match="contradict"):
        read_manifest(table, labels=labels, unlabelled=True)


def test_labels_that_are_all_the_same_may_be_placeholders(
    table: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(table, "filename,stalled", "a.mp4,0", "b.mp4,0")
    assert read_manifest(table).table["label"].tolist() == [0, 0]
    assert "all 2 labels are 0. If they are placeholders, prepare it with --unl" in caplog.text
    caplog.clear()
    read_manifest(table, unlabelled=True)
    read_manifest(write(table, "filename,stalled", "a.mp4,0", "b.mp4,1"))
    assert "all 2 labels are" not in caplog.text
