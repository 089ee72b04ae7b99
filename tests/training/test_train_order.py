"""Training by the plan's options: weights that change, a voxel budget, another order accepted."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import STEPS_PER_EPOCH, losses_of, metrics_of, tiny_config
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import binary_cross_entropy_with_logits

from dist_train.config import Config
from dist_train.data.loading.collate import Batch, collate
from dist_train.data.loading.sampler import Slot
from dist_train.data.plan.plan import Plan
from dist_train.data.raw.clip import PrepareSettings
from dist_train.data.store.build import prepare
from dist_train.data.store.reader import Store
from dist_train.data.table.manifest import read_manifest
from dist_train.errors import CheckpointError, PlanError
from dist_train.run.data import RunData, open_data
from dist_train.run.model import as_input, make_model
from dist_train.training.train import train

SIDE = 8


@pytest.fixture(scope="module")
def deep_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,600 clips of 4 to 64 frames, a quarter of them positive, to train on; a few for val."""
    folder = tmp_path_factory.mktemp("deep")
    rng = np.random.default_rng(0)
    lines = ["filename,label,split"]
    for number in range(1_610):
        shape = (int(4 * 16 ** rng.random()), SIDE, SIDE)
        np.save(folder / f"c{number}.npy", rng.integers(0, 256, shape, np.uint8))
        split = "train" if number < 1_600 else "val"
        lines.append(f"c{number}.npy,{int(number % 4 == 0)},{split}")
    (folder / "clips.csv").write_text("\n".join(lines) + "\n")
    manifest = read_manifest(folder / "clips.csv")
    prepare(manifest, folder, folder / "store", PrepareSettings(roi="none"))
    return folder / "store"


# Weights.


def write_weights(path: Path, store: Path, weight: Callable[[int], float]) -> Path:
    names = Store(store).table["filename"]
    lines = [f"{name},{weight(number):g}" for number, name in enumerate(names)]
    path.write_text("\n".join(["filename,weight", *lines]) + "\n")
    return path


def even(number: int) -> float:
    return float(number % 2 == 0)


def odd(number: int) -> float:
    return float(number % 2 == 1)


def trained_on(data: RunData, weights: np.ndarray) -> set[int]:
    plan = data.plan(weights)
    steps = range(plan.first_step(20))
    return {int(clip) for step in steps for clip in plan.global_batch(step)}


def test_negatives_without_weight_are_not_drawn(store: Path, tmp_path: Path) -> None:
    data = open_data(tiny_config(store, tmp_path))
    weights = np.arange(len(data.store.table)) % 2 * 1.0
    negatives = set(data.numbers("train", 0).tolist())
    drawn = trained_on(data, weights)
    assert drawn & negatives == {clip for clip in negatives if clip % 2}
    # The weight of a positive says nothing.
    assert set(data.numbers("train", 1).tolist()) <= drawn


def test_manifest_weights_count(tmp_path: Path) -> None:
    lines = ["filename,label,split,weight"]
    for number in range(60):
        volume = np.full((4, SIDE, SIDE), number, np.uint8)
        np.save(tmp_path / f"c{number:02d}.npy", volume)
        split = "val" if number < 8 else "train"
        lines.append(f"c{number:02d}.npy,{number % 2},{split},{int(number % 4 == 0)}")
    (tmp_path / "clips.csv").write_text("\n".join(lines) + "\n")
    manifest = read_manifest(tmp_path / "clips.csv")
    prepare(manifest, tmp_path, tmp_path / "store", PrepareSettings(roi="none"))
    config = tiny_config(tmp_path / "store", tmp_path / "run", "plan.batch=4")
    drawn = trained_on(open_data(config), np.ones(60))
    assert {clip for clip in drawn if clip % 2 == 0} == set(range(8, 60, 4))


def test_weights_are_read_anew_for_each_epoch_and_kept_for_a_resumed_one(
    store: Path, tmp_path: Path
) -> None:
    table = tmp_path / "weights.csv"

    def config(out: str) -> Config:
        return tiny_config(store, tmp_path / out, f"plan.weights={table}")

    def mine(done: int, total: int, figures: str) -> None:
        """Hard-negative mining, in the middle of the first epoch, for the second."""
        if done == 3:
            write_weights(table, store, odd)

    write_weights(table, store, even)
    train(config("straight"), progress=mine)
    kept = {path.name: path.read_text() for path in (tmp_path / "straight" / "weights").iterdir()}
    assert sorted(kept) == ["step-0.csv", "step-12.csv", "step-6.csv"]
    assert kept["step-0.csv"] != kept["step-6.csv"] == kept["step-12.csv"]

    class StopError(Exception):
        pass

    def stopped(done: int, total: int, figures: str) -> None:
        mine(done, total, figures)
        if done == STEPS_PER_EPOCH + 3:
            raise StopError

    write_weights(table, store, even)
    with pytest.raises(StopError):
        train(config("stopped"), progress=stopped)
    # In the middle of the second epoch, which goes on with what it was begun with.
    before = table.read_text()
    write_weights(table, store, lambda number: 1.0)
    shutil.copy(table, tmp_path / "other.csv")

    def back(done: int, total: int, figures: str) -> None:
        table.write_text(before)

    train(config("stopped"), resume="auto", progress=back)
    assert losses_of(tmp_path / "stopped") == losses_of(tmp_path / "straight")
    plain = tiny_config(store, tmp_path / "plain")
    train(plain)
    assert losses_of(tmp_path / "plain") != losses_of(tmp_path / "straight")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("filename\na\n", "its columns are filename"),
        ("", "is no CSV file"),
        ("filename,weight\nnone.npy,1\n", "names 'none.npy', which is no clip of the store"),
        ("filename,weight\n{name},-1\n", "the weight of '{name}' is '-1', not a number from 0"),
        ("filename,weight\n{name},x\n", "the weight of '{name}' is 'x', not a number from 0"),
        ("filename,weight\n{name},1\n{name},2\n", "'{name}' has two weights"),
    ],
)
def test_a_table_of_weights_that_is_none(
    store: Path, tmp_path: Path, content: str, message: str
) -> None:
    name = Store(store).table["filename"].iloc[0]
    table = tmp_path / "weights.csv"
    table.write_text(content.format(name=name))
    with pytest.raises(PlanError, match=f"^{table}: {message.format(name=name)}"):
        train(tiny_config(store, tmp_path / "run", f"plan.weights={table}"))


def test_no_table_of_weights(store: Path, tmp_path: Path) -> None:
    table = tmp_path / "weights.csv"
    with pytest.raises(PlanError, match=f"^{table}: cannot be read"):
        train(tiny_config(store, tmp_path / "run", f"plan.weights={table}"))


# A voxel budget.

# As many as a block of the deepest clips has.
BUDGET = 8 * 64 * SIDE * SIDE


def budgeted(store: Path, out: Path, *more: str) -> Config:
    size = f"clip.size=[{SIDE}, {SIDE}]"
    return tiny_config(store, out, size, f"plan.max_voxels={BUDGET}", *more)


def batch_of(data: RunData, step: int) -> Batch:
    dataset = data.dataset(training=True)
    epoch = data.plan().epoch_of(step)
    return collate(dataset, [Slot(int(clip), epoch) for clip in data.plan().global_batch(step)])


def test_the_budget_is_of_clips_as_they_are_cut(deep_store: Path, tmp_path: Path) -> None:
    """A plan that took deep clips for deeper than the model sees them would make small steps."""
    data = open_data(budgeted(deep_store, tmp_path, "clip.max_frames=16"))
    plan, depths = data.plan(), data.dataset(training=True).depths
    assert depths.max() == 16
    for step in range(plan.first_step(1)):
        np.testing.assert_array_equal(plan.depths(step), depths[plan.global_batch(step)])


def test_gradients_are_weighted_by_the_clips_of_a_step(deep_store: Path, tmp_path: Path) -> None:
    config = budgeted(deep_store, tmp_path / "run", "train.epochs=1", "snapshots.at=[1]")

    class FirstStepError(Exception):
        pass

    def stop(done: int, total: int, figures: str) -> None:
        raise FirstStepError

    with pytest.raises(FirstStepError):
        train(config, progress=stop)
    data = open_data(config)
    plan = data.plan()
    steps = range(plan.first_step(1))
    assert len({plan.clips_at(step) for step in steps}) > 2
    # Over whole epochs each clip counts once.
    many = range(plan.first_step(40))
    assert np.mean([plan.weight(step) for step in many]) == pytest.approx(1, abs=0.02)

    batch = batch_of(data, 0)
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


def saved_bytes(model: nn.Module, data: RunData, config: Config, step: int) -> int:
    """What a step's forward pass keeps for the backward one."""
    kept: dict[int, int] = {}
    batch = batch_of(data, step)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = model(as_input(batch.volumes, config), batch.frames)
    assert logits.requires_grad
    return sum(kept.values())


def every_third_by_size(plan: Plan) -> list[int]:
    """Of the steps of an epoch by their padded size; the largest are all there."""
    steps = range(plan.first_step(1))
    by_size = sorted(steps, key=lambda step: plan.clips_at(step) * plan.depths(step).max())
    return by_size[:-6:3] + by_size[-6:]


def test_activations_stay_within_the_budget_at_any_depth(deep_store: Path, tmp_path: Path) -> None:
    config = budgeted(deep_store, tmp_path / "run")
    plain = config.model_copy(update={"plan": config.plan.model_copy(update={"max_voxels": None})})
    data, data_plain = open_data(config), open_data(plain)
    plan = data.plan()
    model = make_model(config)
    by_budget, by_count = (
        [saved_bytes(model, d, c, step) for step in every_third_by_size(d.plan())]
        for d, c in ((data, config), (data_plain, plain))
    )
    assert max(by_count) > 6 * min(by_count)
    # The deepest block sets the peak. A step is a whole number of blocks, so it may fall short of
    # the peak by one block; the last step of an epoch is always a single one.
    assert max(by_budget) < 1.05 * max(by_count)
    assert np.quantile(by_budget, 0.1) > 0.45 * max(by_budget)
    assert np.quantile(by_count, 0.1) < 0.15 * max(by_count)
    for step in range(plan.first_step(3)):
        deepest = int(plan.depths(step).max())
        voxels = plan.clips_at(step) * deepest * SIDE * SIDE
        assert voxels <= BUDGET or plan.clips_at(step) == plan.batch


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
