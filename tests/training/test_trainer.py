"""Training in one process: metrics, the run's folder, exact resumption, statistics."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    STEPS_PER_EPOCH,
    contents,
    cut,
    losses_of,
    metrics_of,
    overrides,
    said,
    tiny_config,
)
from safetensors.torch import load_file
from short_runs import assert_same_run, train_until
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from dist_train.checkpoint.format import MARKER, by_step, load_checkpoint
from dist_train.config import Config
from dist_train.data.loading.collate import Batch, collate
from dist_train.data.loading.sampler import Slot
from dist_train.errors import CheckpointError, RunError
from dist_train.evaluation.export import export_run
from dist_train.files import sealed
from dist_train.models.norm_statistics import precise_statistics
from dist_train.run.data import open_data
from dist_train.run.folder import CHECKPOINTS
from dist_train.run.model import as_input, make_model
from dist_train.run.record import open_run, read_record
from dist_train.training.schedule import Schedule
from dist_train.training.train import Resume, train
from dist_train.training.trainer import Trainer

STEPS = 3 * STEPS_PER_EPOCH


def held_out_loss(config: Config, model: nn.Module) -> float:
    """Loss of the val split, clip by clip, computed from store and model alone."""
    data = open_data(config)
    clips = data.numbers("val")
    model.eval()
    with torch.no_grad():
        volumes = [torch.from_numpy(data.store.read(clip)).float() / 255 for clip in clips]
        logits = torch.cat([model(volume[None, None], None) for volume in volumes])
    labels = torch.from_numpy(data.store.table["label"][clips].astype(np.float32))
    return float(binary_cross_entropy_with_logits(logits, labels))


def micro_batch(config: Config, step: int, part: slice = slice(None)) -> tuple[Batch, Tensor]:
    """Return a step's training batch, and its volumes as the model takes them."""
    data = open_data(config)
    dataset, epoch = data.dataset(training=True), data.plan().epoch_of(step)
    clips = data.plan().global_batch(step)[part]
    batch = collate(dataset, [Slot(int(clip), epoch) for clip in clips])
    return batch, as_input(batch.volumes, config)


def with_precise_statistics(
    config: Config, weights: dict[str, Tensor], steps: range
) -> dict[str, Tensor]:
    """Weights, and the statistics that they have over the clips of some steps."""
    model = make_model(config).train()
    model.load_state_dict(weights)
    # Dropout, if any, is behind all normalisation.
    with torch.no_grad(), precise_statistics(model):
        for step in steps:
            batch, volumes = micro_batch(config, step)
            model(volumes, batch.frames)
    return model.state_dict()


def assert_same(state: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert state.keys() == other.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, other[name]), name


@pytest.fixture(scope="module")
def straight(store: Path) -> Path:
    """A run from its beginning to its end, with dropout; not to be changed."""
    out = store.parent / "trainer"
    train(tiny_config(store, out, "model.dropout=0.3"))
    return out


def test_the_folder_holds_what_the_settings_ask_for(straight: Path) -> None:
    assert contents(straight / "snapshots").keys() == {"step-12.safetensors", "step-18.safetensors"}
    assert [step for step, _ in by_step(straight / "checkpoints")] == [16, 18]
    record = read_record(straight)
    assert record["steps"] == STEPS
    assert record["positive_rate"] == {"train_batches": 0.25, "natural": 0.3}
    (session,) = record["sessions"]
    assert (session["world_size"], session["resumed_from_step"]) == (1, None)
    lines = metrics_of(straight)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["epoch"] for line in lines] == [0] * 6 + [1] * 6 + [2] * 6
    for metric in ("val/mcc@0.5", "train/auc"):
        assert [line["step"] for line in lines if metric in line] == [6, 12, 18]


def test_it_learns(straight: Path) -> None:
    losses = losses_of(straight)
    assert np.mean(losses[-3:]) < 0.5 * np.mean(losses[:3])


def test_the_logged_rate_is_the_schedule(store: Path, straight: Path) -> None:
    config = tiny_config(store, straight)
    schedule = Schedule(config.schedule, config.optim.lr, STEPS, config.train.epochs)
    assert [line["train/lr"] for line in metrics_of(straight)] == [
        schedule.lr(step) for step in range(STEPS)
    ]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_first_loss_and_gradient_are_those_of_the_planned_clips(
    store: Path, tmp_path: Path, accumulate: int
) -> None:
    """So are the running statistics of the stem. All is computed from plan, dataset and model."""
    out = tmp_path / "run"
    config = tiny_config(store, out, f"train.accumulate={accumulate}", "checkpoint.every_steps=1")
    train_until(config, 1)
    model = make_model(config)
    losses, running_mean = [], torch.zeros(4)
    # A step moves statistics by 0.1, however it is cut.
    kept = (1 - 0.1) ** (1 / accumulate)
    for part in np.split(np.arange(8), accumulate):
        batch, volumes = micro_batch(config, 0, slice(part[0], part[-1] + 1))
        loss = binary_cross_entropy_with_logits(model(volumes, batch.frames), batch.labels)
        (loss / accumulate).backward()
        losses.append(float(loss.detach()))
        mean = model.stem.conv(volumes).detach().mean(dim=(0, 2, 3, 4))
        running_mean = kept * running_mean + (1 - kept) * mean
    (first,) = metrics_of(out)
    assert first["train/loss"] == pytest.approx(np.mean(losses), rel=1e-6)
    # AdamW hides a wrong scale of the gradient; clipping does not.
    gradients = [p.grad.reshape(-1) for p in model.parameters() if p.grad is not None]
    norm = float(torch.linalg.vector_norm(torch.cat(gradients)))
    assert first["train/grad_norm"] == pytest.approx(norm, rel=1e-4)
    tensors, _ = load_checkpoint(out / "checkpoints" / "step-1")
    torch.testing.assert_close(tensors["model/stem.norm.running_mean"], running_mean)
    assert tensors["model/stem.norm.num_batches_tracked"] == accumulate


@pytest.mark.parametrize("more", [(), ("optim.ema=0.5",)], ids=["weights", "their average"])
def test_held_out_clips_are_judged_as_they_are_by_what_a_snapshot_holds(
    store: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    """Clip by clip, without augmentation and dropout."""
    config = tiny_config(store, tmp_path, "model.dropout=0.3", "snapshots.at=[1]", *more)
    assert config.augment.flip > 0
    train_until(config, STEPS_PER_EPOCH)
    model = make_model(config)
    model.load_state_dict(load_file(tmp_path / "snapshots" / f"step-{STEPS_PER_EPOCH}.safetensors"))
    assert metrics_of(tmp_path)[-1]["val/loss"] == pytest.approx(held_out_loss(config, model))


@pytest.mark.parametrize("step", [2, 6, 9])
def test_a_resumed_run_equals_the_straight_one(
    store: Path, straight: Path, tmp_path: Path, step: int
) -> None:
    """Stopped before the first checkpoint, at the end of an epoch, and in an epoch."""
    config = tiny_config(store, tmp_path / "run", "model.dropout=0.3")
    train_until(config, step)
    train(config, resume="auto")
    assert_same_run(config.out, straight)
    sessions = read_record(tmp_path / "run")["sessions"]
    assert [s["resumed_from_step"] for s in sessions] == [None, step // 4 * 4 or None]


def test_a_finished_run_is_left_as_it_is(store: Path, straight: Path) -> None:
    before = contents(straight)
    train(tiny_config(store, straight, "model.dropout=0.3"), resume="auto")
    assert contents(straight) == before


def test_a_run_that_is_begun_again_keeps_its_leavings_aside_and_tells_what_changed(
    store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Snapshots of the first attempt would be averaged into the predictions."""
    config = tiny_config(store, tmp_path, "checkpoint.every_steps=99", "snapshots.at=[1, 2, 3]")
    train_until(config, 13)
    left = contents(tmp_path / "snapshots")
    assert left.keys() == {"step-6.safetensors", "step-12.safetensors"}
    lines = (tmp_path / "metrics.jsonl").read_bytes()
    train(tiny_config(store, tmp_path, "snapshots.at=[3]", "optim.lr=0.02"), resume="auto")
    assert contents(tmp_path / "snapshots").keys() == {"step-18.safetensors"}
    assert contents(tmp_path / "superseded") == left | {"metrics.jsonl": lines}
    assert len(metrics_of(tmp_path)) == STEPS
    change = "optim.lr: 0.01 before, 0.02 now"
    first, second = read_record(tmp_path)["sessions"]
    assert "changed" not in first
    assert change in second["changed"]
    assert "going on with other settings than before: " in caplog.text
    assert change in caplog.text


@pytest.mark.parametrize(
    ("resume", "part"),
    [
        ("never", "config.yaml"),
        ("never", "run.json"),
        ("never", "metrics.jsonl"),
        ("never", "tensorboard/events.out.tfevents.1"),
        ("never", "snapshots/step-6.safetensors"),
        ("never", "checkpoints/step-4/x"),
        ("never", "predictions.csv"),
        ("auto", "metrics.jsonl"),
        ("auto", "snapshots/step-6.safetensors"),
    ],
)
def test_any_part_of_a_run_without_a_checkpoint_is_left_as_it_is(
    store: Path, tmp_path: Path, resume: Resume, part: str
) -> None:
    (tmp_path / part).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / part).write_text("{}")
    told = {"never": "the folder holds a run already", "auto": "but no checkpoint to go on from"}
    with pytest.raises(RunError, match=told[resume]) as caught:
        train(tiny_config(store, tmp_path), resume=resume)
    assert Path(part).parts[0] in str(caught.value)
    assert contents(tmp_path) == {".lock": b"", part: b"{}"}


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


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ("model.width=8", "another model (model.width is 4 there and 8 here)"),
        ("seed=1", "trained with another selection, split, plan or seed"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(
    store: Path, straight: Path, change: str, part: str
) -> None:
    with pytest.raises(CheckpointError) as caught:
        train(tiny_config(store, straight, "model.dropout=0.3", change), resume="auto")
    assert part in str(caught.value)


def test_a_checkpoint_of_another_program_is_skipped(
    store: Path, straight: Path, tmp_path: Path
) -> None:
    """Its checksums are right, and it says nothing of a run."""
    out = tmp_path / "run"
    shutil.copytree(straight, out)
    for path in (out / CHECKPOINTS).iterdir():
        marker = json.loads((path / MARKER).read_text())
        del marker["crc32c"]
        (path / MARKER).write_text(sealed(marker | {"facts": {}}))
    with pytest.raises(CheckpointError, match="its facts are not those of a run"):
        train(tiny_config(store, out, "model.dropout=0.3"), resume="auto")


def test_settings_that_the_user_wrote_are_not_replaced(
    store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, mine in (("valid", "# why\nseed: 3\n"), ("invalid", "clip: 3")):
        config = tiny_config(store, tmp_path / name)
        config.out.mkdir()
        (config.out / "config.yaml").write_text(mine)
        train_until(config, 1, resume="auto")
        assert (config.out / "superseded" / "config.yaml").read_text() == mine
        assert open_run(config.out).seed == 0
    assert "the settings of the session before are not known" in caplog.text


def test_a_file_in_the_place_of_a_folder_is_told_before_the_first_step(
    store: Path, tmp_path: Path
) -> None:
    (tmp_path / "snapshots").write_text("mine")
    with pytest.raises(RunError, match="snapshots: has the name of a folder of the run"):
        train(tiny_config(store, tmp_path))
    assert contents(tmp_path) == {".lock": b"", "snapshots": b"mine"}


def test_dropout_is_drawn_anew_for_each_step_and_again_for_a_resumed_one(
    store: Path, tmp_path: Path
) -> None:
    """The seed of torch's generator is read when the next step begins."""
    config = tiny_config(store, tmp_path / "run", "model.dropout=0.3")
    noted: list[tuple[int, int]] = []

    def note(trainer: Trainer, step: int) -> None:
        if step > trainer.first_step:
            noted.append((step - 1, torch.initial_seed()))

    for resume, end in (("never", 7), ("auto", 12)):
        train_until(config, end, resume=resume, before_step=note)
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
        train_until(config, end, resume=resume)
    saved = dict(by_step(tmp_path / "run" / "checkpoints"))
    average = {n: t for n, t in make_model(config).state_dict().items() if t.is_floating_point()}
    for step, path in saved.items():
        tensors, _ = load_checkpoint(path)
        # The decay rises with the number of averaged steps.
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
        train_until(config, 4, before_step=before_step)
        states.append(load_checkpoint(tmp_path / name / "checkpoints" / "step-4")[0])
    assert_same(*states)


def test_the_gap_is_eval_loss_less_train_loss_of_the_same_clips(
    store: Path, straight: Path
) -> None:
    """By the snapshot at the end of an epoch, on the clips of its last step, without dropout."""
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


def test_a_snapshot_has_precise_statistics_and_training_does_not_notice(
    store: Path, straight: Path, tmp_path: Path
) -> None:
    config = tiny_config(store, tmp_path, "model.dropout=0.3", "norm.precise_steps=0")
    train(config)
    plain, precise = (
        [{k: v for k, v in line.items() if not k.startswith(("val/", "norm/"))}
         for line in metrics_of(run)] for run in (tmp_path, straight)
    )  # fmt: skip
    assert plain == precise
    assert metrics_of(tmp_path) != metrics_of(straight)
    assert_same(
        *(load_checkpoint(run / "checkpoints" / "step-16")[0] for run in (tmp_path, straight))
    )
    plain, precise = (
        load_file(run / "snapshots" / "step-12.safetensors") for run in (tmp_path, straight)
    )
    moved = {name for name in plain if not torch.equal(plain[name], precise[name])}
    assert moved == {name for name in plain if name.endswith(("running_mean", "running_var"))}
    expected = with_precise_statistics(config, plain, range(8, 12))
    for name in moved:
        torch.testing.assert_close(precise[name], expected[name])


def test_the_best_checkpoint_is_exported_as_it_was_judged(store: Path, tmp_path: Path) -> None:
    """A resumed training does not continue from the statistics of the validation."""
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
    """The export takes the statistics, over the clips before the checkpoint's step."""
    config = tiny_config(store, straight)
    export_run(straight, tmp_path / "file", step=16)
    tensors, _ = load_checkpoint(straight / "checkpoints" / "step-16")
    weights = {n: tensors[f"model/{n}"] for n in make_model(config).state_dict()}
    expected = with_precise_statistics(config, weights, range(12, 16))
    for name, tensor in load_file(tmp_path / "file").items():
        torch.testing.assert_close(tensor, expected[name])
        if name.endswith("running_mean"):
            assert not torch.equal(tensor, tensors[f"model/{name}"])


def test_a_diverged_run_says_so_before_it_is_saved(store: Path, tmp_path: Path) -> None:
    """The learning rate is higher than a settings file may give."""
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
    assert metrics_of(out)[-1]["val/auc"] > 0.6
