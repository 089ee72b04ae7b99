"""What a micro-batch is trained on: its clips on the device, their labels, and what else the loss
needs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dist_train.config import Config
from dist_train.data.augment.mix import MixSampler, mix, mixed, whole_group
from dist_train.data.loading.collate import Batch
from dist_train.run.data import RunData
from dist_train.run.model import as_input
from dist_train.training.class_rates import ClassRates
from dist_train.training.crowd_scores import CrowdScores
from dist_train.training.label_forms import as_scores
from dist_train.training.teacher import Teacher


class Inputs(NamedTuple):
    """The arguments of both passes.

    Attributes:
        x: float32 [B, C, D, H, W].
        labels: classes, or scores of ``label_forms``.
        extras: further arguments of the training loss, [B] or [B, outputs] each.
    """

    x: Tensor
    labels: Tensor
    extras: dict[str, Tensor]


class MakeInputs:
    """Makes ``Inputs`` of batches on the device. By default they are the batch itself.

    Args:
        group: clips of a group of the plan. Batches are multiples of ``whole_group`` of it.
        teacher: on the device; None without one.

    Attributes:
        crowd: the crowd scores, if they are used.

    Raises:
        ConfigError: clips have no crowd scores.
    """

    def __init__(
        self,
        data: RunData,
        rates: ClassRates,
        *,
        group: int,
        teacher: Teacher | None,
    ) -> None:
        config, target = data.config, data.target
        self._target, self._teacher = target, teacher
        augment, loss = config.augment, config.loss
        self._group = whole_group(augment, group)
        is_mixed = augment.mixup + augment.cutmix > 0
        self._mix = MixSampler(augment, config.seed) if is_mixed else None
        uses_crowd = loss.soft_labels is not None or loss.sureness != "none"
        self.crowd = CrowdScores(data, rates) if uses_crowd else None

    def __call__(self, batch: Batch, config: Config, step: int) -> Inputs:
        """Args: config: the settings of the step."""
        x, labels = as_input(batch.volumes, config), batch.labels
        weights: Tensor | None = None
        if self.crowd is not None:
            clips = batch.clips.numpy()
            labels = _to(torch.from_numpy(self.crowd.labels(clips)), x.device)
            if (sureness := self.crowd.weights(clips)) is not None:
                weights = _to(torch.from_numpy(sureness), x.device)
        if self._mix is not None:
            labels = as_scores(labels, self._target.kind, self._target.outputs)
            partners, shares = self._mixed(x, batch, step)
            labels = mixed(labels, partners, shares)
            weights = None if weights is None else mixed(weights, partners, shares)
        extras = {} if weights is None else {"clip_weights": weights}
        if self._teacher is not None:
            extras["teacher"] = self._teacher(x, batch.frames)
        return Inputs(x, labels, extras)

    def _mixed(self, x: Tensor, batch: Batch, step: int) -> tuple[Tensor, Tensor]:
        assert self._mix is not None
        clips = batch.clips.tolist()
        groups = [clips[at : at + self._group] for at in range(0, len(clips), self._group)]
        draws = [self._mix(group, step=step) for group in groups]
        depths = [x.shape[2]] * len(clips) if batch.frames is None else batch.frames.tolist()
        partners, shares = mix(x, depths, draws)
        return _to(partners, x.device), _to(shares, x.device)


def _to(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device, non_blocking=True)
