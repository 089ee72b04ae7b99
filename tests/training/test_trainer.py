"""One process trains, stops, goes on: the figures, the folder, and exact resumption."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    STEPS_PER_EPOCH,
    InterruptedSessionError,
    contents,
    cut,
    interrupt_at,
    losses_of,
    metrics_of,
    overrides,
    said,
    tiny_config,
    tiny_store,
)
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from dist_train.checkpoint.format import by_step, load_checkpoint
from dist_train.config import Config
from dist_train.data.loading.collate import Batch, collate
from dist_train.data.loading.sampler import Slot
from dist_train.errors import CheckpointError, RunError, StoreError
from dist_train.evaluation.export import export_run
from dist_train.models.norm_statistics import precise_statistics
from dist_train.run.data import open_data
from dist_train.run.model import as_input, make_model
from dist_train.run.record import open_run
from dist_train.training.optimizer import Schedule
from dist_train.training.train import Resume, train
from dist_train.training.trainer import Trainer

STEPS = 3 * STEPS_PER_EPOCH


def weights_of(run: Path, step: int = STEPS) -> bytes:
    return (run / "snapshots" / f"step-{step}.safetensors").read_bytes()


@pytest.fixture(scope="module")
def straight(store: Path) -> Path:
    """A run from its beginning to its end, with dropout; not to be changed."""
    out = store.parent / "trainer"
    train(tiny_config(store, out, "model.dropout=0.3"))
    return out


def test_the_folder_holds_what_the_settings_ask_for(straight: Path) -> None:
    assert sorted(p.name for p in (straight / "snapshots").iterdir()) == [
        "step-12.safetensors", "step-18.safetensors"
    ]  # fmt: skip
    assert sorted(p.name for p in (straight / "checkpoints").iterdir()) == ["step-16", "step-18"]
    record = json.loads((straight / "run.json").read_text())
    assert record["steps"] == STEPS
    assert record["positive_rate"] == {"train_batches": 0.25, "natural": 0.3}
    (session,) = record["sessions"]
    assert session["world_size"] == 1
    assert session["resumed_from_step"] is None


def test_every_step_has_a_line_and_every_epoch_its_metrics(straight: Path) -> None:
    lines = metrics_of(straight)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["epoch"] for line in lines] == [0] * 6 + [1] * 6 + [2] * 6
    assert [line["step"] for line in lines if "val/mcc@0.5" in line] == [6, 12, 18]
    assert [line["step"] for line in lines if "train/auc" in line] == [6, 12, 18]


def test_it_learns(straight: Path) -> None:
    losses = losses_of(straight)
    assert np.mean(losses[-3:]) < 0.5 * np.mean(losses[:3])


def test_the_logged_rate_is_the_schedule(store: Path, straight: Path) -> None:
    config = tiny_config(store, straight)
    schedule = Schedule(config.schedule, config.optim.lr, STEPS, config.train.epochs)
    assert [line["train/lr"] for line in metrics_of(straight)] == list(
        map(schedule.lr, range(STEPS))
    )


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_first_loss_and_gradient_are_those_of_the_planned_clips(
    store: Path, tmp_path: Path, accumulate: int
) -> None:
    """Computed from plan, dataset and model alone. BatchNorm sees one micro-batch at a time."""
    config = tiny_config(store, tmp_path / "run", f"train.accumulate={accumulate}")
    data = open_data(config)
    model, dataset = make_model(config), data.dataset(training=True)
    losses = []
    for clips in np.split(data.plan().global_batch(0), accumulate):
        batch = collate(dataset, [Slot(int(clip), 0) for clip in clips])
        logits = model(as_input(batch.volumes, config), batch.frames)
        loss = binary_cross_entropy_with_logits(logits, batch.labels) / accumulate
        loss.backward()
        losses.append(float(loss.detach()))
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = float(torch.linalg.vector_norm(torch.cat([g.reshape(-1) for g in gradients])))
    with pytest.raises(InterruptedSessionError):
        train(config, progress=interrupt_at(1))
    (first,) = metrics_of(tmp_path / "run")
    assert first["train/loss"] == pytest.approx(sum(losses), rel=1e-6)
    # AdamW hides a wrong scale of the gradient; clipping does not.
    assert first["train/grad_norm"] == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("more", [(), ("optim.ema=0.5",)], ids=["weights", "their average"])
def test_held_out_clips_are_judged_as_they_are_by_what_a_snapshot_holds(
    store: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    """Clip by clip, without augmentation and dropout."""
    config = tiny_config(store, tmp_path, "model.dropout=0.3", "snapshots.at=[1]", *more)
    assert config.augment.flip > 0
    with pytest.raises(InterruptedSessionError):
        train(config, progress=interrupt_at(STEPS_PER_EPOCH))
    model = make_model(config).eval()
    model.load_state_dict(load_file(tmp_path / "snapshots" / f"step-{STEPS_PER_EPOCH}.safetensors"))
    data = open_data(config)
    clips = data.numbers("val")
    with torch.no_grad():
        volumes = [torch.from_numpy(data.store.read(clip)).float() / 255 for clip in clips]
        logits = torch.cat([model(volume[None, None], None) for volume in volumes])
    labels = torch.from_numpy(data.store.table["label"].to_numpy(np.float32)[clips])
    expected = float(binary_cross_entropy_with_logits(logits, labels))
    assert metrics_of(tmp_path)[-1]["val/loss"] == pytest.approx(expected, rel=1e-5)


def test_the_same_settings_give_the_same_run(store: Path, straight: Path, tmp_path: Path) -> None:
    again = tmp_path / "run"
    train(tiny_config(store, again, "model.dropout=0.3"))
    assert metrics_of(again) == metrics_of(straight)
    assert weights_of(again) == weights_of(straight)


@pytest.mark.parametrize("step", [2, 6, 9, 17], ids=lambda step: f"after step {step}")
def test_a_resumed_run_equals_the_straight_one(
    store: Path, straight: Path, tmp_path: Path, step: int
) -> None:
    """Before the first checkpoint, at an epoch's end, in an epoch's middle, before the end."""
    config = tiny_config(store, tmp_path / "run", "model.dropout=0.3")
    with pytest.raises(InterruptedSessionError):
        train(config, progress=interrupt_at(step))
    train(config, resume="auto")
    assert metrics_of(tmp_path / "run") == metrics_of(straight)
    for at in (12, 18):
        assert weights_of(tmp_path / "run", at) == weights_of(straight, at)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert [s["resumed_from_step"] for s in record["sessions"]] == [None, step // 4 * 4 or None]


def test_a_run_goes_on_from_before_a_damaged_checkpoint(
    store: Path, straight: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(straight, out)
    for step, name in ((18, "checkpoint.json"), (16, "rank-00000.safetensors")):
        (out / "checkpoints" / f"step-{step}" / name).unlink()
    config = tiny_config(store, out, "model.dropout=0.3")
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints is whole"):
        train(config, resume="auto")
    shutil.copytree(
        straight / "checkpoints" / "step-16", out / "checkpoints" / "step-16", dirs_exist_ok=True
    )
    train(config, resume="auto")
    assert metrics_of(out) == metrics_of(straight)
    assert weights_of(out) == weights_of(straight)
    assert json.loads((out / "run.json").read_text())["sessions"][-1]["resumed_from_step"] == 16


def test_a_finished_run_is_left_as_it_is(store: Path, straight: Path) -> None:
    def content() -> dict[str, bytes]:
        return {str(p): p.read_bytes() for p in straight.rglob("*") if p.is_file()}

    before = content()
    train(tiny_config(store, straight, "model.dropout=0.3"), resume="auto")
    assert content() == before


def test_a_new_run_does_not_mix_with_an_old_one(store: Path, straight: Path) -> None:
    with pytest.raises(RunError, match="the folder holds a run already"):
        train(tiny_config(store, straight))


def test_snapshots_of_a_run_that_was_given_up_are_not_averaged_in(
    store: Path, tmp_path: Path
) -> None:
    config = tiny_config(store, tmp_path, "checkpoint.every_steps=99", "snapshots.at=[1, 2, 3]")
    with pytest.raises(InterruptedSessionError):
        train(config, progress=interrupt_at(13))
    left = contents(tmp_path / "snapshots")
    assert left.keys() == {"step-6.safetensors", "step-12.safetensors"}
    lines = (tmp_path / "metrics.jsonl").read_bytes()
    train(tiny_config(store, tmp_path, "snapshots.at=[3]", "optim.lr=0.02"), resume="auto")
    assert [p.name for p in (tmp_path / "snapshots").iterdir()] == ["step-18.safetensors"]
    assert contents(tmp_path / "superseded") == left | {"metrics.jsonl": lines}
    assert len(metrics_of(tmp_path)) == 18
    (session,) = json.loads((tmp_path / "run.json").read_text())["sessions"][1:]
    assert "optim.lr: 0.01 before, 0.02 now" in session["changed"]


def mark_of(run: Path, part: str) -> None:
    """A part of a run, in a folder that has nothing else of one."""
    path = run / part
    path.parent.mkdir(parents=True, exist_ok=True)
    if part.startswith("checkpoints"):
        path.mkdir()
    else:
        path.write_text("{}")


@pytest.mark.parametrize(
    "part",
    ["config.yaml", "run.json", "metrics.jsonl", "tensorboard/events.out.tfevents.0000000001",
     "snapshots/step-6.safetensors", "checkpoints/step-4", "predictions.csv"],
)  # fmt: skip
def test_any_part_of_a_run_is_a_run(store: Path, tmp_path: Path, part: str) -> None:
    mark_of(tmp_path, part)
    before = contents(tmp_path)
    with pytest.raises(RunError, match="the folder holds a run already") as caught:
        train(tiny_config(store, tmp_path))
    assert Path(part).parts[0] in str(caught.value)
    assert contents(tmp_path) == before | {".lock": b""}


@pytest.mark.parametrize("resume", ["never", "auto"])
def test_a_finished_run_whose_checkpoints_are_gone_is_kept(
    store: Path, straight: Path, tmp_path: Path, resume: Resume
) -> None:
    out = tmp_path / "run"
    shutil.copytree(straight, out)
    shutil.rmtree(out / "checkpoints")
    before = contents(out)
    with pytest.raises(RunError, match="the folder holds a run") as caught:
        train(tiny_config(store, out, "model.dropout=0.3"), resume=resume)
    assert "move the folder away" in str(caught.value)
    assert contents(out) == before


@pytest.mark.parametrize("part", ["metrics.jsonl", "snapshots/step-6.safetensors"])
def test_a_folder_with_figures_or_snapshots_alone_is_not_begun_in(
    store: Path, tmp_path: Path, part: str
) -> None:
    mark_of(tmp_path, part)
    with pytest.raises(RunError, match="but no checkpoint to go on from"):
        train(tiny_config(store, tmp_path), resume="auto")
    assert (tmp_path / part).read_text() == "{}"


def test_figures_of_steps_that_are_done_again_are_kept_aside(
    store: Path, straight: Path, tmp_path: Path
) -> None:
    out = cut(straight, tmp_path / "run", after=16)
    lines = (out / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    snapshot = (out / "snapshots" / "step-18.safetensors").read_bytes()
    train(tiny_config(store, out, "model.dropout=0.3"), resume="auto")
    assert metrics_of(out) == metrics_of(straight)
    aside = contents(out / "superseded")
    assert aside == {"metrics.jsonl": b"".join(lines[16:]), "step-18.safetensors": snapshot}


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ("model.width=8", "another model (model.width is 4 there and 8 here)"),
        ("model.name=resnet3d-18", "model.name is resnet3d-10 there and resnet3d-18 here"),
        ("seed=1", "trained with another selection, split, plan or seed"),
        ("plan.batch=4", "trained with another selection, split, plan or seed"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(
    store: Path, straight: Path, change: str, part: str
) -> None:
    with pytest.raises(CheckpointError) as caught:
        train(tiny_config(store, straight, "model.dropout=0.3", change), resume="auto")
    assert part in str(caught.value)


def test_other_changes_are_told_and_recorded(
    store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "run"
    with pytest.raises(InterruptedSessionError):
        train(tiny_config(store, out), progress=interrupt_at(5))
    train(tiny_config(store, out, "augment.flip=0", "optim.lr=0.02"), resume="auto")
    changed = ["augment.flip: 0.5 before, 0.0 now", "optim.lr: 0.01 before, 0.02 now"]
    assert f"going on with other settings than before: {'; '.join(changed)}" in caplog.text
    first, second = json.loads((out / "run.json").read_text())["sessions"]
    assert "changed" not in first
    assert second["changed"] == changed


def test_settings_of_before_that_cannot_be_read_are_no_obstacle(
    store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny_config(store, tmp_path / "run")
    with pytest.raises(InterruptedSessionError):
        train(config, progress=interrupt_at(5))
    (tmp_path / "run" / "config.yaml").write_text("clip: 3")
    train(config, resume="auto")
    assert "the settings of the session before are not known" in caplog.text
    assert (tmp_path / "run" / "superseded" / "config.yaml").read_text() == "clip: 3"


def test_settings_that_the_user_wrote_are_not_replaced(store: Path, tmp_path: Path) -> None:
    """Such as those that the run is started with, and its folder holds."""
    for number, mine in enumerate(["# why\nseed: 3\n", "name: another program's\n"]):
        out = tmp_path / f"run{number}"
        out.mkdir()
        (out / "config.yaml").write_text(mine)
        with pytest.raises(InterruptedSessionError):
            train(tiny_config(store, out), resume="auto", progress=interrupt_at(1))
        assert (out / "superseded" / "config.yaml").read_text() == mine
        assert open_run(out).seed == 0


@pytest.mark.parametrize("name", ["checkpoints", "snapshots", "tensorboard"])
def test_a_file_in_the_place_of_a_folder_is_told_before_the_first_step(
    store: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(RunError, match=f"{name}: is no folder"):
        train(tiny_config(store, tmp_path))
    assert contents(tmp_path) == {".lock": b"", name: b"mine"}


def test_a_checkpoint_of_another_store_is_refused(straight: Path, tmp_path: Path) -> None:
    other = tiny_store(tmp_path / "store", seed=1)
    with pytest.raises(StoreError, match="60 clips then, 60 now; 0 new, 0 gone"):
        train(tiny_config(other, straight, "model.dropout=0.3"), resume="auto")


def test_recomputation_changes_neither_losses_nor_statistics(store: Path, tmp_path: Path) -> None:
    for recompute in ("none", "block"):
        train(tiny_config(store, tmp_path / recompute, f"model.recompute={recompute}"))
    assert losses_of(tmp_path / "block") == pytest.approx(losses_of(tmp_path / "none"), rel=1e-5)
    none, block = (
        load_file(tmp_path / name / "snapshots" / "step-18.safetensors")
        for name in ("none", "block")
    )
    for name, tensor in none.items():
        torch.testing.assert_close(block[name], tensor, rtol=1e-4, atol=1e-5)


def test_dropout_is_drawn_anew_for_each_step_and_again_for_a_resumed_one(
    store: Path, tmp_path: Path
) -> None:
    """By the seed of torch's generator in each step, as it is found when the next one begins."""
    config = tiny_config(store, tmp_path / "run", "model.dropout=0.3")
    noted: list[tuple[int, int]] = []

    def note(trainer: Trainer, step: int) -> None:
        if step > trainer.first_step:
            noted.append((step - 1, torch.initial_seed()))

    for resume, end in (("never", 7), ("auto", 12)):
        with pytest.raises(InterruptedSessionError):
            train(config, resume=resume, before_step=note, progress=interrupt_at(end))
    assert [step for step, _ in noted] == [*range(6), *range(4, 11)]
    seeds = dict(noted)
    assert sorted(noted) == sorted([*seeds.items(), *((step, seeds[step]) for step in (4, 5))])
    assert len(set(seeds.values())) == len(seeds) == 11


def test_the_average_is_of_the_weights_after_each_step_and_goes_on_when_resumed(
    store: Path, tmp_path: Path
) -> None:
    """By hand, from the first weights and from those of each step's checkpoint."""
    settings = ("optim.ema=0.5", "checkpoint.every_steps=1", "checkpoint.keep_last=9")
    config = tiny_config(store, tmp_path / "run", *settings)
    for resume, end in (("never", 3), ("auto", 8)):
        with pytest.raises(InterruptedSessionError):
            train(config, resume=resume, progress=interrupt_at(end))
    saved = dict(by_step(tmp_path / "run" / "checkpoints"))
    average = {n: t for n, t in make_model(config).state_dict().items() if t.is_floating_point()}
    for step, path in saved.items():
        tensors, _ = load_checkpoint(path)
        # The average after ``step`` steps has taken in so many weights.
        decay = min(0.5, step / (9 + step))
        for name, value in average.items():
            average[name] = decay * value + (1 - decay) * tensors[f"model/{name}"]
            torch.testing.assert_close(tensors[f"ema/{name}"], average[name])
    assert list(saved) == list(range(1, 9))


def test_a_run_that_begins_anew_after_a_bad_step_begins_with_a_new_average(
    store: Path, tmp_path: Path
) -> None:
    """Before the first checkpoint, when there is none to go back to."""

    def spoil(trainer: Trainer, step: int) -> None:
        if step == 2 and not trainer.recovery.bad_steps:
            trainer.backend.module.head.weight.data.fill_(float("nan"))

    states = []
    for name, before_step in (("straight", None), ("spoiled", spoil)):
        config = tiny_config(store, tmp_path / name, "optim.ema=0.5")
        with pytest.raises(InterruptedSessionError):
            train(config, before_step=before_step, progress=interrupt_at(4))
        states.append(load_checkpoint(tmp_path / name / "checkpoints" / "step-4")[0])
    straight, spoiled = states
    assert spoiled.keys() == straight.keys()
    for name, tensor in straight.items():
        assert torch.equal(spoiled[name], tensor), name


# Batch normalisation.


def micro_batch(config: Config, step: int, part: slice = slice(None)) -> tuple[Batch, Tensor]:
    """Clips of a step as they are trained on, and their volumes as the model takes them."""
    data = open_data(config)
    dataset, epoch = data.dataset(training=True), data.plan().epoch_of(step)
    clips = data.plan().global_batch(step)[part]
    batch = collate(dataset, [Slot(int(clip), epoch) for clip in clips])
    return batch, as_input(batch.volumes, config)


def test_the_gap_is_eval_loss_less_train_loss_of_the_same_clips(
    store: Path, straight: Path
) -> None:
    """From the snapshot at the end of the epoch, in the second half of whose last step the model
    is called without dropout."""
    config = tiny_config(store, straight, "model.dropout=0.3")
    model = make_model(config)
    model.load_state_dict(load_file(straight / "snapshots" / "step-12.safetensors"))
    batch, volumes = micro_batch(config, 11)
    losses = []
    with torch.no_grad():
        for training in (False, True):
            model.train(training)
            model.dropout.eval()
            logits = model(volumes, batch.frames)
            losses.append(float(binary_cross_entropy_with_logits(logits, batch.labels)))
    gaps = [(line["step"], line["norm/gap"]) for line in metrics_of(straight) if "norm/gap" in line]
    assert [step for step, _ in gaps] == [6, 12, 18]
    assert gaps[1][1] == pytest.approx(losses[0] - losses[1], abs=1e-6)
    assert abs(gaps[1][1]) > 1e-3


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_moves_running_statistics_as_far_however_it_is_cut(
    store: Path, tmp_path: Path, accumulate: int
) -> None:
    """Those of the stem, which sees the first weights in the first step."""
    config = tiny_config(
        store, tmp_path / "run", f"train.accumulate={accumulate}", "checkpoint.every_steps=1"
    )
    with pytest.raises(InterruptedSessionError):
        train(config, progress=interrupt_at(1))
    tensors, _ = load_checkpoint(tmp_path / "run" / "checkpoints" / "step-1")
    stem = make_model(config).stem
    means = []
    for half in np.split(np.arange(8), accumulate):
        _, volumes = micro_batch(config, 0, slice(half[0], half[-1] + 1))
        means.append(stem.conv(volumes).detach().mean(dim=(0, 2, 3, 4)))
    # The first of two micro-batches weighs a little less than the second one.
    share = (1 - 0.1) ** (1 / accumulate)
    expected = torch.zeros(4)
    for mean in means:
        expected = share * expected + (1 - share) * mean
    torch.testing.assert_close(tensors["model/stem.norm.running_mean"], expected)
    assert tensors["model/stem.norm.num_batches_tracked"] == accumulate


def test_a_snapshot_has_precise_statistics_and_training_does_not_notice(
    store: Path, straight: Path, tmp_path: Path
) -> None:
    config = tiny_config(store, tmp_path, "model.dropout=0.3", "norm.precise_steps=0")
    train(config)
    assert trained(tmp_path) == trained(straight)
    assert judged(tmp_path) != judged(straight)
    states = [load_checkpoint(run / "checkpoints" / "step-16")[0] for run in (tmp_path, straight)]
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name
    plain, precise = (
        load_file(run / "snapshots" / "step-12.safetensors") for run in (tmp_path, straight)
    )
    moved = {name for name in plain if not torch.equal(plain[name], precise[name])}
    assert moved == {name for name in plain if name.endswith(("running_mean", "running_var"))}
    model = make_model(config)
    model.load_state_dict(plain)
    model.train()
    with torch.no_grad(), precise_statistics(model):
        # Only the head, behind all normalisation, has dropout.
        for step in (8, 9, 10, 11):
            batch, volumes = micro_batch(config, step)
            model(volumes, batch.frames)
    for name in moved:
        torch.testing.assert_close(precise[name], model.state_dict()[name])


def trained(run: Path) -> list[dict[str, Any]]:
    """Figures without those of held-out clips."""
    lines = metrics_of(run)
    return [{k: v for k, v in line.items() if not k.startswith(("val/", "norm/"))}
            for line in lines]  # fmt: skip


def judged(run: Path) -> list[float]:
    return [line["val/loss"] for line in metrics_of(run) if "val/loss" in line]


@pytest.mark.parametrize("step", [12, 18])
def test_a_snapshot_is_what_was_judged_at_its_step(store: Path, straight: Path, step: int) -> None:
    config = tiny_config(store, straight)
    model = make_model(config)
    model.load_state_dict(load_file(straight / "snapshots" / f"step-{step}.safetensors"))
    (logged,) = (line["val/loss"] for line in metrics_of(straight) if line["step"] == step)
    assert held_out_loss(config, model) == pytest.approx(logged, rel=1e-5)


def held_out_loss(config: Config, model: nn.Module) -> float:
    """Of the val split, clip by clip."""
    data = open_data(config)
    losses = []
    for clip in data.numbers("val"):
        batch = collate(data.dataset(training=False), [Slot(int(clip), 0)])
        with torch.no_grad():
            logits = model.eval()(as_input(batch.volumes, config), batch.frames)
        losses.append(float(binary_cross_entropy_with_logits(logits, batch.labels)))
    return float(np.mean(losses))


def test_the_best_checkpoint_is_exported_as_it_was_judged(store: Path, tmp_path: Path) -> None:
    """And training does not go on from the statistics that it was judged by."""
    out = tmp_path / "run"
    best = ("checkpoint.best=val/loss", "optim.ema=0.5", "checkpoint.keep_last=9")
    config = tiny_config(store, out, *best, "snapshots.at=[3]")
    train(config)
    for step in (6, 12):
        logged = next(line["val/loss"] for line in metrics_of(out) if line["step"] == step)
        export_run(out, tmp_path / "file", step=step)
        model = make_model(config)
        model.load_state_dict(load_file(tmp_path / "file"))
        assert held_out_loss(config, model) == pytest.approx(logged, rel=1e-5)
    resumed = cut(out, tmp_path / "resumed", after=6)
    train(config.model_copy(update={"out": resumed}), resume="auto")
    assert metrics_of(resumed) == metrics_of(out)


def test_a_checkpoint_within_an_epoch_is_exported_with_statistics_of_its_weights(
    store: Path, straight: Path, tmp_path: Path
) -> None:
    """They are taken then, of the clips before its step."""
    config = tiny_config(store, straight)
    export_run(straight, tmp_path / "file", step=16)
    tensors, _ = load_checkpoint(straight / "checkpoints" / "step-16")
    model = make_model(config)
    model.load_state_dict({n: tensors[f"model/{n}"] for n in model.state_dict()})
    with torch.no_grad(), precise_statistics(model.train()):
        for step in (12, 13, 14, 15):
            batch, volumes = micro_batch(config, step)
            model(volumes, batch.frames)
    for name, tensor in load_file(tmp_path / "file").items():
        torch.testing.assert_close(tensor, model.state_dict()[name])
        if name.endswith("running_mean"):
            assert not torch.equal(tensor, tensors[f"model/{name}"])


@pytest.mark.slow
def test_worker_processes_change_nothing(store: Path, straight: Path, tmp_path: Path) -> None:
    config = tiny_config(store, tmp_path, "model.dropout=0.3", "loader.workers=1")
    train(config)
    assert metrics_of(tmp_path) == metrics_of(straight)


def test_a_diverged_run_says_so_before_it_is_saved(store: Path, tmp_path: Path) -> None:
    """At a rate that no settings file may give."""
    config = tiny_config(store, tmp_path, "schedule.warmup_epochs=0", "checkpoint.every_steps=1")
    steep = config.optim.model_copy(update={"lr": 1e30})
    with pytest.raises(RunError, match=r"training diverged: at step \d+ the loss is") as caught:
        train(config.model_copy(update={"optim": steep}))
    assert "by --resume auto" in str(caught.value)
    checkpoints = [path for _, path in by_step(tmp_path / "checkpoints")]
    assert checkpoints
    for path in checkpoints:
        tensors, _ = load_checkpoint(path)
        assert all(tensor.isfinite().all() for tensor in tensors.values()), path


@pytest.mark.slow
def test_real_volumes_from_file_to_report(real_data: Path, tmp_path: Path) -> None:
    """A part of VesselMNIST3D (Yang et al. 2023): blood vessels with and without an aneurysm."""
    source = real_data / "vesselmnist3d.npz"
    if not source.is_file():
        pytest.skip(f"there is no {source}")
    with np.load(source) as arrays:
        part = {name: values[:: 2 if name.startswith("train") else 1]
                for name, values in arrays.items()}  # fmt: skip
    np.savez(tmp_path / "part.npz", **part)
    out = tmp_path / "run"
    said("prepare-npz", tmp_path / "part.npz", "--out", tmp_path / "store")
    settings = overrides(
        tmp_path / "store", out, "clip.size=[28, 28]", "plan.batch=16", "model.width=8",
        "optim.lr=3e-3", "train.epochs=4", "snapshots.at=[4]",
    )  # fmt: skip
    said("train", *settings)
    said("predict", out)
    assert "Area under ROC" in said("evaluate", out)
    said("report", out)
    assert (out / "report.html").stat().st_size > 10_000
    val = [line["val/auc"] for line in metrics_of(out) if "val/auc" in line]
    assert len(val) == 4
    assert val[-1] > 0.6
