"""Logits and labels of an epoch's training batches, which its metrics need at its end."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dist_train.engine.backends.base import Backend


class EpochOutputs:
    """Of this rank's clips, in the order of the steps; kept on the device, as a copy to the host
    would wait for it."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._kept: list[tuple[Tensor, Tensor]] = []

    def __len__(self) -> int:
        """Number of batches added, for ``cut``."""
        return len(self._kept)

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Of a batch, [B] each; labels may be changed afterwards."""
        # Labels are copied, or they would hold the loader's memory for an epoch.
        self._kept.append((logits.detach().float(), labels.clone()))

    def cut(self, length: int) -> None:
        """Forget what was added beyond the first ``length`` batches."""
        del self._kept[length:]

    def begin(self, logits: np.ndarray, labels: np.ndarray) -> None:
        """Begin with those of an epoch that is gone on with, float32 [N] on one rank."""
        device = self._backend.device
        self._kept = [(torch.from_numpy(logits).to(device), torch.from_numpy(labels).to(device))]

    def gathered(self) -> tuple[np.ndarray, np.ndarray]:
        """Logits and labels of all ranks, float32 [N]. A collective call."""
        outputs = self._kept or [(torch.empty(0), torch.empty(0))]
        logits, labels = (torch.cat(column).cpu().numpy() for column in zip(*outputs, strict=True))
        return joined(self._backend, (logits, labels))


def joined(backend: Backend, mine: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Two arrays of each rank, joined in rank order. A collective call."""
    first, second = zip(*backend.gather(mine), strict=True)
    return np.concatenate(first), np.concatenate(second)
