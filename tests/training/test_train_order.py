"""Training by the plan's options: weights that change, a voxel budget, another order accepted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import (
    STEPS_PER_EPOCH,
    InterruptedSessionError,
    interrupt_at,
    losses_of,
    metrics_of,
    tiny_config,
)
from npy_store import npy_store
from short_runs import train_until
from torch.nn.functional import binary_cross_entropy_with_logits

from dist_train.config import Config
from dist_train.data.loading.collate import collate
from dist_train.data.loading.sampler import Slot
from dist_train.data.store.reader import Store
from dist_train.errors import CheckpointError, PlanError
from dist_train.run.data import open_data
from dist_train.run.model import as_input, make_model
from dist_train.training.negative_weights import read_weights
from dist_train.training.train import train

SIDE = 8


@pytest.fixture(scope="module")
def deep_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,600 clips of 4 to 64 frames, a quarter of them positive, to train on; a few for val."""
    rng = np.random.default_rng(0)
    return npy_store(
        tmp_path_factory.mktemp("deep"),
        [
            (
                rng.integers(0, 256, (int(4 * 16 ** rng.random()), SIDE, SIDE), np.uint8),
                {"label": int(number % 4 == 0), "split": "train" if number < 1_600 else "val"},
            )
            for number in range(1_610)
        ],
    )


# Weights.


def write_weights(path: Path, store: Path, weight: Callable[[int], float]) -> None:
    names = Store(store).table["filename"]
    weights = [weight(number) for number in range(len(names))]
    pd.DataFrame({"filename": names, "weight": weights}).to_csv(path, index=False)


def test_only_negatives_with_weight_are_drawn(tmp_path: Path) -> None:
    """Weights of the manifest and of the table are multiplied. Those of positives do not count."""
    clips = [
        (
            np.full((4, SIDE, SIDE), number, np.uint8),
            {"label": number % 2, "split": "val" if number < 8 else "train",
             "weight": int(number % 4 == 0)},
        )
        for number in range(60)
    ]  # fmt: skip
    store = npy_store(tmp_path, clips)
    data = open_data(tiny_config(store, tmp_path / "run", "plan.batch=4"))
    plan = data.plan(weights=(np.arange(60) < 40).astype(np.float64))
    drawn = {int(clip) for step in range(plan.first_step(20)) for clip in plan.global_batch(step)}
    assert drawn == {*range(9, 60, 2), *range(8, 40, 4)}
    natural = open_data(tiny_config(store, tmp_path / "run", "plan.ratio=natural"))
    with pytest.raises(PlanError, match=r"plan\.ratio: natural takes every clip once.*a weight"):
        natural.plan()


def test_weights_are_read_anew_for_each_epoch_and_kept_for_a_resumed_one(
    store: Path, tmp_path: Path
) -> None:
    table = tmp_path / "weights.csv"

    def begin(out: str) -> Config:
        write_weights(table, store, lambda number: float(number % 2 == 0))
        return tiny_config(store, tmp_path / out, f"plan.weights={table}")

    def mine(done: int, total: int, metrics: str = "", /) -> None:
        """Mine hard negatives in the first epoch, for the second one."""
        if done == 3:
            write_weights(table, store, lambda number: float(number % 2 == 1))

    train(begin("straight"), progress=mine)
    kept = {path.name: path.read_text() for path in (tmp_path / "straight" / "weights").iterdir()}
    assert sorted(kept) == ["step-0.csv", "step-12.csv", "step-6.csv"]
    assert kept["step-0.csv"] != kept["step-6.csv"] == kept["step-12.csv"]

    stopped = begin("stopped")
    stop = interrupt_at(STEPS_PER_EPOCH + 3)

    def mine_and_stop(done: int, total: int, metrics: str = "", /) -> None:
        mine(done, total)
        stop(done, total)

    with pytest.raises(InterruptedSessionError):
        train(stopped, progress=mine_and_stop)
    # The second epoch is completed with the weights that it began with.
    before = table.read_text()
    write_weights(table, store, lambda number: 1.0)
    train(stopped, resume="auto", progress=lambda *_: table.write_text(before) and None)
    assert losses_of(stopped.out) == losses_of(tmp_path / "straight")
    plain = tiny_config(store, tmp_path / "plain")
    train_until(plain, 3)
    assert losses_of(plain.out) != losses_of(stopped.out)[:3]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("filename\na\n", "its columns are filename"),
        ("", "is no CSV file"),
        ("filename,weight\nnone.npy,1\n", "names 'none.npy', which is no clip of the store"),
        ("filename,weight\na.npy,-1\n", "the weight of 'a.npy' is '-1', not a number from 0"),
        ("filename,weight\na.npy,x\n", "the weight of 'a.npy' is 'x', not a number from 0"),
        ("filename,weight\na.npy,1\na.npy,2\n", "'a.npy' has two weights"),
    ],
)
def test_a_wrong_table_of_weights_is_told(content: str, message: str) -> None:
    with pytest.raises(PlanError, match=f"^weights.csv: {message}"):
        read_weights(content.encode(), pd.Series(["a.npy", "b.npy"]), "weights.csv")


def test_a_missing_table_of_weights_is_told(store: Path, tmp_path: Path) -> None:
    table = tmp_path / "weights.csv"
    with pytest.raises(PlanError, match=f"^{table}: cannot be read"):
        train(tiny_config(store, tmp_path / "run", f"plan.weights={table}"))


# A voxel budget.

# As many as a block of the deepest clips has.
BUDGET = 8 * 64 * SIDE * SIDE


def budgeted(store: Path, out: Path, *more: str) -> Config:
    size = f"clip.size=[{SIDE}, {SIDE}]"
    return tiny_config(store, out, size, f"plan.max_voxels={BUDGET}", *more)


def test_the_budget_is_of_clips_as_they_are_cut(deep_store: Path, tmp_path: Path) -> None:
    """If the plan did not know that clips are cut, it would make smaller steps."""
    data = open_data(budgeted(deep_store, tmp_path, "clip.max_frames=16"))
    plan, depths = data.plan(), data.dataset(training=True).depths
    assert depths([*range(len(data.store.table))]).max() == 16
    for step in range(plan.first_step(1)):
        np.testing.assert_array_equal(plan.depths(step), depths(plan.global_batch(step).tolist()))


def test_gradients_are_weighted_by_the_clips_of_a_step(deep_store: Path, tmp_path: Path) -> None:
    config = budgeted(deep_store, tmp_path / "run", "train.epochs=1", "snapshots.at=[1]")

    train_until(config, 1)
    data = open_data(config)
    plan = data.plan()
    steps = range(plan.first_step(1))
    assert len({plan.clips_at(step) for step in steps}) > 2
    # Over whole epochs each clip counts once.
    many = range(plan.first_step(40))
    assert np.mean([plan.weight(step) for step in many]) == pytest.approx(1, abs=0.02)

    slots = [Slot(int(clip), 0) for clip in plan.global_batch(0)]
    batch = collate(data.dataset(training=True), slots)
    model = make_model(config)
    model.train()
    logits = model(as_input(batch.volumes, config), batch.frames)
    loss = binary_cross_entropy_with_logits(logits, batch.labels)
    (loss * plan.clips_at(0) / np.mean([plan.clips_at(step) for step in many])).backward()
    norm = torch.linalg.vector_norm(
        torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None])
    )
    first = metrics_of(tmp_path / "run")[0]
    assert first["train/loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert first["train/grad_norm"] == pytest.approx(float(norm), rel=0.02)


# A checkpoint of another order.


def test_another_order_is_refused_until_it_is_accepted(store: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(tiny_config(store, out, "train.epochs=2", "snapshots.at=[2]"))
    changed = ("plan.negatives=natural", "plan.order=random")
    with pytest.raises(CheckpointError, match=r"checkpoint\.accept_other_order=true"):
        train(tiny_config(store, out, *changed), resume="auto")
    accepted = tiny_config(store, out, *changed, "checkpoint.accept_other_order=true")
    train(accepted, resume="auto")
    assert [line["step"] for line in metrics_of(out)] == list(range(1, 3 * STEPS_PER_EPOCH + 1))


def test_a_new_run_leaves_a_folder_of_the_users_alone(store: Path, tmp_path: Path) -> None:
    weights = tmp_path / "run" / "weights"
    weights.mkdir(parents=True)
    for name in ("pretrained.bin", "step-0.csv", "step-0.csv.txt"):
        (weights / name).write_text("filename,weight\n")
    train(tiny_config(store, tmp_path / "run", "train.epochs=1", "snapshots.at=[1]"))
    assert sorted(path.name for path in weights.iterdir()) == ["pretrained.bin", "step-0.csv.txt"]
