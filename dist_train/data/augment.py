"""Augmentation of whole clips by albumentations: one draw for all frames of a clip.

The draw is keyed by (seed, epoch, clip), never by the worker or rank that makes it.
"""

from __future__ import annotations

import os

# Asked of albumentations before its import: no network call to look for a newer version.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import albumentations as A
import cv2
import numpy as np

from dist_train.config import AugmentSettings
from dist_train.data.decode import Volume


class Augment:
    """Callable on uint8 [D, H, W]; gives an array of the same shape and dtype (H = W if rotated).

    The list is that of the original recipe: flips, quarter turns, brightness, contrast and gamma,
    blur and noise, elastic, grid and optical distortion, shift-scale-rotate, reversal in depth.
    """

    def __init__(self, settings: AugmentSettings, seed: int) -> None:
        s = settings
        steps = [
            (s.flip, A.HorizontalFlip(p=s.flip)),
            (s.flip, A.VerticalFlip(p=s.flip)),
            (s.rotate90, A.RandomRotate90(p=s.rotate90)),
            (
                s.shift_scale_rotate,
                A.Affine(
                    translate_percent=(-0.06, 0.06),
                    scale=(0.9, 1.1),
                    rotate=(-45, 45),
                    p=s.shift_scale_rotate,
                ),
            ),
            (
                s.distort,
                A.OneOf(
                    [A.ElasticTransform(), A.GridDistortion(), A.OpticalDistortion()], p=s.distort
                ),
            ),
            (
                s.brightness,
                A.Compose(
                    [A.RandomBrightnessContrast(p=0.8), A.RandomGamma(p=0.5)], p=s.brightness
                ),
            ),
            (s.blur_noise, A.OneOf([A.GaussianBlur(), A.GaussNoise()], p=s.blur_noise)),
        ]
        used = [transform for probability, transform in steps if probability > 0]
        self.transform = A.Compose(used) if used else None
        self.reverse = s.reverse
        self.seed = seed

    def __call__(self, clip: Volume, *, epoch: int, number: int) -> Volume:
        # Parallelism is over clips, in processes.
        cv2.setNumThreads(1)
        draw = np.random.SeedSequence((self.seed, epoch, number))
        first, second = draw.generate_state(2)
        if self.transform is not None:
            self.transform.set_random_seed(int(first))
            clip = self.transform(volume=clip)["volume"]
        if np.random.default_rng(second).random() < self.reverse:
            clip = clip[::-1]
        return clip
