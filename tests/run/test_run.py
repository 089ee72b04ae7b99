"""What a run is made of: data, model, folder, record."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import SPLITS, tiny_config

from dist_train.data.splits import CODES
from dist_train.data.target_labels import TargetLabels
from dist_train.errors import ConfigError, PlanError, RunError
from dist_train.run.data import RunData, _with_ratio, open_data
from dist_train.run.folder import RECORD, only_session
from dist_train.run.model import as_input, make_model, model_metadata
from dist_train.run.record import begin_session, open_run, read_record
from dist_train.targets import Target
from dist_train.training.class_rates import class_rates


def test_the_splits_of_the_store_are_used(store: Path) -> None:
    data = open_data(tiny_config(store, Path("out")))
    for split, (positives, negatives) in SPLITS.items():
        assert len(data.numbers(split, 1)) == positives
        assert len(data.numbers(split, 0)) == negatives
        assert len(data.numbers(split)) == positives + negatives
    assert data.natural_rate() == pytest.approx(12 / 40)


def test_the_plan_holds_train_clips_alone_in_the_exact_ratio(store: Path) -> None:
    data = open_data(tiny_config(store, Path("out")))
    plan, train = data.plan(), set(data.numbers("train").tolist())
    labels = data.store.table["label"]
    for step in range(plan.first_step(2)):
        batch = plan.global_batch(step)
        assert set(batch.tolist()) <= train
        assert labels[batch].sum() == 2


def three_classes(store: Path, *settings: str) -> RunData:
    """The tiny store's clips, the positives in two classes: 28 a, 9 b and 3 c in training."""
    data = open_data(tiny_config(store, Path("out"), *settings))
    codes = data.store.table["label"].astype(np.int64)
    codes[np.flatnonzero((data.splits == CODES["train"]) & (codes == 1))[::4]] = 2
    labels = TargetLabels(Target("multiclass", ("a", "b", "c")), codes)
    return replace(data, target_labels=labels)


@pytest.mark.parametrize(
    ("ratio", "quotas", "batch"),
    [
        ("balanced", {2: 1, 0: 1, 1: 1}, 6),
        ("{b: 1, c: 2, a: 5}", {2: 2, 0: 5, 1: 1}, 8),
        # 28 / 14 is less than 9 / 4 and 3 / 1.
        ("{a: 14, b: 4, c: 1}", {0: 14, 1: 4, 2: 1}, 19),
        ("natural", {None: 1}, 8),
    ],
)
def test_a_ratio_names_the_classes_and_the_shortest_pass_is_an_epoch(
    store: Path, ratio: str, quotas: dict[int | None, int], batch: int
) -> None:
    data = three_classes(store, f"plan.ratio={ratio}", f"plan.batch={batch}")
    assert list(data.quotas().items()) == list(quotas.items())
    plan, codes = data.plan(), data.class_codes()
    groups = batch // sum(quotas.values())
    for step in range(plan.first_step(2)):
        found = codes[plan.global_batch(step)]
        for code, quota in quotas.items():
            assert code is None or (found == code).sum() == groups * quota
    if ratio == "natural":
        epoch = np.concatenate([plan.global_batch(step) for step in range(5)])
        assert sorted(epoch.tolist()) == data.numbers("train").tolist()


def test_of_equal_passes_the_first_class_s_is_the_epoch(store: Path) -> None:
    assert next(iter(three_classes(store, "plan.ratio={a: 28, b: 9, c: 1}").quotas())) == 0


@pytest.mark.parametrize(
    ("ratio", "shares"),
    [("{a: 5, b: 3, c: 2}", [0.5, 0.3, 0.2]), ("natural", [28 / 40, 9 / 40, 3 / 40])],
)
def test_the_share_of_each_class_in_batches_is_known(
    store: Path, ratio: str, shares: list[float]
) -> None:
    data = three_classes(store, f"plan.ratio={ratio}")
    assert class_rates(data).batches.tolist() == shares


@pytest.mark.parametrize(
    "ratio", ["[1, 3]", "{a: 1, b: 1}", "{a: 1, b: 1, c: 1, d: 1}", "{a: 1, b: 1, C: 1}", "{}"]
)
def test_a_ratio_of_other_classes_is_refused_with_the_names_there_are(
    store: Path, ratio: str
) -> None:
    data = three_classes(store, f"plan.ratio={ratio}")
    with pytest.raises(PlanError, match=r"plan\.ratio: .*classes are a, b, c.*{a: 1, b: 1, c: 1}"):
        data.quotas()


def test_weights_and_groups_are_of_all_classes_but_the_anchor(store: Path) -> None:
    data = three_classes(store, "plan.ratio={a: 2, b: 2, c: 1}", "plan.batch=5")
    codes, train = data.class_codes(), data.numbers("train")
    # Every second clip of each class; c is the anchor, whose weights do not count.
    kept = np.concatenate([train[codes[train] == code][::2] for code in range(3)])
    weights = np.isin(np.arange(len(codes)), kept).astype(np.float64)
    plan = data.plan(weights)
    drawn = np.concatenate([plan.global_batch(step) for step in range(60)])
    anchors = train[codes[train] == 2]
    assert set(drawn.tolist()) == {*kept.tolist(), *anchors.tolist()}
    assert len(anchors) == 3
    # All clips of this store are of one group, so each of a class has the same weight.
    balanced = three_classes(
        store, "plan.ratio=balanced", "plan.batch=6", "plan.balance_groups=true"
    )
    assert [clips.weights is None for clips in balanced.plan().classes] == [True, False, False]


@pytest.mark.parametrize(
    ("target", "settings", "ratio"),
    [
        (Target("multiclass", ("a", "b", "c")), (), "balanced"),
        (Target("multiclass", ("a", "b", "c")), ("plan.ratio=natural",), "natural"),
        (Target("multiclass", ("a", "b", "c")), ("plan.ratio=[1, 3]",), (1, 3)),
        (Target("regression", ("a",)), (), "natural"),
        (Target(), (), (1, 3)),
    ],
)
def test_more_than_two_classes_are_balanced_unless_a_ratio_is_given(
    target: Target, settings: tuple[str, ...], ratio: object, store: Path
) -> None:
    config = tiny_config(store, Path("out"), *settings)
    assert _with_ratio(config, target).plan.ratio == ratio


def test_two_classes_by_name_are_the_same_plan(store: Path) -> None:
    plans = [
        open_data(tiny_config(store, Path("out"), f"plan.ratio={ratio}")).plan()
        for ratio in ("[1, 3]", "{negative: 3, positive: 1}")
    ]
    assert plans[0].fingerprint == plans[1].fingerprint
    np.testing.assert_array_equal(*(plan.global_batch(3) for plan in plans))


@pytest.mark.parametrize(
    ("ratio", "rate"), [("[1, 3]", 0.25), ("balanced", 0.5), ("natural", 12 / 40)]
)
def test_the_rate_of_positives_in_batches_is_known(store: Path, ratio: str, rate: float) -> None:
    data = open_data(tiny_config(store, Path("out"), f"plan.ratio={ratio}"))
    assert class_rates(data).batches.tolist() == [1 - rate, rate]


def test_the_augmented_and_the_plain_dataset_differ_in_the_clips_alone(store: Path) -> None:
    from dist_train.data.loading.collate import collate
    from dist_train.data.loading.sampler import Slot

    data = open_data(tiny_config(store, Path("out")))
    plain, augmented = data.dataset(training=False), data.dataset(training=True)
    slots = [Slot(clip, 0) for clip in range(8)]
    one, other = collate(plain, slots), collate(augmented, slots)
    assert torch.equal(one.labels, other.labels)
    assert one.volumes.shape == other.volumes.shape == (8, 1, 8, 16, 16)
    assert not torch.equal(one.volumes, other.volumes)
    for a, b in zip(one.volumes, other.volumes, strict=True):
        assert torch.equal(a.reshape(-1).sort().values, b.reshape(-1).sort().values)


def test_quarter_turns_of_oblong_clips_are_refused(store: Path) -> None:
    config = tiny_config(store, Path("out"), "clip.size=[16, 24]")
    with pytest.raises(ConfigError, match=r"augment\.rotate90: quarter turns need square clips"):
        open_data(config)
    open_data(tiny_config(store, Path("out"), "clip.size=[16, 24]", "augment.rotate90=0"))


def test_a_batch_that_the_split_cannot_fill_is_refused(store: Path) -> None:
    config = tiny_config(store, Path("out"), "plan.batch=64")
    with pytest.raises(PlanError, match="train split has 12 positives"):
        open_data(config).plan()


def test_weights_depend_on_the_seed_alone(store: Path) -> None:
    def weights(*more: str) -> list[torch.Tensor]:
        return list(make_model(tiny_config(store, Path("out"), *more)).state_dict().values())

    torch.manual_seed(99)
    first, again, other = weights(), weights("plan.batch=16"), weights("seed=1")
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("channels_last", [True, False])
def test_input_is_scaled_to_one_in_the_layout_of_the_run(store: Path, channels_last: bool) -> None:
    config = tiny_config(store, Path("out"), f"train.channels_last={channels_last}")
    layout = torch.channels_last_3d if channels_last else torch.contiguous_format
    volumes = torch.randint(0, 256, (2, 3, 4, 5, 6), dtype=torch.uint8)
    given = as_input(volumes, config)
    assert given.dtype == torch.float32
    assert given.is_contiguous(memory_format=layout)
    assert torch.equal(given, volumes.float() / 255)


def test_recomputation_changes_no_weights_so_it_is_no_fact_of_the_model(store: Path) -> None:
    plain = model_metadata(tiny_config(store, Path("out")))
    block = model_metadata(tiny_config(store, Path("out"), "model.recompute=block"))
    wider = model_metadata(tiny_config(store, Path("out"), "model.width=8"))
    assert "stem_border" not in plain, "files of earlier versions have none"
    assert model_metadata(tiny_config(store, Path("out"), "model.stem_border=true"))["stem_border"]
    assert plain == block == json.loads(json.dumps(plain))
    assert plain != wider


def test_a_folder_without_settings_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="there is no run here"):
        open_run(tmp_path)


def test_the_record_keeps_every_session(tmp_path: Path) -> None:
    begin_session(tmp_path, {"steps": 4}, {"world_size": 1})
    begin_session(tmp_path, {"steps": 6}, {"world_size": 2})
    record = read_record(tmp_path)
    assert record["steps"] == 6
    assert [session["world_size"] for session in record["sessions"]] == [1, 2]
    assert all(session["started"].endswith("+00:00") for session in record["sessions"])
    assert record["versions"]["torch"] == torch.__version__
    assert record["versions"]["numpy"] == np.__version__


@pytest.mark.parametrize("content", [None, "{", "[1]", '{"sessions": []}'])
def test_a_record_that_is_missing_or_damaged_is_named_and_written_anew(
    tmp_path: Path, content: str | None
) -> None:
    if content is not None:
        (tmp_path / RECORD).write_text(content)
    with pytest.raises(RunError, match="the record of the run cannot be read"):
        read_record(tmp_path)
    begin_session(tmp_path, {}, {"world_size": 1})
    assert len(read_record(tmp_path)["sessions"]) == 1


def test_a_folder_takes_one_training_at_a_time(tmp_path: Path) -> None:
    with (
        only_session(tmp_path / "run"),
        pytest.raises(RunError, match="another training is at work"),
        only_session(tmp_path / "run"),
    ):
        pytest.fail("there are two")
    with only_session(tmp_path / "run"):
        pass
