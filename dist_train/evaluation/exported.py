"""What ``export`` wrote, read back: scores of clips by the file alone, without its run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dist_train.config import TargetSettings
from dist_train.errors import RunError
from dist_train.evaluation.class_calibration import CALIBRATIONS
from dist_train.files import reason_of
from dist_train.run.model import as_unit, model_of, target_of
from dist_train.run.snapshots import load_snapshot
from dist_train.targets import Target

BINARY = Target()


class Ensemble(nn.Module):
    """Several networks of one form, whose scores are averaged."""

    def __init__(self, models: Sequence[nn.Module], target: Target = BINARY) -> None:
        super().__init__()
        self.models, self.target = nn.ModuleList(models), target

    def forward(self, volumes: Tensor, frames: Tensor | None) -> tuple[Tensor, Tensor]:
        """Of float32 [B, C, D, H, W] of 0 to 1 with ``frames`` real ones each, int64 [B]: the mean
        scores as ``Target.scores``, [B] or [B, K], and the logits, [B, networks] or
        [B, networks, outputs]."""
        logits = torch.stack([model(volumes, frames) for model in self.models], dim=1)
        return self.mean_scores(logits), logits

    def mean_scores(self, logits: Tensor) -> Tensor:
        """The mean over the networks of ``Target.scores`` of their logits, of the same dtype."""
        target = self.target
        if target.kind == "multiclass":
            return logits.softmax(dim=2).mean(dim=1)
        if target.kind == "regression":
            values = logits.reshape(*logits.shape[:2], len(target.classes))
            center, scale = (logits.new_tensor(of) for of in (target.center, target.scale))
            return (values * scale + center).mean(dim=1)
        scores = torch.sigmoid(logits)
        return (_of_cumulative(scores) if target.kind == "ordinal" else scores).mean(dim=1)


def _of_cumulative(above: Tensor) -> Tensor:
    """As ``targets._of_cumulative``, of [B, networks, K-1]; ONNX has no cumulative minimum."""
    falling = [torch.ones_like(above[..., 0])]
    for k in range(above.shape[2]):
        falling.append(torch.minimum(falling[-1], above[..., k]))
    falling.append(torch.zeros_like(falling[0]))
    edges = torch.stack(falling, dim=2)
    return edges[..., :-1] - edges[..., 1:]


class ExportedModel:
    """The model of an exported safetensors file, in eval mode, and its facts (``export_run``)."""

    def __init__(self, model: Ensemble, facts: dict[str, Any]) -> None:
        self.model, self.facts = model.eval(), facts
        stored, kind = facts["calibration"], model.target.kind
        self._calibration = None if stored is None else CALIBRATIONS[kind].model_validate(stored)

    @property
    def target(self) -> Target:
        return self.model.target

    @torch.no_grad()
    def probability(self, volumes: Tensor, frames: Tensor | None = None) -> np.ndarray:
        """As ``probability`` of predictions.csv, float64 [B], or as its columns of classes or
        labels, [B, K]; of regression as its columns ``value``, [B, V].

        Args:
            volumes: uint8, uint16 or float16 [B, C, D, H, W], with the H and W of
                ``facts["clip"]["size"]``, prepared as ``facts["preprocessing"]`` says, but for the
                scale, which is applied here.
            frames: int64 [B], real frames of each clip; None where all have D.
        """
        _, logits = self.model(as_unit(volumes), frames)
        return self.model.mean_scores(logits.double()).numpy()

    def calibrated(self, probability: np.ndarray) -> np.ndarray:
        """As ``calibrated`` of predictions.csv, of ``probability``.

        Raises:
            RunError: the run had no predictions when it was exported, so nothing was fitted; or the
                target is regression.
        """
        if self.target.kind == "regression":
            raise RunError("values of regression have no calibration")
        if self._calibration is None:
            raise RunError(
                "the exported file has no calibration",
                fix="Run 'dist-train predict' on its run, and export it again.",
            )
        return self._calibration.apply(probability)


def load_exported(path: Path) -> ExportedModel:
    """Read a safetensors file that ``export`` wrote.

    Raises:
        RunError: it is missing, damaged, or of another kind.
    """
    try:
        tensors, facts = load_snapshot(path)
        models, settings = [], TargetSettings.model_validate(facts.get("target", {}))
        for prefix in facts["networks"]:
            model = model_of(facts["model"])
            model.load_state_dict(
                {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
            )
            models.append(model)
        return ExportedModel(Ensemble(models, target_of(settings)), facts)
    except (RunError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"this is no model that 'dist-train export' wrote ({reason_of(error)})",
            where=path,
            fix="Export it again.",
        ) from None
