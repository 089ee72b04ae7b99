"""Logits of held-out clips."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor, nn

from dist_train.config import Config
from dist_train.data.collate import Batch
from dist_train.run import as_input


@torch.no_grad()
def held_out_logits(
    model: nn.Module,
    batches: Iterable[Batch],
    config: Config,
    device: torch.device,
    done: Callable[[int], None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Clip numbers int64 [N] and logits float32 [N], in the order of the batches.

    The model is put in eval mode, and back into the mode it was in. ``done`` is called with the
    number of clips of each finished batch.
    """
    clips: list[Tensor] = [torch.empty(0, dtype=torch.int64)]
    logits: list[Tensor] = [torch.empty(0)]
    training = model.training
    model.eval()
    for batch in batches:
        moved = batch.to(device)
        logits.append(model(as_input(moved.volumes, config), moved.frames).float().cpu())
        clips.append(batch.clips)
        if done is not None:
            done(len(batch.clips))
    model.train(training)
    return torch.cat(clips).numpy(), torch.cat(logits).numpy()
