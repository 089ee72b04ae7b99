# mypy: ignore-errors
# What Triton compiles is written in its language, which has no types.
"""Triton kernels of fused normalisation, which triton_norm.py starts.

Each reads tiles of rows by channels, at the speed of memory: what belongs to a row, its frame, is
looked up once a row, and not once a value. Sums are taken by many programs, each of some tiles, and
added up by one in their order, so that they are the same each time.
"""

import triton
import triton.language as tl

#: Numbers that change from batch to batch, for which no other kernel is made.
SIZES = ["rows", "pixels", "per_program"]


@triton.jit
def _tile(tile, real, rows, pixels, channels, TILE_ROWS: tl.constexpr, TILE_CHANNELS: tl.constexpr):
    """Of a tile of rows in all channels, by its number: channels, which rows are of real frames,
    places of values, which of them exist, and which are of real frames."""
    across = tl.cdiv(channels, TILE_CHANNELS)
    channel = tile % across * TILE_CHANNELS + tl.arange(0, TILE_CHANNELS)
    row = tile // across * TILE_ROWS + tl.arange(0, TILE_ROWS)
    inside = (row < rows)[:, None] & (channel < channels)[None, :]
    is_real = row < rows
    if real is not None:
        is_real = tl.load(real + row // pixels, mask=row < rows, other=0) != 0
    place = row.to(tl.int64)[:, None] * channels + channel[None, :]
    return channel, is_real, place, inside, inside & is_real[:, None]


@triton.jit(do_not_specialize=SIZES)
def sums_kernel(
    x, real, origin, parts, rows, pixels, per_program, channels,
    TILE_ROWS: tl.constexpr, TILE_CHANNELS: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(channels, TILE_CHANNELS)
    part, column = tl.program_id(0) // across, tl.program_id(0) % across
    channel = column * TILE_CHANNELS + tl.arange(0, TILE_CHANNELS)
    centre = tl.load(origin + channel, mask=channel < channels, other=0.0)
    sums = tl.zeros([TILE_ROWS, TILE_CHANNELS], centre.dtype)
    squares = tl.zeros([TILE_ROWS, TILE_CHANNELS], centre.dtype)
    number = tl.zeros([TILE_ROWS], tl.int32)
    for step in range(per_program):
        tile = (part * per_program + step) * across + column
        _, of_row, place, _, is_real = _tile(
            tile, real, rows, pixels, channels, TILE_ROWS, TILE_CHANNELS
        )
        value = tl.load(x + place, mask=is_real, other=0.0).to(centre.dtype)
        value = tl.where(is_real, value - centre[None, :], 0.0)
        sums += value
        squares += value * value
        number += of_row.to(tl.int32)
    first = parts + part * (2 * channels + 1)
    tl.store(first + channel, tl.sum(sums, 0), mask=channel < channels)
    tl.store(first + channels + channel, tl.sum(squares, 0), mask=channel < channels)
    tl.store(first + 2 * channels, tl.sum(number, 0).to(centre.dtype), mask=column == 0)


@triton.jit
def _add_up(
    parts, of_parts, width, channels, channel,
    PARTS_AT_ONCE: tl.constexpr, TILE_CHANNELS: tl.constexpr,
):  # fmt: skip
    """The first and the second sums of channels, which [of_parts, width] are parts of."""
    first = tl.zeros([PARTS_AT_ONCE, TILE_CHANNELS], parts.dtype.element_ty)
    second = tl.zeros([PARTS_AT_ONCE, TILE_CHANNELS], parts.dtype.element_ty)
    for start in range(0, of_parts, PARTS_AT_ONCE):
        part = start + tl.arange(0, PARTS_AT_ONCE)
        mask = (part < of_parts)[:, None] & (channel < channels)[None, :]
        place = parts + part[:, None] * width + channel[None, :]
        first += tl.load(place, mask=mask, other=0.0)
        second += tl.load(place + channels, mask=mask, other=0.0)
    return tl.sum(first, 0), tl.sum(second, 0)


@triton.jit(do_not_specialize=["of_parts"])
def vectors_kernel(
    parts, origin, weight, bias, mean, var, number, scale, shift, of_parts, channels, eps,
    MOST_PARTS: tl.constexpr, PARTS_AT_ONCE: tl.constexpr, TILE_CHANNELS: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0) * TILE_CHANNELS + tl.arange(0, TILE_CHANNELS)
    inside = channel < channels
    width = 2 * channels + 1
    sums, squares = _add_up(parts, of_parts, width, channels, channel, PARTS_AT_ONCE, TILE_CHANNELS)
    part = tl.arange(0, MOST_PARTS)
    counts = tl.load(parts + part * width + 2 * channels, mask=part < of_parts, other=0.0)
    count = tl.sum(counts, 0)
    offset = sums / count
    of_origin = tl.load(origin + channel, mask=inside, other=0.0)
    of_mean = (of_origin + offset).to(of_origin.dtype)
    of_var = squares / count - offset * offset
    # Not by a maximum, which would lose a NaN.
    of_var = tl.where(of_var < 0.0, 0.0, of_var).to(of_origin.dtype)
    of_scale = tl.load(weight + channel, mask=inside, other=0.0) / tl.sqrt(of_var + eps)
    tl.store(mean + channel, of_mean, mask=inside)
    tl.store(var + channel, of_var, mask=inside)
    tl.store(scale + channel, of_scale, mask=inside)
    of_bias = tl.load(bias + channel, mask=inside, other=0.0)
    tl.store(shift + channel, of_bias - of_mean * of_scale, mask=inside)
    tl.store(number, count, mask=tl.program_id(0) == 0)


@triton.jit(do_not_specialize=SIZES)
def output_kernel(
    x, plus, real, scale, shift, y, rows, pixels, channels,
    RELU: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_CHANNELS: tl.constexpr,
):  # fmt: skip
    channel, _, place, inside, is_real = _tile(
        tl.program_id(0), real, rows, pixels, channels, TILE_ROWS, TILE_CHANNELS
    )
    of_scale = tl.load(scale + channel, mask=channel < channels, other=0.0)
    of_shift = tl.load(shift + channel, mask=channel < channels, other=0.0)
    value = tl.load(x + place, mask=is_real, other=0.0).to(of_scale.dtype)
    value = value * of_scale[None, :] + of_shift[None, :]
    if plus is not None:
        value += tl.load(plus + place, mask=is_real, other=0.0).to(of_scale.dtype)
    if RELU:
        value = tl.where(value < 0.0, 0.0, value)
    value = tl.where(is_real, value, 0.0)
    tl.store(y + place, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _before_relu(grad, value, y, place, is_real, scale, shift, RELU: tl.constexpr):
    """The gradient of what is rectified, where ``value`` was normalised."""
    found = tl.load(grad + place, mask=is_real, other=0.0).to(scale.dtype)
    if RELU:
        if y is None:
            positive = value * scale[None, :] + shift[None, :] > 0.0
        else:
            positive = tl.load(y + place, mask=is_real, other=0.0) > 0.0
        found = tl.where(positive, found, 0.0)
    return found


@triton.jit(do_not_specialize=SIZES)
def gradient_sums_kernel(
    grad, x, y, real, mean, scale, shift, parts, of_plus, rows, pixels, per_program, channels,
    RELU: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_CHANNELS: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(channels, TILE_CHANNELS)
    part, column = tl.program_id(0) // across, tl.program_id(0) % across
    channel = column * TILE_CHANNELS + tl.arange(0, TILE_CHANNELS)
    of_mean = tl.load(mean + channel, mask=channel < channels, other=0.0)
    of_scale = tl.load(scale + channel, mask=channel < channels, other=0.0)
    of_shift = tl.load(shift + channel, mask=channel < channels, other=0.0)
    sums = tl.zeros([TILE_ROWS, TILE_CHANNELS], of_mean.dtype)
    products = tl.zeros([TILE_ROWS, TILE_CHANNELS], of_mean.dtype)
    for step in range(per_program):
        tile = (part * per_program + step) * across + column
        _, _, place, inside, is_real = _tile(
            tile, real, rows, pixels, channels, TILE_ROWS, TILE_CHANNELS
        )
        value = tl.load(x + place, mask=is_real, other=0.0).to(of_mean.dtype)
        of_place = _before_relu(grad, value, y, place, is_real, of_scale, of_shift, RELU)
        if of_plus is not None:
            tl.store(of_plus + place, of_place.to(of_plus.dtype.element_ty), mask=inside)
        sums += of_place
        products += of_place * (value - of_mean[None, :])
    first = parts + part * 2 * channels
    tl.store(first + channel, tl.sum(sums, 0), mask=channel < channels)
    tl.store(first + channels + channel, tl.sum(products, 0), mask=channel < channels)


@triton.jit(do_not_specialize=["of_parts"])
def gradient_vectors_kernel(
    parts, var, sums, of_parts, channels, eps,
    PARTS_AT_ONCE: tl.constexpr, TILE_CHANNELS: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0) * TILE_CHANNELS + tl.arange(0, TILE_CHANNELS)
    inside = channel < channels
    of_bias, products = _add_up(
        parts, of_parts, 2 * channels, channels, channel, PARTS_AT_ONCE, TILE_CHANNELS
    )
    deviation = tl.sqrt(tl.load(var + channel, mask=inside, other=1.0) + eps)
    tl.store(sums + channel, of_bias, mask=inside)
    tl.store(sums + channels + channel, products / deviation, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def gradients_kernel(
    grad, x, y, real, sums, mean, var, number, scale, shift, of_x, of_plus,
    rows, pixels, channels, eps,
    RELU: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_CHANNELS: tl.constexpr,
):  # fmt: skip
    channel, _, place, inside, is_real = _tile(
        tl.program_id(0), real, rows, pixels, channels, TILE_ROWS, TILE_CHANNELS
    )
    there = channel < channels
    of_mean = tl.load(mean + channel, mask=there, other=0.0)
    of_scale = tl.load(scale + channel, mask=there, other=0.0)
    of_shift = tl.load(shift + channel, mask=there, other=0.0)
    deviation = tl.sqrt(tl.load(var + channel, mask=there, other=1.0) + eps)
    count = tl.load(number)
    of_all = (tl.load(sums + channel, mask=there, other=0.0) / count).to(of_mean.dtype)
    of_normalised = tl.load(sums + channels + channel, mask=there, other=0.0) / count
    # weight / std * (g - mean(g) - normalised * mean(g * normalised)), by powers of x.
    slope = -of_scale / deviation * of_normalised.to(of_mean.dtype)
    constant = -of_scale * of_all - slope * of_mean
    value = tl.load(x + place, mask=is_real, other=0.0).to(of_mean.dtype)
    of_place = _before_relu(grad, value, y, place, is_real, of_scale, of_shift, RELU)
    if of_plus is not None:
        tl.store(of_plus + place, of_place.to(of_plus.dtype.element_ty), mask=inside)
    of_value = of_place * of_scale[None, :] + value * slope[None, :] + constant[None, :]
    of_value = tl.where(is_real, of_value, 0.0)
    tl.store(of_x + place, of_value.to(of_x.dtype.element_ty), mask=inside)


@triton.jit
def move_kernel(
    running_mean, running_var, steps, mean, var, number, channels, momentum,
    TILE_CHANNELS: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0) * TILE_CHANNELS + tl.arange(0, TILE_CHANNELS)
    inside = channel < channels
    count = tl.load(number)
    unbiased = tl.load(var + channel, mask=inside, other=0.0)
    unbiased = unbiased * (count / tl.maximum(count - 1.0, 1.0)).to(unbiased.dtype)
    new = tl.load(mean + channel, mask=inside, other=0.0)
    old = tl.load(running_mean + channel, mask=inside, other=0.0)
    tl.store(running_mean + channel, old + momentum * (new - old), mask=inside)
    old = tl.load(running_var + channel, mask=inside, other=0.0)
    tl.store(running_var + channel, old + momentum * (unbiased - old), mask=inside)
    tl.store(steps, tl.load(steps) + 1, mask=tl.program_id(0) == 0)
