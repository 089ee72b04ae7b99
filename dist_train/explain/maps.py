"""The maps of some clips, and what each frame adds: means over a run's snapshots.

Everything is computed in float32, and for each clip alone, so that no padding takes part.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from dist_train.config import Config
from dist_train.data.loading.collate import collate
from dist_train.data.loading.sampler import Slot
from dist_train.distributed.out_of_memory import is_out_of_memory
from dist_train.errors import RunError
from dist_train.explain.choose import Chosen
from dist_train.explain.grad_cam import grad_cam
from dist_train.explain.gradients import TOLERANCE, integrated_gradients
from dist_train.explain.occlusion import hidden_frames, hidden_places
from dist_train.explain.score import score, scores_by_class
from dist_train.run.data import RunData, clip_dataset
from dist_train.run.model import as_input, make_model
from dist_train.run.snapshots import load_into
from dist_train.system.advice import first_line
from dist_train.targets import Target

log = logging.getLogger(__name__)

Method = Literal["grad-cam", "integrated-gradients", "occlusion"]


@dataclass
class ClipMap:
    """What is found of a clip.

    Attributes:
        pixels: the clip as the model sees it, float32 [1, C, D, H, W] of 0 to 1, on the host.
        scores: probabilities or values, float64 [classes].
        of: place in ``Target.classes`` of what is explained.
        found: the map, float32 [D, H, W]; of grad-cam not negative. One of occlusion is the same in
            all frames.
        fall: by how much the probability, or value, falls with each frame, float64 [D].
        gap: of integrated gradients, the part of the score's change that the map lacks in the worst
            snapshot.
    """

    chosen: Chosen
    pixels: Tensor
    scores: Any = 0.0
    of: int = 0
    found: Any = 0.0
    fall: Any = 0.0
    gap: float | None = None


def find_maps(
    config: Config,
    record: Mapping[str, Any],
    data: RunData,
    snapshots: Sequence[Path],
    chosen: Sequence[Chosen],
    method: Method,
    device: torch.device,
    told: Callable[[int, int], None],
) -> list[ClipMap]:
    """The maps of the chosen clips, in their order.

    Args:
        record: the content of the run's ``run.json``.
        told: called with (maps done, maps in all) over all snapshots.

    Raises:
        RunError: a snapshot does not fit the run, or gives an output or a gradient that is not
            finite; or memory does not suffice for a single clip.
        ModelError: the model has no layer for grad-cam.
        StoreError: a clip is not there, or cannot be read.
    """
    dataset = clip_dataset(config, data.store, augment=None)
    clips = [
        ClipMap(one, as_input(collate(dataset, [Slot(number, 0)]).volumes, config))
        for one in chosen
        for number in [data.store.clip_of(one.key)]
    ]
    work = _Work(config, record, data.target, method, device)
    work.predict(snapshots, clips)
    work.explain(snapshots, clips, told)
    _warn_of_gaps(clips)
    return clips


class _Work:
    """The run's model, with the weights of one snapshot at a time."""

    def __init__(
        self,
        config: Config,
        record: Mapping[str, Any],
        target: Target,
        method: Method,
        device: torch.device,
    ) -> None:
        self._config, self._record, self._device = config, record, device
        self._target, self._method = target, method
        # Gradients of weights would take as much memory as the weights.
        self._model = make_model(config).to(device).eval().requires_grad_(False)
        self._snapshot = Path()

    def predict(self, snapshots: Sequence[Path], clips: Sequence[ClipMap]) -> None:
        """Fill in ``scores`` and ``of``."""
        for _ in self._each(snapshots):
            for clip in clips:
                with _enough_memory(gradients=False), torch.no_grad():
                    clip.scores += self._scores(clip.pixels.to(self._device)) / len(snapshots)
        for clip in clips:
            likeliest = 0 if self._target.kind == "regression" else int(clip.scores.argmax())
            clip.of = likeliest if clip.chosen.of is None else clip.chosen.of

    def explain(
        self, snapshots: Sequence[Path], clips: Sequence[ClipMap], told: Callable[[int, int], None]
    ) -> None:
        """Fill in ``found``, ``fall`` and ``gap``."""
        done, parts = 0, len(snapshots)
        for _ in self._each(snapshots):
            for clip in clips:
                with (
                    _enough_memory(gradients=self._method != "occlusion"),
                    _rnn_gradients(self._model),
                ):
                    found, fall, gap = self._map(clip)
                clip.found, clip.fall = clip.found + found / parts, clip.fall + fall / parts
                if gap is not None:
                    clip.gap = max(gap, clip.gap or 0.0)
                done += 1
                told(done, parts * len(clips))

    def _each(self, snapshots: Sequence[Path]) -> Iterator[None]:
        for self._snapshot in snapshots:
            load_into(self._model, self._snapshot, self._config, self._record)
            yield

    def _map(self, clip: ClipMap) -> tuple[np.ndarray, np.ndarray, float | None]:
        pixels, of = clip.pixels.to(self._device), clip.of
        with torch.no_grad():
            before = self._scores(pixels)[of]

        fall, gap = hidden_frames(pixels, lambda x: float(before - self._scores(x)[of])), None
        logits = partial(score, self._target, of=of)
        if self._method == "occlusion":
            with torch.no_grad():
                whole = logits(self._outputs(pixels))
                places = hidden_places(pixels, lambda x: float(whole - logits(self._outputs(x))))
            return np.repeat(places.astype(np.float32)[None], len(fall), axis=0), fall, None
        if self._method == "grad-cam":
            found = grad_cam(self._model, pixels, logits)
        else:
            found, gap = integrated_gradients(self._model, pixels, logits)
        if not (bool(found.isfinite().all()) and math.isfinite(gap or 0.0)):
            raise RunError(
                f"the gradients of clip '{clip.chosen.key}' are not finite",
                where=self._snapshot,
                fix="Take --method occlusion, which needs none.",
            )
        return found.detach().cpu().numpy(), fall, gap

    def _scores(self, pixels: Tensor) -> np.ndarray:
        """Probabilities or values of one clip, float64 [classes]."""
        logits = self._outputs(pixels).float().cpu().numpy()
        scores: np.ndarray = scores_by_class(self._target, logits)[0]
        return scores

    def _outputs(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self._model(pixels, None)
        if not logits.isfinite().all():
            raise RunError(
                "the snapshot gives outputs that are not finite",
                where=self._snapshot,
                fix="Move the file away.",
            )
        return logits


@contextmanager
def _enough_memory(*, gradients: bool) -> Iterator[None]:
    reason = None
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        reason = first_line(error)
    if reason is not None:
        other = "--method occlusion, which needs no gradients, or " if gradients else ""
        raise RunError(
            f"memory does not suffice to explain a single clip ({reason})",
            fix=f"Take {other}a device with more memory.",
        )


@contextmanager
def _rnn_gradients(model: nn.Module) -> Iterator[None]:
    """cuDNN's LSTM has no gradient in eval mode; torch's own has."""
    before = torch.backends.cudnn.enabled
    if any(isinstance(module, nn.RNNBase) for module in model.modules()):
        torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = before


def _warn_of_gaps(clips: Sequence[ClipMap]) -> None:
    worst = max((clip.gap or 0.0 for clip in clips), default=0.0)
    if worst > TOLERANCE:
        log.warning(
            "integrated gradients lack up to %.0f %% of the change that they explain: the model's "
            "output bends too sharply for them",
            100 * worst,
        )  # fmt: skip
