"""Logits and labels of an epoch's training batches, for the epoch's metrics."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dist_train.distributed.backends.base import Backend


class EpochPredictions:
    """Predictions for this rank's clips, in the order of the steps.

    They are kept on the device, as a copy to the host would wait for the device.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._kept: list[tuple[Tensor, Tensor]] = []

    def __len__(self) -> int:
        """Number of batches added."""
        return len(self._kept)

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch of logits and labels; ``labels`` may be changed afterwards."""
        # Labels are copied, or they would hold the loader's memory for an epoch.
        self._kept.append((logits.detach().float(), labels.clone()))

    def cut(self, length: int) -> None:
        """Drop all but the first ``length`` batches."""
        del self._kept[length:]

    def begin(self, logits: np.ndarray, labels: np.ndarray) -> None:
        """Start with the predictions of an interrupted epoch, float32, on one rank."""
        device = self._backend.device
        self._kept = [(torch.from_numpy(logits).to(device), torch.from_numpy(labels).to(device))]

    def gathered(self) -> tuple[np.ndarray, np.ndarray]:
        """Return logits and labels of all ranks, float32, N each. A collective call."""
        batches = self._kept or [(torch.empty(0), torch.empty(0))]
        logits, labels = (torch.cat(column).cpu().numpy() for column in zip(*batches, strict=True))
        return gather_pairs(self._backend, (logits, labels))


def gather_pairs(
    backend: Backend, own: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Concatenate two arrays of each rank in rank order. A collective call.

    An empty array may lack axes that the others have.
    """
    first, second = zip(*backend.gather(own), strict=True)
    return _joined(first), _joined(second)


def _joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([array for array in arrays if len(array)] or arrays[:1])
