"""A clip and its map as pictures: a strip of frames with curves over depth, and an animation."""

from __future__ import annotations

import io

import cv2
import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.figure import Figure
from PIL import Image

from dist_train.evaluation.report_charts import BLUE, ORANGE, STYLE
from dist_train.safe_text import printable

#: Frames of a strip and of an animation, at most.
SHOWN, MOST_FRAMES = 8, 128
#: Height of the frames: small ones are enlarged by a whole number, or less if they would be too
#: wide for an encoder of videos; large ones are shrunk.
LEAST_HEIGHT, MOST_HEIGHT, MOST_WIDTH = 128, 256, 2048
#: Part of a map's values that have the full colour, and how much of it covers the frame.
FULL, COVER = 0.002, 0.7
COLOURS = "inferno"
FRAME_RATE = 10


def overlay(frames: np.ndarray, found: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Frames for people, and the same under the colours of a map: uint8 [D, H', W', 3] each.

    Args:
        frames: uint8 [D, H, W], or [D, H, W, 3] in colour.
        found: [D, H, W]; negative values have no colour.
    """
    height, width = frames.shape[1:3]
    scale: float = -(-LEAST_HEIGHT // height) if height < LEAST_HEIGHT else 1
    scale = min(scale, MOST_HEIGHT / height, MOST_WIDTH / width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    how = cv2.INTER_NEAREST if scale >= 1 else cv2.INTER_AREA
    plain = np.stack([cv2.resize(frame, size, interpolation=how) for frame in frames])
    if plain.ndim == 3:
        plain = np.repeat(plain[..., None], 3, axis=3)
    shown = np.clip(found, 0, None).astype(np.float32)
    shown = np.stack([cv2.resize(one, size, interpolation=cv2.INTER_LINEAR) for one in shown])
    full = float(np.quantile(shown, 1 - FULL)) or float(shown.max()) or 1.0
    shown = np.clip(shown / full, 0, 1)
    colours = colormaps[COLOURS](shown)[..., :3] * 255
    cover = COVER * shown[..., None]
    return plain, (plain * (1 - cover) + colours * cover).round().astype(np.uint8)


def strip(
    plain: np.ndarray, covered: np.ndarray, mass: np.ndarray, fall: np.ndarray, *title: str
) -> bytes:
    """A PNG: evenly spaced frames in a row, the same with the map below, and curves over depth.

    Args:
        plain, covered: as ``overlay`` gives them.
        mass: share of the map in each frame, [D].
        fall: what the clip's probability, or value, loses with each frame, [D].
        title: lines above.
    """
    depth = len(plain)
    shown = np.unique(np.linspace(0, depth - 1, SHOWN).round().astype(int))
    with rc_context(STYLE):
        high = 9.6 / len(shown) * plain.shape[1] / plain.shape[2]
        figure = Figure(figsize=(10, min(2 * high, 8) + 2.6), layout="constrained")
        grid = figure.add_gridspec(3, len(shown), height_ratios=(high, high, 1.7))
        for row, pictures in enumerate((plain, covered)):
            for column, number in enumerate(shown):
                axes = figure.add_subplot(grid[row, column])
                axes.imshow(pictures[number])
                axes.set_axis_off()
                if row == 0:
                    axes.set_title(f"frame {number + 1}", fontsize=9)
        axes = figure.add_subplot(grid[2, :])
        number = np.arange(1, depth + 1)
        (of_map,) = axes.plot(number, 100 * mass, color=ORANGE, label="share of the map, %")
        axes.set_xlabel("frame")
        axes.set_ylabel("map, %")
        axes.set_ylim(bottom=0)
        other = axes.twinx()
        (of_fall,) = other.plot(
            number, fall, color=BLUE, linestyle="--", label="fall if the frame is hidden"
        )
        other.spines["right"].set_visible(True)
        other.grid(visible=False)
        other.set_ylabel("fall")
        axes.legend(
            handles=[of_map, of_fall], loc="lower left", bbox_to_anchor=(0, 1), ncols=2, fontsize=9
        )
        # A name may hold what matplotlib reads as a formula.
        figure.suptitle("\n".join(map(printable, title)), fontsize=11, parse_math=False)
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=100)
    return content.getvalue()


def side_by_side(plain: np.ndarray, covered: np.ndarray) -> np.ndarray:
    """The frames of the animation, evenly spaced if the clip has more: uint8 [N, H, W, 3], of even
    height and width."""
    shown = np.unique(np.linspace(0, len(plain) - 1, MOST_FRAMES).round().astype(int))
    both = np.concatenate([plain[shown], covered[shown]], axis=2)
    spare = ((0, 0), (0, both.shape[1] % 2), (0, both.shape[2] % 2), (0, 0))
    return np.pad(both, spare, mode="edge")


def as_gif(frames: np.ndarray) -> bytes:
    """A GIF that repeats for ever."""
    pictures = [Image.fromarray(frame).quantize(256) for frame in frames]
    content = io.BytesIO()
    pictures[0].save(
        content, "GIF",
        save_all=True, append_images=pictures[1:], duration=1000 // FRAME_RATE, loop=0,
    )  # fmt: skip
    return content.getvalue()


def as_mp4(frames: np.ndarray) -> bytes | None:
    """H.264 in mp4; None if PyAV, or its encoder, is not here."""
    try:
        import av

        codec = av.Codec("libx264", "w")
    except (ImportError, ValueError):
        return None
    content = io.BytesIO()
    with av.open(content, "w", format="mp4") as container:
        stream = container.add_stream(codec.name, rate=FRAME_RATE, options={"crf": "18"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return content.getvalue()


def shares(found: np.ndarray) -> np.ndarray:
    """The part of a map's positive values in each frame, float64 [D]; zeros of an empty map."""
    mass: np.ndarray = np.clip(found, 0, None).astype(np.float64).sum(axis=(1, 2))
    return mass / (mass.sum() or 1.0)
