# mypy: ignore-errors
# What Triton compiles is written in its language, which has no types.
"""Triton kernels of max pooling in 3D by windows of 3 and strides of 2, which fused_pool.py starts.

Activations lie channels last, so that rows of channels are read whole. Which voxel of a window was
the largest is kept as its number of 27, in a byte.
"""

import triton
import triton.language as tl


@triton.jit
def _place(row, depth, height, width):
    """Clip, frame, line and column of rows of channels."""
    column, row = row % width, row // width
    line, row = row % height, row // height
    return row // depth, row % depth, line, column


@triton.jit
def pool_kernel(
    x, y, taps, rows, depth, height, width, out_depth, out_height, out_width, channels,
    TILE_ROWS: tl.constexpr, TILE_CHANNELS: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(channels, TILE_CHANNELS)
    channel = tl.program_id(0) % across * TILE_CHANNELS + tl.arange(0, TILE_CHANNELS)
    row = tl.program_id(0) // across * TILE_ROWS + tl.arange(0, TILE_ROWS)
    clip, frame, line, column = _place(row, out_depth, out_height, out_width)
    inside = (row < rows)[:, None] & (channel < channels)[None, :]
    best = tl.full([TILE_ROWS, TILE_CHANNELS], float("-inf"), tl.float32)
    # Of a window of nothing but -inf, its first voxel.
    first = tl.where(frame == 0, 9, 0) + tl.where(line == 0, 3, 0) + tl.where(column == 0, 1, 0)
    tap_of_best = first[:, None] + tl.zeros([TILE_ROWS, TILE_CHANNELS], tl.int32)
    for tap in tl.static_range(27):
        at_frame = 2 * frame - 1 + tap // 9
        at_line = 2 * line - 1 + tap // 3 % 3
        at_column = 2 * column - 1 + tap % 3
        there = (at_frame >= 0) & (at_frame < depth) & (at_line >= 0) & (at_line < height)
        there = there & (at_column >= 0) & (at_column < width)
        source = ((clip * depth + at_frame) * height + at_line) * width + at_column
        place = source.to(tl.int64)[:, None] * channels + channel[None, :]
        value = tl.load(x + place, mask=inside & there[:, None], other=float("-inf"))
        value = value.to(tl.float32)
        # The first of equal ones; a NaN is larger than all.
        better = (value > best) | (value != value)
        best = tl.where(better, value, best)
        tap_of_best = tl.where(better, tap, tap_of_best)
    place = row.to(tl.int64)[:, None] * channels + channel[None, :]
    tl.store(y + place, best.to(y.dtype.element_ty), mask=inside)
    tl.store(taps + place, tap_of_best.to(tl.uint8), mask=inside)


@triton.jit
def pool_gradient_kernel(
    grad, taps, of_x, rows, depth, height, width, out_depth, out_height, out_width, channels,
    TILE_ROWS: tl.constexpr, TILE_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Of voxels that are odd in the same axes, program by program: those are in as many windows.
    ``rows`` is how many of them there are at most, half of each axis rounded up."""
    of_axes = tl.program_id(1)
    odd_frame, odd_line, odd_column = of_axes // 4, of_axes // 2 % 2, of_axes % 2
    across = tl.cdiv(channels, TILE_CHANNELS)
    channel = tl.program_id(0) % across * TILE_CHANNELS + tl.arange(0, TILE_CHANNELS)
    row = tl.program_id(0) // across * TILE_ROWS + tl.arange(0, TILE_ROWS)
    # Of each axis, the window in whose middle an even voxel is, and the one before an odd one.
    clip, frame, line, column = _place(row, out_depth, out_height, out_width)
    at_frame, at_line, at_column = (
        2 * frame + odd_frame,
        2 * line + odd_line,
        2 * column + odd_column,
    )
    there = (row < rows) & (at_frame < depth) & (at_line < height) & (at_column < width)
    inside = there[:, None] & (channel < channels)[None, :]
    found = tl.zeros([TILE_ROWS, TILE_CHANNELS], tl.float32)
    for in_depth in range(1 + odd_frame):
        for in_height in range(1 + odd_line):
            for in_width in range(1 + odd_column):
                of_frame, of_line = frame + in_depth, line + in_height
                of_column = column + in_width
                is_window = (of_frame < out_depth) & (of_line < out_height)
                is_window = inside & (is_window & (of_column < out_width))[:, None]
                # An odd voxel is the last of one window and the first of the next.
                tap = (1 + odd_frame - 2 * in_depth) * 9
                tap += (1 + odd_line - 2 * in_height) * 3 + 1 + odd_column - 2 * in_width
                window = ((clip * out_depth + of_frame) * out_height + of_line) * out_width
                place = (window + of_column).to(tl.int64)[:, None] * channels + channel[None, :]
                largest = tl.load(taps + place, mask=is_window, other=255).to(tl.int32)
                # All of them, as a mask of single channels would load them one by one.
                value = tl.load(grad + place, mask=is_window, other=0.0).to(tl.float32)
                found += tl.where(largest == tap, value, 0.0)
    source = ((clip * depth + at_frame) * height + at_line) * width + at_column
    place = source.to(tl.int64)[:, None] * channels + channel[None, :]
    tl.store(of_x + place, found.to(of_x.dtype.element_ty), mask=inside)
