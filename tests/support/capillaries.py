"""Grey clips of synthetic capillaries, as a store has them, without files."""

from __future__ import annotations

import numpy as np

from dist_train.data.synthetic.drawing import draw_clip, render_clip


def capillaries(count: int, *, seed: int = 0) -> list[np.ndarray]:
    """Crops of the first frames of clips, uint8 [24, H, W]; every fourth is stalled."""
    crops = []
    for index in range(count):
        spec = draw_clip(seed, index)
        box = spec.box
        frames = render_clip(spec, stalled=index % 4 == 0).frames[:24]
        crops.append(np.array(frames[:, box.top : box.bottom, box.left : box.right, 1]))
    return crops
