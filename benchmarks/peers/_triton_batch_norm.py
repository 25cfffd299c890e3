"""The kernels of `triton_kernels`; importing them needs Triton.

The data are tiles of rows by channels. Row r of channel c lies at (r // LENGTH, c, r % LENGTH): LENGTH is 1 where the
channels are last in memory, else the number of pixels of an image. All sizes are constants of the compiled code, which
tells Triton how far its loads can be vectorised; names in capitals are constants in the helpers, too.

``saved`` holds mean and 1/deviation of every channel, ``sums`` the gradients of gamma and beta, ``partials`` two
numbers of every range of rows and channel.
"""

from __future__ import annotations

import triton
import triton.language as tl

from benchmarks import peers

EPSILON = tl.constexpr(peers.EPSILON)
MOMENTUM = tl.constexpr(peers.MOMENTUM)


@triton.jit
def channels_of(CHANNELS, BLOCK_CHANNELS):
    """Return the channels of this program, and which of them there are."""
    channels = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    return channels, channels < CHANNELS


@triton.jit
def tile_of(start, last, channels, CHANNELS, LENGTH, BLOCK_ROWS):
    """Return the places in memory of the rows from `start` on, and which of them are before `last`."""
    rows = start + tl.arange(0, BLOCK_ROWS)
    if LENGTH == 1:
        places = rows[:, None] * CHANNELS + channels[None, :]
    else:
        places = (rows // LENGTH * (CHANNELS * LENGTH) + rows % LENGTH)[:, None] + (channels * LENGTH)[None, :]
    return places, (rows < last)[:, None] & (channels < CHANNELS)[None, :]


@triton.jit
def range_of(split, SPLIT_ROWS, ROWS):
    """Return the first row of a range of rows, and the first behind it."""
    return split * SPLIT_ROWS, tl.minimum((split + 1) * SPLIT_ROWS, ROWS)


@triton.jit
def store_share(partials, one, two, channels, exists, CHANNELS):
    """Store two numbers of this range per channel."""
    share = tl.program_id(1) * CHANNELS + channels
    tl.store(partials + share, one, mask=exists)
    tl.store(partials + tl.num_programs(1) * CHANNELS + share, two, mask=exists)


@triton.jit
def is_last(tickets):
    """Return whether all other programs with the same channels have stored their shares; the tickets end as zeros."""
    tl.debug_barrier()  # all threads have stored before one of them takes the ticket
    last = tl.atomic_add(tickets + tl.program_id(0), 1) == tl.num_programs(1) - 1
    if last:
        tl.store(tickets + tl.program_id(0), 0)
    return last


@triton.jit
def shares_of(partials, channels, CHANNELS, MERGED):
    """Return both numbers of all ranges, and which of them there are."""
    places, mask = tile_of(0, tl.num_programs(1), channels, CHANNELS, 1, MERGED)
    one = tl.load(partials + places, mask=mask, other=0, cache_modifier=".cg")  # others wrote them: past the L1 cache
    two = tl.load(partials + tl.num_programs(1) * CHANNELS + places, mask=mask, other=0, cache_modifier=".cg")
    return one, two, mask


@triton.jit
def before_activation(centred, scale, shift, residual, places, mask):
    """Return what the activation gets; `residual` may be None."""
    z = centred * scale[None, :] + shift[None, :]
    if residual is not None:
        z += tl.load(residual + places, mask=mask, other=0).to(z.dtype)
    return z


@triton.jit
def vectors_of(gamma, beta, saved, channels, exists, CHANNELS):
    """Return mean, 1/deviation, scale and shift."""
    mean = tl.load(saved + channels, mask=exists, other=0)
    rstd = tl.load(saved + CHANNELS + channels, mask=exists, other=0)
    scale = tl.load(gamma + channels, mask=exists, other=0) * rstd
    return mean, rstd, scale, tl.load(beta + channels, mask=exists, other=0)


# ---- forward --------------------------------------------------------------------------------------------------------


@triton.jit
def moments(x, channels, first, last, ACC, CHANNELS, LENGTH, BLOCK_ROWS, BLOCK_CHANNELS):
    """Return the mean, and the sum of the squared deviations from it, of the rows from `first` to `last`.

    Every element of the tile follows Welford's recurrence down its own rows, without talking to the others; at the end
    their results are merged.
    """
    means = tl.zeros([BLOCK_ROWS, BLOCK_CHANNELS], ACC)
    squares = tl.zeros([BLOCK_ROWS, BLOCK_CHANNELS], ACC)
    seen = tl.zeros([1, 1], ACC)
    for start in range(first, last, BLOCK_ROWS):
        places, mask = tile_of(start, last, channels, CHANNELS, LENGTH, BLOCK_ROWS)
        values = tl.load(x + places, mask=mask, other=0).to(ACC)
        seen += 1
        deviation = tl.where(mask, values - means, 0.0)
        means += deviation * (1.0 / seen)
        squares += deviation * (values - means)
    counts = tl.maximum((last - first - tl.arange(0, BLOCK_ROWS) + BLOCK_ROWS - 1) // BLOCK_ROWS, 0).to(ACC)[:, None]
    mean = tl.sum(means * counts, axis=0) / (last - first)
    apart = means - mean[None, :]
    return mean, tl.sum(squares + apart * apart * counts, axis=0)


@triton.jit
def keep(mean, variance, channels, exists, running_mean, running_var, saved, CHANNELS, ROWS):
    """Update the running statistics, save what the backward needs, return 1/deviation."""
    old_mean = tl.load(running_mean + channels, mask=exists, other=0)
    old_var = tl.load(running_var + channels, mask=exists, other=0)
    unbiased = variance * (ROWS / (ROWS - 1))
    tl.store(running_mean + channels, old_mean * (1 - MOMENTUM) + mean * MOMENTUM, mask=exists)
    tl.store(running_var + channels, old_var * (1 - MOMENTUM) + unbiased * MOMENTUM, mask=exists)
    rstd = 1.0 / tl.sqrt(variance + EPSILON)
    tl.store(saved + channels, mean, mask=exists)
    tl.store(saved + CHANNELS + channels, rstd, mask=exists)
    return rstd


@triton.jit
def finish(y, centred, scale, shift, residual, places, mask, RELU):
    """Scale, shift, add, activate, and write the output."""
    z = before_activation(centred, scale, shift, residual, places, mask)
    if RELU:
        z = tl.where(z < 0, 0.0, z)  # unlike a maximum, it keeps NaN
    tl.store(y + places, z, mask=mask)


@triton.jit
def forward_held(
    x,
    residual,
    gamma,
    beta,
    running_mean,
    running_var,
    saved,
    y,
    RELU: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    LENGTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Compute some channels: all their rows stay in registers, so the variance takes a second look at no cost."""
    channels, exists = channels_of(CHANNELS, BLOCK_CHANNELS)
    places, mask = tile_of(0, ROWS, channels, CHANNELS, LENGTH, BLOCK_ROWS)
    values = tl.load(x + places, mask=mask, other=0).to(gamma.dtype.element_ty)
    scale = tl.load(gamma + channels, mask=exists, other=0)
    shift = tl.load(beta + channels, mask=exists, other=0)
    mean = tl.sum(values, axis=0) / ROWS
    centred = tl.where(mask, values - mean[None, :], 0.0)
    variance = tl.sum(centred * centred, axis=0) / ROWS
    scale *= keep(mean, variance, channels, exists, running_mean, running_var, saved, CHANNELS, ROWS)
    finish(y, centred, scale, shift, residual, places, mask, RELU)


@triton.jit
def forward_statistics(
    x,
    running_mean,
    running_var,
    saved,
    partials,
    tickets,
    MERGED: tl.constexpr,
    SPLIT_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    LENGTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Compute mean and squared deviations of one range of rows; who finishes last merges those of all ranges."""
    channels, exists = channels_of(CHANNELS, BLOCK_CHANNELS)
    ACC: tl.constexpr = saved.dtype.element_ty
    first, last = range_of(tl.program_id(1), SPLIT_ROWS, ROWS)
    mean, squares = moments(x, channels, first, last, ACC, CHANNELS, LENGTH, BLOCK_ROWS, BLOCK_CHANNELS)
    store_share(partials, mean, squares, channels, exists, CHANNELS)
    if is_last(tickets):
        means, squares_of_all, mask = shares_of(partials, channels, CHANNELS, MERGED)
        counts = tl.minimum(ROWS - tl.arange(0, MERGED) * SPLIT_ROWS, SPLIT_ROWS).to(ACC)[:, None]
        mean = tl.sum(means * counts, axis=0) / ROWS
        apart = tl.where(mask, means - mean[None, :], 0.0)
        variance = tl.sum(squares_of_all + apart * apart * counts, axis=0) / ROWS
        keep(mean, variance, channels, exists, running_mean, running_var, saved, CHANNELS, ROWS)


@triton.jit
def forward_apply(
    x,
    residual,
    gamma,
    beta,
    saved,
    y,
    RELU: tl.constexpr,
    SPLIT_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    LENGTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Normalise one range of rows: the last range first, as the cache still holds what was read last."""
    channels, exists = channels_of(CHANNELS, BLOCK_CHANNELS)
    first, last = range_of(tl.num_programs(1) - 1 - tl.program_id(1), SPLIT_ROWS, ROWS)
    mean, _, scale, shift = vectors_of(gamma, beta, saved, channels, exists, CHANNELS)
    for start in range(first, last, BLOCK_ROWS):
        places, mask = tile_of(start, last, channels, CHANNELS, LENGTH, BLOCK_ROWS)
        centred = tl.load(x + places, mask=mask, other=0).to(mean.dtype) - mean[None, :]
        finish(y, centred, scale, shift, residual, places, mask, RELU)


# ---- backward -------------------------------------------------------------------------------------------------------


@triton.jit
def gradient(x, dy, residual, mean, scale, shift, places, mask, RELU):
    """Return the centred data, and the gradient of what the activation got: its sign is computed anew."""
    centred = tl.load(x + places, mask=mask, other=0).to(mean.dtype) - mean[None, :]
    g = tl.load(dy + places, mask=mask, other=0).to(mean.dtype)
    if RELU:
        g = tl.where(before_activation(centred, scale, shift, residual, places, mask) > 0, g, 0.0)
    return centred, g


@triton.jit
def keep_sums(sums, by_gamma, by_beta, channels, exists, CHANNELS):
    """Write the gradients of gamma and beta."""
    tl.store(sums + channels, by_gamma, mask=exists)
    tl.store(sums + CHANNELS + channels, by_beta, mask=exists)


@triton.jit
def write_dx(dx, centred, g, scale, rstd, by_gamma, by_beta, places, mask, ROWS):
    """Write the gradient of x."""
    shared = (by_beta / ROWS)[None, :] + centred * (by_gamma * rstd / ROWS)[None, :]
    tl.store(dx + places, (g - shared) * scale[None, :], mask=mask)


@triton.jit
def backward_held(
    x,
    dy,
    residual,
    gamma,
    beta,
    saved,
    dx,
    sums,
    dresidual,
    RELU: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    LENGTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Compute some channels: all their rows stay in registers."""
    channels, exists = channels_of(CHANNELS, BLOCK_CHANNELS)
    mean, rstd, scale, shift = vectors_of(gamma, beta, saved, channels, exists, CHANNELS)
    places, mask = tile_of(0, ROWS, channels, CHANNELS, LENGTH, BLOCK_ROWS)
    centred, g = gradient(x, dy, residual, mean, scale, shift, places, mask, RELU)
    by_gamma, by_beta = tl.sum(g * centred, axis=0) * rstd, tl.sum(g, axis=0)
    keep_sums(sums, by_gamma, by_beta, channels, exists, CHANNELS)
    write_dx(dx, centred, g, scale, rstd, by_gamma, by_beta, places, mask, ROWS)
    if dresidual is not None:
        tl.store(dresidual + places, g, mask=mask)


@triton.jit
def backward_sums(
    x,
    dy,
    residual,
    gamma,
    beta,
    saved,
    sums,
    dresidual,
    partials,
    tickets,
    RELU: tl.constexpr,
    MERGED: tl.constexpr,
    SPLIT_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    LENGTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Add up one range of rows; who finishes last adds up all ranges. The gradient of the residual is complete."""
    channels, exists = channels_of(CHANNELS, BLOCK_CHANNELS)
    first, last = range_of(tl.program_id(1), SPLIT_ROWS, ROWS)
    mean, rstd, scale, shift = vectors_of(gamma, beta, saved, channels, exists, CHANNELS)
    with_x = tl.zeros([BLOCK_ROWS, BLOCK_CHANNELS], mean.dtype)
    alone = tl.zeros([BLOCK_ROWS, BLOCK_CHANNELS], mean.dtype)
    for start in range(first, last, BLOCK_ROWS):
        places, mask = tile_of(start, last, channels, CHANNELS, LENGTH, BLOCK_ROWS)
        centred, g = gradient(x, dy, residual, mean, scale, shift, places, mask, RELU)
        with_x += g * centred
        alone += g
        if dresidual is not None:
            tl.store(dresidual + places, g, mask=mask)
    store_share(partials, tl.sum(with_x, axis=0) * rstd, tl.sum(alone, axis=0), channels, exists, CHANNELS)
    if is_last(tickets):
        by_gamma, by_beta, _ = shares_of(partials, channels, CHANNELS, MERGED)
        keep_sums(sums, tl.sum(by_gamma, axis=0), tl.sum(by_beta, axis=0), channels, exists, CHANNELS)


@triton.jit
def backward_apply(
    x,
    dy,
    gamma,
    beta,
    saved,
    dx,
    sums,
    RELU: tl.constexpr,
    SPLIT_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    LENGTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Compute the gradient of one range of rows of x; where there is a residual, `dy` is its gradient."""
    channels, exists = channels_of(CHANNELS, BLOCK_CHANNELS)
    first, last = range_of(tl.num_programs(1) - 1 - tl.program_id(1), SPLIT_ROWS, ROWS)
    mean, rstd, scale, shift = vectors_of(gamma, beta, saved, channels, exists, CHANNELS)
    by_gamma = tl.load(sums + channels, mask=exists, other=0)
    by_beta = tl.load(sums + CHANNELS + channels, mask=exists, other=0)
    for start in range(first, last, BLOCK_ROWS):
        places, mask = tile_of(start, last, channels, CHANNELS, LENGTH, BLOCK_ROWS)
        centred, g = gradient(x, dy, None, mean, scale, shift, places, mask, RELU)
        write_dx(dx, centred, g, scale, rstd, by_gamma, by_beta, places, mask, ROWS)
