"""Which clips take part, and folds that are balanced, or that never cross a group."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from helpers import overrides, refused, tiny_config
from make_media import store_of, volumes
from tables import table_of, two_classes

from dist_train.config import SelectSettings, SplitSettings
from dist_train.data import splits as splits_module
from dist_train.data.splits import (
    CODES,
    NAMES,
    Splits,
    assign_splits,
    check_splits,
    choose_clips,
    counts_by_class,
    select_clips,
)
from dist_train.data.target_labels import TargetLabels
from dist_train.errors import PlanError
from dist_train.run.data import open_data
from dist_train.targets import Target


def clips(count: int, *, groups: int = 5, rate: float = 0.2, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    group = np.minimum(rng.geometric(0.3, count), groups)
    return pd.DataFrame(
        {
            "key": [f"clip{i}" for i in range(count)],
            "label": (rng.random(count) < rate).astype("int8"),
            "group": [f"g{g}" for g in group],
            "split": "",
            "tier1": rng.random(count) < 0.7,
            "crowd_score": rng.random(count),
        }
    )


def assigned(table: pd.DataFrame, *, seed: int = 3, **settings: Any) -> pd.Series:
    chosen = np.ones(len(table), np.bool_)
    stored = table_of(table)
    codes = assign_splits(stored, stored["label"], chosen, SplitSettings(**settings), seed)
    return pd.Series(np.array(NAMES, object)[codes], index=table.index)


def selected(table: pd.DataFrame, tier2: float | None = None) -> np.ndarray:
    stored = table_of(table)
    return select_clips(stored, two_classes(stored), tier2_crowd_score=tier2)


def chosen_splits(table: pd.DataFrame, split: SplitSettings, **select: Any) -> Splits:
    stored = table_of(table)
    labels = two_classes(stored)
    return choose_clips(stored, SelectSettings(**select), split, seed=0, labels=labels)


def fold_numbers(table: pd.DataFrame, folds: int, groups: str, seed: int = 3) -> pd.Series:
    """The fold that each clip is tested in."""
    number = pd.Series(-1, index=table.index)
    for fold in range(folds):
        splits = assigned(table, folds=folds, fold=fold, groups=groups, seed=seed)
        assert (number[splits == "test"] == -1).all(), "a clip is tested in two folds"
        number[splits == "test"] = fold
    assert (number >= 0).all(), "a clip is tested in no fold"
    return number


def test_all_labelled_clips_by_default() -> None:
    table = clips(50)
    table.loc[[3, 7], "label"] = -1
    chosen = selected(table)
    assert np.flatnonzero(~chosen).tolist() == [3, 7]


def test_the_original_rule() -> None:
    table = pd.DataFrame(
        {
            #         tier 1, any score | tier 2: confident, just at, doubtful, negative, no score
            "label": [1, 0, 1, 1, 1, 1, 0, 1],
            "tier1": [True, True, True, False, False, False, False, False],
            "crowd_score": [0.0, 0.0, np.nan, 0.61, 0.6, 0.2, 0.9, np.nan],
        }
    )
    chosen = selected(table, 0.6)
    assert np.flatnonzero(chosen).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(("label", "missing"), [(0, "positives"), (1, "negatives")])
def test_a_class_that_is_missing_is_named(label: int, missing: str) -> None:
    with pytest.raises(PlanError, match=rf"no {missing} \(10 clips of 10 selected\)"):
        selected(clips(10).assign(label=label))


def test_a_share_is_of_each_class_of_train_alone_and_part_of_a_larger_one() -> None:
    table = clips(400)
    whole = chosen_splits(table, SplitSettings())
    before = whole
    for share in (0.5, 0.07, 0.001):
        splits = chosen_splits(table, SplitSettings(), share=share)
        held_out = whole > CODES["train"]
        assert (splits[held_out] == whole[held_out]).all()
        train, kept = whole == CODES["train"], splits == CODES["train"]
        for label in (0, 1):
            of_class = table["label"].to_numpy() == label
            clips_there = int((train & of_class).sum())
            assert (kept & of_class).sum() == int(np.ceil(share * clips_there))
        assert (kept <= (before == CODES["train"])).all()
        before = splits
    other = choose_clips(
        table_of(table), SelectSettings(share=0.5), SplitSettings(train_on_all=True), seed=1,
        labels=two_classes(table_of(table)),
    )  # fmt: skip
    assert 200 <= (other > 0).sum() <= 201


def test_stratified_folds_are_balanced_by_class_and_group() -> None:
    table = clips(997)
    number = fold_numbers(table, 5, "stratify")
    for columns, most in ((["label"], 1), (["group", "label"], 1), (["group"], 2)):
        counts = pd.crosstab([table[c] for c in columns], number)
        assert (counts.max(axis=1) - counts.min(axis=1)).max() <= most, columns


def test_small_groups_do_not_all_fill_the_first_fold() -> None:
    table = clips(200).assign(group=[f"g{i}" for i in range(200)])
    counts = fold_numbers(table, 5, "stratify").value_counts()
    assert counts.max() - counts.min() <= 2


def test_disjoint_folds_never_cross_a_group() -> None:
    rng = np.random.default_rng(1)
    table = clips(600).assign(group=[f"patient{p}" for p in rng.integers(0, 40, 600)])
    number = fold_numbers(table, 5, "disjoint")
    assert (number.groupby(table["group"]).nunique() == 1).all()
    shares = table["label"].groupby(number).agg(["sum", "size"])
    largest = table.groupby("group")["label"].agg(["sum", "size"]).max()
    assert shares["size"].max() - shares["size"].min() <= largest["size"]
    assert shares["sum"].max() - shares["sum"].min() <= largest["sum"]


@pytest.mark.parametrize("groups", ["stratify", "disjoint"])
def test_split_belongs_to_the_clip_not_to_its_place(groups: str) -> None:
    table = clips(200, groups=12)
    before = assigned(table, groups=groups)
    after = assigned(table.sample(frac=1, random_state=0), groups=groups)
    assert after.sort_index().tolist() == before.tolist()


@pytest.mark.parametrize("groups", ["stratify", "disjoint"])
def test_another_seed_cuts_otherwise(groups: str) -> None:
    table = clips(200).assign(group=[f"g{i % 20}" for i in range(200)])
    first, second = (fold_numbers(table, 5, groups, seed) for seed in (0, 1))
    assert (first != second).any()


def test_fold_is_test_and_the_next_one_is_val() -> None:
    table = clips(100)
    number = fold_numbers(table, 5, "stratify")
    splits = assigned(table, fold=4)
    assert (number[splits == "test"] == 4).all()
    assert (number[splits == "val"] == 0).all()
    assert set(number[splits == "train"]) == {1, 2, 3}


def test_split_of_the_manifest_wins() -> None:
    table = clips(30).assign(split=["train", "val", "test"] * 10)
    assert assigned(table).tolist() == table["split"].tolist()


def test_too_few_groups() -> None:
    with pytest.raises(PlanError, match=r"2 groups cannot fill 5 folds.*split.groups=stratify"):
        assigned(clips(50).assign(group=["a", "b"] * 25), groups="disjoint")


def test_choose_clips_keeps_the_clip_numbers() -> None:
    table = clips(300)
    codes = chosen_splits(table, SplitSettings(), tier2_crowd_score=0.6)
    assert set(codes.tolist()) == {0, *CODES.values()}
    chosen = selected(table, 0.6)
    assert ((codes > 0) == chosen).all()


@pytest.mark.parametrize(("given", "empty"), [("train", "val"), ("val", "train")])
def test_split_without_clips(given: str, empty: str) -> None:
    with pytest.raises(PlanError, match=f"no clip is in split '{empty}'"):
        chosen_splits(clips(20).assign(split=given), SplitSettings())


def test_clips_without_a_group_are_refused_or_told_apart() -> None:
    """Half a column of blanks is neither one animal nor, unasked, as many as there are clips."""
    table = clips(60).assign(group=["", *["a", "b", "c", "d", " "] * 10, *[""] * 9])

    def folds(ungrouped: str) -> pd.Series:
        return assigned(table, folds=3, groups="disjoint", seed=0, ungrouped=ungrouped)

    with pytest.raises(PlanError, match=r"20 of 60 clips have no group, the first is 'clip0'"):
        folds("refuse")
    blank = table["group"].str.strip() == ""
    assert folds("own")[blank].nunique() == 3
    assert folds("together")[blank].nunique() == 1
    # Where groups do not keep clips apart, blanks matter as little.
    assigned(table, folds=3)


def test_a_group_in_two_splits_of_the_manifest() -> None:
    table = clips(4).assign(group=["a", "b", "a", "b"], split=["train", "val", "test", "val"])
    with pytest.raises(PlanError, match=r"group 'a' is in splits test and train of the manifest"):
        assigned(table, groups="disjoint")
    assert assigned(table).tolist() == ["train", "val", "test", "val"]


def check(table: pd.DataFrame, split: SplitSettings) -> None:
    labels = two_classes(table_of(table))
    counts = counts_by_class(chosen_splits(table, split), labels)
    given = bool((table["split"] != "").all())
    check_splits(counts, split, given=given, classes=labels.classes)


def test_a_fold_without_a_class_is_refused() -> None:
    """Two groups hold the positives, so one of four folds has none, whichever is tested."""
    table = clips(80, rate=0.0).assign(group=[f"g{i % 8}" for i in range(80)])
    table.loc[table["group"].isin(["g0", "g1"]), "label"] = 1
    said = []
    for fold in range(4):
        message = (
            rf"split\.fold={fold}: split '\w+' holds no positives \((fold \d of 4; )?train: \d+ pos"
        )
        with pytest.raises(PlanError, match=message) as raised:
            check(table, SplitSettings(folds=4, fold=fold, groups="disjoint"))
        said.append(str(raised.value))
    for fold, text in enumerate(said):
        if "split 'test'" in text:
            assert f"fold {fold} of 4" in text
    assert any("split 'test'" in text for text in said)
    check(table, SplitSettings(folds=4))


def test_fewer_positives_than_folds_are_refused_for_every_fold() -> None:
    table = clips(80, rate=0.0)
    table.loc[:3, "label"] = 1
    for fold in range(5):
        with pytest.raises(PlanError, match=r"4 positives cannot be in each of 5 folds|no positi"):
            check(table, SplitSettings(folds=5, fold=fold))
    check(table, SplitSettings(folds=4))


@pytest.mark.parametrize(
    ("name", "label", "missing"),
    [("train", 0, "positives"), ("val", 1, "negatives"), ("test", 0, "positives")],
)
def test_a_split_of_the_manifest_without_a_class(name: str, label: int, missing: str) -> None:
    table = clips(60, rate=0.5).assign(split=["train", "val", "test"] * 20)
    check(table, SplitSettings())
    table.loc[table["split"] == name, "label"] = label
    with pytest.raises(PlanError, match=rf"split '{name}' holds no {missing} \(train: "):
        check(table, SplitSettings())


def test_groups_that_look_the_same_are_one_in_an_old_store_too() -> None:
    table = clips(60).assign(group=[("m1", "m2", "m3", "m3 ")[i % 4] for i in range(60)])
    splits = assigned(table, folds=3, groups="disjoint")
    assert splits[table["group"].str.strip() == "m3"].nunique() == 1


@pytest.mark.parametrize("ties", [False, True])
def test_clips_are_dealt_in_the_order_of_their_hashes(
    ties: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exactly, as runs that were begun before must find the same splits."""
    table = clips(120).sort_values("key", ignore_index=True)
    if ties:
        none = np.zeros(len(table), np.uint64)
        monkeypatch.setattr(splits_module, "_first_digests", lambda *_: none)
    rows = table.assign(hash=[hashlib.sha256(f"3/{k}".encode()).hexdigest() for k in table["key"]])
    rows = rows.sort_values(["label", "group", "hash"])
    fold = rows.groupby("label").cumcount() % 5
    expected = fold.map({0: "test", 1: "val"}).fillna("train").sort_index()
    assert assigned(table).tolist() == expected.tolist()


def test_a_class_is_named_as_in_the_table() -> None:
    table = clips(60, rate=0.5).assign(split=["train", "val", "test"] * 20)
    table.loc[table["split"] == "val", "label"] = 1
    names = {0: "flowing", 1: "stalled"}
    codes = table["split"].map(CODES).to_numpy(np.uint8)
    labels = two_classes(table_of(table), names)
    counts = counts_by_class(codes, labels)
    with pytest.raises(PlanError, match=r"split 'val' holds no 'flowing' clips \(train: \d+ 'stal"):
        check_splits(counts, SplitSettings(), given=True, classes=labels.classes)
    stored = table_of(table.assign(label=0))
    with pytest.raises(PlanError, match="the selection holds no 'stalled' clips"):
        select_clips(stored, two_classes(stored, names), tier2_crowd_score=None)


BAD_SPLITS = {
    "a blank group": (
        {"group": ["a", "b", "c", ""] * 6},
        ("split.folds=3", "split.groups=disjoint"),
        "6 of 24 clips have no group",
    ),
    "a group in two splits": (
        {"group": ["a", "b", "c"] * 8, "split": ["train"] * 12 + ["val"] * 6 + ["test"] * 6},
        ("split.groups=disjoint",),
        "group 'a' is in splits test and train and val of the manifest (3 such groups)",
    ),
    "a split without a class": (
        {"split": ["train"] * 16 + ["val", "test"] * 4},
        (),
        "split 'val' holds no positives (train: 8 positives, 8 negatives; val: 0 positives, 4",
    ),
    "a fold without a class": (
        {"group": ["a", "b", "c", "d"] * 6},
        ("split.folds=4", "split.groups=disjoint", "split.fold=1"),
        "split.fold=1: split 'train' holds no positives (train: ",
    ),
}


@pytest.mark.parametrize("kind", BAD_SPLITS)
def test_bad_splits_are_refused_before_the_first_step(tmp_path: Path, kind: str) -> None:
    columns, settings, message = BAD_SPLITS[kind]
    store = store_of(tmp_path, volumes(24), **columns)
    out = tmp_path / "run"
    said = refused("train", *overrides(store.folder, out, "split.duplicates=keep", *settings))
    assert message in said
    assert not (out / "metrics.jsonl").exists()


def test_groups_in_two_given_splits_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    splits = ["train"] * 12 + ["val"] * 6 + ["test"] * 6
    store = store_of(tmp_path, volumes(24), group=["a", "b", ""] * 8, split=splits)
    open_data(tiny_config(store.folder, tmp_path / "run"), training=True)
    assert "2 groups are in more than one split of the manifest, such as 'a' in test and" in (
        caplog.text
    )


def many_classes(table: pd.DataFrame, classes: int) -> tuple[pd.DataFrame, TargetLabels]:
    names = {code: f"c{code}" for code in range(classes)}
    table = table.assign(label=np.arange(len(table)) % classes)
    return table, two_classes(table_of(table), names)


def test_folds_of_many_classes_are_balanced() -> None:
    table, labels = many_classes(clips(1000, groups=3), 7)
    for groups in ("stratify", "disjoint"):
        stored = table_of(table.assign(group=[f"g{n // 7 % 50}" for n in range(1000)]))
        split = SplitSettings(groups=groups)
        codes = choose_clips(stored, SelectSettings(), split, seed=0, labels=labels)
        counts = counts_by_class(codes, labels)
        slack, total = 2 if groups == "stratify" else 12, np.sum(list(counts.values()), axis=0)
        for name, share in {"train": 0.6, "val": 0.2, "test": 0.2}.items():
            np.testing.assert_allclose(counts[name], share * total, atol=slack)


def test_values_and_combinations_of_labels_are_spread_over_folds() -> None:
    table = table_of(clips(500))
    random = np.random.default_rng(0)
    values = TargetLabels(Target("regression", ("v",)), random.normal(size=(500, 1)))
    combined = random.integers(0, 2, (500, 3)).astype(np.float32)
    several = TargetLabels(Target("multilabel", ("a", "b", "c")), combined)
    for labels in (values, several):
        splits = choose_clips(table, SelectSettings(), SplitSettings(), seed=0, labels=labels)
        for stratum in range(labels.strata.max() + 1):
            own = splits[labels.strata == stratum]
            for name, share in {"train": 0.6, "val": 0.2, "test": 0.2}.items():
                assert abs((own == CODES[name]).sum() - share * len(own)) <= 2
    assert np.bincount(values.strata).tolist() == [50] * 10


def test_a_class_of_many_that_is_missing_is_named() -> None:
    table, labels = many_classes(clips(70), 7)
    splits = np.where(table["label"] == 4, 1, 1 + np.arange(70) // 7 % 3).astype(np.uint8)
    with pytest.raises(PlanError, match=r"split 'val' holds no 'c4' clips \(train: 10 'c4' clips"):
        check_splits(
            counts_by_class(splits, labels), SplitSettings(), given=True, classes=labels.classes
        )
    stored = table_of(table.assign(label=table["label"].replace(2, 3)))
    names = dict(enumerate(labels.classes))
    with pytest.raises(PlanError, match="the selection holds no 'c2' clips"):
        select_clips(stored, two_classes(stored, names), tier2_crowd_score=None)
