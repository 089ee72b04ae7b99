"""Augmentation of whole clips by albumentations: one draw for all frames of a clip.

The draw is keyed by (seed, epoch, clip), never by the worker or rank that makes it.
"""

from __future__ import annotations

import os
import random

# Asked of albumentations before its import: no network call to look for a newer version.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import albumentations as A
import numpy as np

from dist_train.config import AugmentSettings
from dist_train.data.decode import Volume


class Augment:
    """Callable on uint8 [D, H, W]; gives an array of the same shape and dtype (H = W if rotated).

    The list is that of the original recipe: flips, quarter turns, brightness, contrast and gamma,
    blur and noise, elastic, grid and optical distortion, shift-scale-rotate, reversal in depth.
    The noise too is one picture of noise, laid over every frame.
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
                    # The library's own default moves no pixel by a tenth; this one, by one or two.
                    [
                        A.ElasticTransform(alpha=60, sigma=6),
                        A.GridDistortion(),
                        A.OpticalDistortion(),
                    ],
                    p=s.distort,
                ),
            ),
            (
                s.brightness,
                A.Compose(
                    [A.RandomBrightnessContrast(p=0.8), A.RandomGamma(p=0.5)], p=s.brightness
                ),
            ),
            (
                s.blur_noise,
                # A standard deviation of 3 to 7 grey levels; the library's default of 51 to 112
                # would bury the cells.
                A.OneOf(
                    [A.GaussianBlur(), A.GaussNoise(std_range=(3 / 255, 7 / 255))], p=s.blur_noise
                ),
            ),
        ]
        used = [transform for probability, transform in steps if probability > 0]
        self.transform = A.Compose(used) if used else None
        self.reverse = s.reverse
        self.seed = seed

    def __call__(self, clip: Volume, *, epoch: int, number: int) -> Volume:
        draw = np.random.SeedSequence((self.seed, epoch, number))
        numbers, choices, reversal = (int(word) for word in draw.generate_state(3))
        if self.transform is not None:
            # Not set_random_seed, which gives every transform the same seed: all flips would go
            # together, and with the quarter turns.
            self.transform.set_random_state(np.random.default_rng(numbers), random.Random(choices))
            # As images [D, H, W, 1], not as a volume, which albumentations' GaussNoise cannot take.
            clip = self.transform(images=clip[..., None])["images"][..., 0]
        if np.random.default_rng(reversal).random() < self.reverse:
            clip = clip[::-1]
        return clip
