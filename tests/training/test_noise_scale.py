"""The gradient noise scale, against gradients whose noise is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import cut, metrics_of, tiny_config
from short_runs import assert_same_run, train_until
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from dist_train.config import Config, load_config
from dist_train.data.loading.collate import collate
from dist_train.data.loading.sampler import Slot
from dist_train.errors import ConfigError
from dist_train.run.data import open_data
from dist_train.run.model import as_input, make_model
from dist_train.training import noise_scale
from dist_train.training.noise_scale import NoiseScale
from dist_train.training.train import train

FEW, MANY = 4, 32


def test_it_is_the_variance_of_the_gradient_over_its_square(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Gradients of clips are normal with mean G and covariance C: the scale is tr(C) / |G|^2.

    The mean of all steps shows that both terms are unbiased: one step says little.
    """
    monkeypatch.setattr(noise_scale, "DECAY", 1 - 1e-9)
    generator = np.random.default_rng(0)
    mean, deviation = generator.normal(size=20), generator.uniform(0.5, 3.0, size=20)
    estimate, found = NoiseScale(), None
    for _ in range(20_000):
        clips = mean + deviation * generator.normal(size=(MANY, 20))
        small, large = (np.square(part.mean(0)).sum() for part in (clips[:FEW], clips))
        found = estimate.update((FEW, float(small)), (MANY, float(large)))
    assert found == pytest.approx(np.square(deviation).sum() / np.square(mean).sum(), rel=0.02)


def test_it_has_no_value_without_a_signal() -> None:
    """Equal norms are all signal; the estimate of the signal may be negative."""
    estimate = NoiseScale()
    assert estimate.update((FEW, 9.0), (MANY, 1.0)) is None
    for _ in range(500):
        found = estimate.update((FEW, 1.0), (MANY, 1.0))
    assert found == pytest.approx(0.0, abs=1e-6)


def test_a_resumed_run_logs_the_same_and_trains_as_without(store: Path, tmp_path: Path) -> None:
    run, plain = tmp_path / "run", tmp_path / "plain"
    more = ("train.accumulate=2", "checkpoint.keep_last=9", "train.epochs=2", "snapshots.at=[2]")
    train(tiny_config(store, run, *more, "train.noise_scale=true"))
    train(tiny_config(store, plain, *more))
    scales = [line.pop("train/noise_scale") for line in metrics_of(run)]
    assert len([scale for scale in scales if scale is not None]) > len(scales) / 2
    assert len(set(scales)) == len(scales)
    without = [{k: v for k, v in line.items() if "noise" not in k} for line in metrics_of(run)]
    assert without == metrics_of(plain)
    resumed = cut(run, tmp_path / "resumed", after=4)
    train(load_config(resumed / "config.yaml", [f"out={resumed}"]), resume="auto")
    assert_same_run(resumed, run)


def test_the_first_micro_batch_has_the_norm_that_it_alone_would_have(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against autograd on the first micro-batch of the first step."""
    seen: list[tuple[tuple[float, float], tuple[float, float]]] = []
    monkeypatch.setattr(NoiseScale, "update", lambda _, *pair: seen.append(pair))
    config = tiny_config(
        store,
        tmp_path / "run",
        "train.accumulate=2",
        "train.noise_scale=true",
        "optim.clip_norm=null",
    )
    train_until(config, 1)
    ((clips, squared), (all_clips, of_step)), *_ = seen
    assert (clips, all_clips) == (4, 8)
    halves = [gradient(config, part) for part in (slice(0, 4), slice(4, 8))]
    assert squared == pytest.approx(float(halves[0].square().sum()), rel=1e-4)
    mean = (halves[0] + halves[1]) / 2
    assert of_step == pytest.approx(float(mean.square().sum()), rel=1e-4)


def gradient(config: Config, part: slice) -> Tensor:
    """The gradient of the mean loss of some clips of the first step, flat."""
    data = open_data(config)
    clips = data.plan().global_batch(0)[part]
    batch = collate(data.dataset(training=True), [Slot(int(clip), 0) for clip in clips])
    model = make_model(config).train()
    logits = model(as_input(batch.volumes, config), batch.frames)
    binary_cross_entropy_with_logits(logits, batch.labels).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["train.accumulate=1"], "set accumulate to 2 or more"),
        (["train.accumulate=2", "train.backend=fsdp2"], "works under backend: ddp only"),
        (["train.accumulate=2", "train.precision=fp16"], "in bf16 or fp32"),
    ],
)
def test_what_it_cannot_measure_is_refused(
    store: Path, tmp_path: Path, more: list[str], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        tiny_config(store, tmp_path / "run", "train.noise_scale=true", *more)
