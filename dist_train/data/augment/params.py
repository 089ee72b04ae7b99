"""The augmentation parameters of one clip, drawn by albumentations.

A draw is keyed by (seed, epoch, clip), never by worker or rank. ``cpu.py`` and ``gpu.py`` apply it.
"""

from __future__ import annotations

import os
import random
from typing import Any

# Keeps albumentations from looking for a newer version over the network on import.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import albumentations as A
import numpy as np

from dist_train.config import AugmentSettings
from dist_train.data.augment.draw import Draw
from dist_train.data.orientation import IDENTITY


class AugmentSampler:
    """Draws the augmentation of clips, with the transforms of the original recipe.

    Args:
        settings: the probability of each transform.
        seed: the run's seed.
    """

    def __init__(self, settings: AugmentSettings, seed: int) -> None:
        s = settings
        shift, scale, angle = (-0.06, 0.06), (0.9, 1.1), (-45, 45)
        # Moves pixels by one or two; the library's default by less than a tenth.
        elastic = A.ElasticTransform(alpha=60, sigma=6)
        contrast = A.RandomBrightnessContrast(p=0.8)
        # A standard deviation of 3 to 7 grey levels. The library's default, 51 to 112, would hide
        # the cells.
        noise = A.GaussNoise(std_range=(3 / 255, 7 / 255))
        steps = [
            A.HorizontalFlip(p=s.flip),
            A.VerticalFlip(p=s.flip),
            A.RandomRotate90(p=s.rotate90),
            A.Affine(translate_percent=shift, scale=scale, rotate=angle, p=s.shift_scale_rotate),
            A.OneOf([elastic, A.GridDistortion(), A.OpticalDistortion()], p=s.distort),
            A.Compose([contrast, A.RandomGamma(p=0.5)], p=s.brightness),
            A.OneOf([A.GaussianBlur(), noise], p=s.blur_noise),
        ]
        used = [transform for transform in steps if transform.p > 0]
        #: albumentations' pipeline, without the reversal; None if it would be empty.
        self.transform = A.Compose(used, save_applied_params=True) if used else None
        self.reverse = s.reverse
        self.seed = seed

    def __call__(self, size: tuple[int, int], *, epoch: int, number: int) -> Draw:
        """The draw for clip ``number`` in an epoch, for frames of ``size`` (height, width)."""
        key = np.random.SeedSequence((self.seed, epoch, number))
        numbers, choices, reversal = (int(word) for word in key.generate_state(3))
        applied: list[tuple[str, dict[str, Any]]] = []
        if self.transform is not None:
            # set_random_seed would give every transform the same seed, so that flips and quarter
            # turns were correlated.
            self.transform.set_random_state(np.random.default_rng(numbers), random.Random(choices))
            # Draws depend on a clip's size and dtype only, so one black frame is enough. It is
            # passed as images [D, H, W, 1], as albumentations' GaussNoise cannot take a volume.
            applied = self.transform(images=np.zeros((1, *size, 1), np.uint8))["applied_transforms"]
        is_reversed = np.random.default_rng(reversal).random() < self.reverse
        return _as_draw(applied, bool(is_reversed))


def _as_draw(applied: list[tuple[str, dict[str, Any]]], is_reversed: bool) -> Draw:
    """The draw of the transforms that albumentations applied: (name, parameters) of each."""
    orientation, pictures, changes = IDENTITY, [], dict[str, Any](is_reversed=is_reversed)
    for name, drawn in applied:
        match name:
            case "HorizontalFlip":
                orientation = orientation.flipped(columns=True)
            case "VerticalFlip":
                orientation = orientation.flipped(rows=True)
            case "RandomRotate90":
                orientation = orientation.turned(drawn["factor"])
            case "Affine":
                changes |= {"affine": drawn["matrix"][:2]}
            case "ElasticTransform" | "GridDistortion" | "OpticalDistortion":
                changes |= {"is_displaced": True}
                pictures += [drawn["map_x"], drawn["map_y"]]
            case "RandomBrightnessContrast":
                changes |= {"contrast": drawn["alpha"], "brightness": drawn["beta"]}
            case "RandomGamma":
                changes |= {"gamma": drawn["gamma"]}
            case "GaussianBlur":
                changes |= {"kernel": drawn["kernel"]}
            case "GaussNoise":
                changes |= {"is_noisy": True}
                pictures.append(drawn["noise_map"][..., 0])
            case _:
                raise AssertionError(f"{name} was drawn, but cannot be applied")
    if pictures:
        changes |= {"pictures": np.stack(pictures, dtype=np.float32)}
    return Draw(orientation, **changes)
