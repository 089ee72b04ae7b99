"""What ``export`` wrote, read back: probabilities of clips by the file alone, without its run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dist_train.errors import RunError
from dist_train.evaluation.calibration import Calibration
from dist_train.files import reason_of
from dist_train.run.model import as_unit, model_of
from dist_train.run.snapshots import load_snapshot


class Ensemble(nn.Module):
    """Several networks of one form, whose probabilities are averaged."""

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, volumes: Tensor, frames: Tensor | None) -> tuple[Tensor, Tensor]:
        """Of float32 [B, C, D, H, W] of 0 to 1 with ``frames`` real ones each, int64 [B]: the mean
        probability, [B], and the logits, a column for each network, [B, networks]."""
        logits = torch.stack([model(volumes, frames) for model in self.models], dim=1)
        return torch.sigmoid(logits).mean(dim=1), logits


class ExportedModel:
    """The model of an exported safetensors file, in eval mode, and its facts (``export_run``)."""

    def __init__(self, model: Ensemble, facts: dict[str, Any]) -> None:
        self.model, self.facts = model.eval(), facts
        stored = facts["calibration"]
        self._calibration = None if stored is None else Calibration.model_validate(stored)

    @torch.no_grad()
    def probability(self, volumes: Tensor, frames: Tensor | None = None) -> np.ndarray:
        """As ``probability`` of predictions.csv: float64 [B].

        Args:
            volumes: uint8, uint16 or float16 [B, C, D, H, W], with the H and W of
                ``facts["clip"]["size"]``, prepared as ``facts["preprocessing"]`` says, but for the
                scale, which is applied here.
            frames: int64 [B], real frames of each clip; None where all have D.
        """
        _, logits = self.model(as_unit(volumes), frames)
        return torch.sigmoid(logits.double()).mean(dim=1).numpy()

    def calibrated(self, probability: np.ndarray) -> np.ndarray:
        """As ``calibrated`` of predictions.csv, of ``probability``.

        Raises:
            RunError: the run had no predictions when it was exported, so nothing was fitted.
        """
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
        models = []
        for prefix in facts["networks"]:
            model = model_of(facts["model"])
            model.load_state_dict(
                {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
            )
            models.append(model)
        return ExportedModel(Ensemble(models), facts)
    except (RunError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"this is no model that 'dist-train export' wrote ({reason_of(error)})",
            where=path,
            fix="Export it again.",
        ) from None
