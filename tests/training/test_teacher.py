"""Distillation: the teacher's labels, a run that learns from it and resumes, and wrong teachers."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import losses_of, metrics_of, overrides, refused, said, tiny_config
from scipy.special import expit, logit, softmax
from short_runs import assert_same_run, train_until
from test_trainer import micro_batch

from dist_train.errors import ConfigError, RunError
from dist_train.run.model import make_model
from dist_train.run.record import read_record
from dist_train.run.snapshots import load_snapshot, save_snapshot
from dist_train.targets import Target
from dist_train.training.teacher import Teacher, _check_target, load_teacher, softened
from dist_train.training.train import train

BINARY = Target("binary", ("negative", "positive"))
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def larger(store: Path) -> Path:
    """A run of a larger net, with two snapshots."""
    out = store.parent / "larger"
    train(tiny_config(store, out, "model.width=8", "train.epochs=2", "snapshots.at=[1, 2]"))
    return out


def student(store: Path, out: Path, teacher: Path, *more: str) -> list[str]:
    return overrides(store, out, f"loss.distill.teacher={teacher}", *more)


def loaded(config_of: Path, store: Path, teacher: Path) -> Teacher:
    config = tiny_config(store, config_of, f"loss.distill.teacher={teacher}")
    found = load_teacher(config, BINARY, CPU)
    assert found is not None
    return found


def test_a_mean_probability_is_softened() -> None:
    z = np.random.default_rng(0).normal(size=(3, 5)) * 3
    mean = expit(z).mean(0)
    found = softened(torch.tensor(z), "binary", 2.0)
    np.testing.assert_allclose(found, expit(logit(mean) / 2), rtol=1e-9)
    z3 = np.random.default_rng(0).normal(size=(3, 5, 4)) * 3
    mean3 = softmax(z3, axis=2).mean(0)
    expected = mean3 ** (1 / 2) / (mean3 ** (1 / 2)).sum(1, keepdims=True)
    np.testing.assert_allclose(softened(torch.tensor(z3), "multiclass", 2.0), expected, rtol=1e-9)
    # Of one net the logits are divided.
    found = softened(torch.tensor(z[:1]), "binary", 3.0)
    np.testing.assert_allclose(found, expit(z[0] / 3), rtol=1e-9)


def test_a_run_an_export_and_a_snapshot_teach(store: Path, larger: Path, tmp_path: Path) -> None:
    said("export", larger, "--out", tmp_path / "model.safetensors")
    config = tiny_config(store, tmp_path / "run", "model.width=8", "loss.distill.teacher=none")
    _, x = micro_batch(config, 0)
    probabilities = []
    for step in (6, 12):
        model = make_model(config).eval()
        weights, _ = load_snapshot(larger / f"snapshots/step-{step}.safetensors")
        model.load_state_dict(weights)
        with torch.no_grad():
            probabilities.append(torch.sigmoid(model(x, None)).numpy())
    expected = expit(logit(np.mean(probabilities, axis=0)) / 2)
    for path in (larger, tmp_path / "model.safetensors"):
        teacher = loaded(tmp_path, store, path)
        np.testing.assert_allclose(teacher(x, None), expected, rtol=1e-4)
        assert teacher.origin.networks == 2
    one = loaded(tmp_path, store, larger / "snapshots/step-6.safetensors")
    np.testing.assert_allclose(
        one(x, None), expit(logit(probabilities[0]) / 2), rtol=1e-4, atol=1e-6
    )


def test_a_run_learns_from_it_and_resumes_exactly(
    store: Path, larger: Path, tmp_path: Path
) -> None:
    config = tiny_config(
        store, tmp_path / "run", f"loss.distill.teacher={larger}", "augment.mixup=0.5",
        "augment.cutmix=0.4", "train.probe=always", "train.epochs=2", "snapshots.at=[2]",
    )  # fmt: skip
    train(config)
    losses = losses_of(tmp_path / "run")
    assert np.mean(losses[-3:]) < 0.9 * np.mean(losses[:3])
    assert read_record(tmp_path / "run")["teacher"]["path"] == str(larger.resolve())
    again = config.model_copy(update={"out": tmp_path / "again"})
    train_until(again, 5)
    train(again, resume="auto")
    assert_same_run(tmp_path / "again", tmp_path / "run")


def test_the_first_loss_is_the_formula(store: Path, larger: Path, tmp_path: Path) -> None:
    more = ("loss.distill.weight=0.3", "loss.distill.temperature=3")
    config = tiny_config(store, tmp_path / "run", f"loss.distill.teacher={larger}", *more)
    train_until(config, 1)
    batch, x = micro_batch(config, 0)
    teacher = load_teacher(config, BINARY, CPU)
    assert teacher is not None
    with torch.no_grad():
        z = make_model(config).train()(x, batch.frames).numpy()
    soft, y = teacher(x, batch.frames).numpy(), batch.labels.numpy()

    def bce(z: np.ndarray, y: np.ndarray) -> float:
        return float((np.logaddexp(0, -z) * y + np.logaddexp(0, z) * (1 - y)).mean())

    expected = 0.7 * bce(z, y) + 0.3 * 9 * bce(z / 3, soft)
    assert metrics_of(tmp_path / "run")[0]["train/loss"] == pytest.approx(expected, rel=1e-5)


def test_a_wrong_teacher_is_refused_before_the_first_step(
    store: Path, larger: Path, tmp_path: Path
) -> None:
    def message(teacher: Path) -> str:
        return refused("train", *student(store, tmp_path / "run", teacher))

    (tmp_path / "empty").mkdir()
    assert "there are no snapshots here" in message(tmp_path / "empty")
    (tmp_path / "text.safetensors").write_text("text")
    assert "it is no run, snapshot or export" in message(tmp_path / "text.safetensors")
    assert "it is no run, snapshot or export" in message(tmp_path / "absent")
    snapshot = larger / "snapshots/step-6.safetensors"
    for key, value, words in (
        ("channels", ["a", "b"], "its channels are a, b, and the store's are grey"),
        ("width", 4, "it is no run, snapshot or export"),
    ):
        weights, facts = load_snapshot(snapshot)
        facts["model"][key] = value
        save_snapshot(tmp_path / f"{key}.safetensors", weights, facts)
        assert words in message(tmp_path / f"{key}.safetensors")
    assert not (tmp_path / "run").exists()
    config = tiny_config(store, tmp_path / "run", f"loss.distill.teacher={snapshot}")
    with pytest.raises(ConfigError, match="it has 1 outputs, and the target needs 3"):
        load_teacher(config, Target("multiclass", ("a", "b", "c")), CPU)


def test_a_changed_teacher_ends_a_resumption(store: Path, larger: Path, tmp_path: Path) -> None:
    teacher = shutil.copytree(larger, tmp_path / "teacher")
    config = tiny_config(store, tmp_path / "run", f"loss.distill.teacher={teacher}")
    train_until(config, 5)
    (teacher / "snapshots/step-6.safetensors").unlink()
    with pytest.raises(RunError, match="the teacher has changed since the run began"):
        train(config, resume="auto")


def test_a_teacher_of_another_target_is_refused() -> None:
    ordinal = {"kind": "ordinal", "classes": ["a", "b", "c", "d"]}
    turned = {"kind": "multiclass", "classes": ["c", "b", "a"]}
    for settings in (ordinal, turned, {}):
        with pytest.raises(ConfigError, match="and this one is multiclass"):
            _check_target(Path("run"), settings, Target("multiclass", ("a", "b", "c")))
    _check_target(Path("run"), {}, Target("binary", ("flowing", "stalled")))
