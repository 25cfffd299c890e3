"""CPU kernels of fused training: all steps of a network in one call, a network per thread.

Formulas: those of `reference.py`. A layer is one sweep forward and one backward over blocks of rows. Forward: the block
    of the layer before, normalised and activated anew, times the weights, and the statistics of the product. Backward:
    dz of the block, its part of the gradient of the weights, and dz times the turned weights, with phi' and the sums
    that the norm below needs. Then all parameters are updated at once.
Arrays: parameters, state and running statistics of M models, one behind the other; x in place, or the rows drawn
    or named, copied. Of every layer only z is kept, (batch, pitch); all else belongs to a block.
Traffic: forward reads z of the layer before and writes its own; backward reads dz, z and z below and writes dz below.
    A norm adds work within the cache alone: two passes of the block in the forward, one in the backward.
Numerics: elements and products in the type of the data; sums of columns, rows and losses in float64; means as two
    numbers; variances around the mean of the block, merged by Chan's formula.
Determinism: blocks follow from the sizes; a model is computed by one thread.
"""

import numpy as np

from bnkernels.ops.activations import activation_named
from bnkernels.ops.fused_training import cpu_blocks as block
from bnkernels.ops.parameter_update import ADAM_EPS, BETA1, BETA2, MOMENTUM, STATES
from bnkernels.runtime.arguments import addresses
from bnkernels.runtime.cpu.language import int32s, kernel, numbers, part
from bnkernels.runtime.cpu.products import WORTH_BLAS, blas_product, product
from bnkernels.runtime.cpu.threads import share

INPUTS, OUTPUTS, WEIGHT, GAMMA, SHIFT, MEAN, VARIANCE, NORM, PITCH, Z, VECTORS, SUMS, RSTDS = range(13)  # of the table
NONE, BATCH, LAYER = range(3)  # norms
COUNT = 6  # vectors of a layer, see cpu_blocks.py
BLOCK, FEWEST_ROWS = 2**14, 128  # numbers of a block, of which several fit into the L2 cache; rows that the BLAS needs
IN_ORDER, NAMED, DRAWN = range(3)  # rows of the mini-batches
HALF, LOWER = np.uint64(32), np.uint64(2**32 - 1)


def train(network, batch, optimizer, arrays, losses, rates, seeds, schedule, steps_before):
    """Make all steps of all models; see `reference.train`."""
    parameters, first, second, running, x, labels, indices = arrays
    table, counts = _layout(network, batch, parameters.dtype)
    none = np.empty(0, parameters.dtype)
    updated = (none if array is None else array.reshape(-1) for array in (parameters, first, second, running))
    rows = DRAWN if seeds is not None else IN_ORDER if indices is None else NAMED
    own_rows = int(indices is not None and indices.ndim == 3)
    phi = activation_named(network.activation)
    (steps, count), tracked = (losses.shape[-1], parameters.shape[-1]), 0 if running is None else running.shape[-1]
    sizes = batch, steps, count, tracked, rows, own_rows, phi.code, list(STATES).index(optimizer), steps_before
    numbers = np.array([network.eps, phi.alpha, float(network.unbiased)])
    given = table, np.array([*sizes, len(x), *counts]), numbers, schedule, rates, np.zeros(1, np.uint32)
    given = (*given[:-1], given[-1] if seeds is None else seeds, *updated, *addresses(None, x, labels, indices))
    share(_models, len(rates), len(rates) * steps * batch * count, *given, losses.reshape(-1))


def _layout(network, batch, dtype):
    """Return the table of the layers, and how many numbers of the data's type and of float64 they take."""
    lanes = 32 // dtype.itemsize
    table, numbers, sums = [], 0, 0
    for layer in network.layers:
        pitch = -(-layer.outputs // lanes) * lanes
        norm = NONE if layer.gamma < 0 else LAYER if network.norm == "layer" else BATCH
        rstds = numbers + pitch * (batch + COUNT)
        table.append((*layer, norm, pitch, numbers, numbers + pitch * batch, sums, rstds))
        numbers, sums = rstds + -(-batch // lanes) * lanes, sums + 3 * pitch
    return np.array(table), (numbers, sums)


@kernel
def _models(
    table, sizes, numbers_, schedule, rates, seeds, parameters, first, second, running, x, labels, indices, losses,
    first_model, last_model,
):  # fmt: skip
    """Train the models of a range, one after the other."""
    steps, count, tracked, rows = sizes[1], sizes[2], sizes[3], sizes[9]
    like, named = parameters[0], steps * sizes[0]
    examples, classes = numbers(like, x, 0, rows * table[0, INPUTS]), int32s(labels, 0, rows)
    for model in range(first_model, last_model):
        _train(
            table, sizes, numbers_, schedule, rates[model], seeds[model % len(seeds)],
            part(parameters, model * count, count), part(first, model * count, min(count, len(first))),
            part(second, model * count, min(count, len(second))), part(running, model * tracked, tracked),
            examples, classes, int32s(indices, sizes[5] * model * named, named),
            part(losses, model * steps, steps),
        )  # fmt: skip


@kernel
def _train(
    table, sizes, numbers_, schedule, rate, seed, parameters, first, second, running, x, labels, indices, losses
):  # fmt: skip
    """Train a model."""
    batch, order, code, optimizer, before, data_rows = sizes[0], sizes[4], sizes[6], sizes[7], sizes[8], sizes[9]
    dtype, kind = parameters.dtype.type, parameters.dtype
    eps, alpha, unbiased = numbers_[0], dtype(numbers_[1]), numbers_[2] != 0.0
    depth, inputs, widest, turned = len(table), table[0, INPUTS], 0, 0
    for number in range(depth):
        widest = max(widest, table[number, PITCH])
        if number > 0:
            turned = max(turned, table[number, OUTPUTS] * table[number - 1, PITCH])
    rows = max(BLOCK // widest, FEWEST_ROWS)
    work, sums, found = np.zeros(sizes[10], kind), np.zeros(sizes[11]), np.zeros(2 * widest)
    gradients, weights = np.zeros(len(parameters), kind), np.zeros(turned, kind)
    slopes, h, y = np.zeros(2 * batch * widest, kind), np.zeros(rows * widest, kind), np.zeros(rows * widest, kind)
    gathered, classes, totals = np.zeros(batch * inputs, kind), np.zeros(batch, np.int32), np.zeros(rows)
    for step in range(len(losses)):
        examples, examples_at = x, step * batch * inputs
        if order == IN_ORDER:
            for i in range(batch):
                classes[i] = labels[step * batch + i]
        else:
            examples, examples_at = gathered, 0
            for i in range(batch):
                place = step * batch + i
                row = np.int64(indices[place]) if order == NAMED else _drawn(seed, before * batch + place, data_rows)
                classes[i] = labels[row]
                _copy(part(x, row * inputs, inputs), part(gathered, i * inputs, inputs))
        loss = 0.0
        for number in range(depth):
            layer, below = table[number], table[max(number - 1, 0)]
            pitch, outputs = layer[PITCH], layer[OUTPUTS]
            if layer[NORM] != BATCH:
                _affine(layer, parameters, work)
            for at in range(0, batch, rows):
                count, z = min(rows, batch - at), layer[Z] + at * pitch
                a, a_at, a_row = examples, examples_at + at * inputs, inputs
                if number > 0:
                    a, a_at, a_row = h, 0, below[PITCH]
                    block.activations(work, below[Z] + at * a_row, a_row, count, below[VECTORS], code, alpha, h)
                _times(count, outputs, layer[INPUTS], a, a_at, a_row, parameters, layer[WEIGHT], work, z, pitch)
                if layer[NORM] == BATCH:
                    block.statistics(work, z, pitch, count, at, sums, layer[SUMS])
                elif layer[NORM] == LAYER:
                    block.normalise_rows(work, z, pitch, count, outputs, eps, layer[RSTDS] + at)
                elif number == depth - 1:
                    labels_ = part(classes, at, count)
                    loss += block.cross_entropy(work, z, pitch, outputs, layer[VECTORS], labels_, batch, totals)
            if layer[NORM] == BATCH:
                _batch_norm(layer, batch, eps, schedule[step, 0], unbiased, parameters, running, sums, work)
        losses[step] = dtype(loss / batch)
        for number in range(depth - 1, -1, -1):
            layer, below = table[number], table[max(number - 1, 0)]
            pitch, outputs = layer[PITCH], layer[OUTPUTS]
            g, g_from, lower = slopes, number % 2 * batch * widest, (1 - number % 2) * batch * widest
            if number == depth - 1:
                g, g_from = work, layer[Z]
                block.column_sums(work, g_from, pitch, batch, found)
            _vectors(layer, batch, found, sums, gradients, work)
            by_blas = min(rows, batch) * layer[INPUTS] * outputs >= WORTH_BLAS
            if number > 0 and not by_blas:
                block.turned(parameters, layer[WEIGHT], layer[INPUTS], outputs, below[PITCH], weights)
            for at in range(0, batch, rows):
                count, z, dz, add = min(rows, batch - at), layer[Z] + at * pitch, g_from + at * pitch, int(at > 0)
                if layer[NORM] == BATCH:
                    block.batch_norm_backward(work, z, pitch, count, layer[VECTORS], g, dz)
                elif layer[NORM] == LAYER:
                    block.layer_norm_backward(
                        work, z, pitch, count, outputs, layer[VECTORS], layer[RSTDS] + at, g, dz
                    )
                a, a_at, a_row = examples, examples_at + at * inputs, inputs
                if number > 0:
                    a, a_at, a_row = h, 0, below[PITCH]
                    block.activations(work, below[Z] + at * a_row, a_row, count, below[VECTORS], code, alpha, h)
                _turned_times(
                    layer[INPUTS], outputs, count, a, a_at, a_row, g, dz, pitch, gradients, layer[WEIGHT], add, by_blas
                )
                if number == 0:
                    continue
                dh = lower + at * a_row
                if by_blas:
                    _dh = layer[INPUTS]
                    blas_product(
                        count, _dh, outputs, g, dz, pitch, 0, parameters, layer[WEIGHT], outputs, 1, slopes, dh, a_row, 0
                    )
                else:
                    product(count, a_row, outputs, g, dz, pitch, 1, weights, 0, a_row, slopes, dh, a_row, 0)
                block.activations_backward(
                    work, below[Z] + at * a_row, a_row, count, below[VECTORS], code, alpha, h, y, slopes, dh, found, add
                )
        _update(optimizer, dtype(rate), schedule[step, 1], schedule[step, 2], parameters, gradients, first, second)


@kernel
def _copy(source, target):
    for i in range(len(target)):
        target[i] = source[i]


@kernel
def _drawn(seed, place, rows):
    """Return the row that `random_rows` draws for a place."""
    counter, key = np.uint64(place), np.uint64(seed)
    low, high = counter & LOWER, counter >> HALF
    for _ in range(10):
        product_ = low * np.uint64(0xD256D193)
        low = (product_ >> HALF) ^ key ^ high
        high = product_ & LOWER
        key = (key + np.uint64(0x9E3779B9)) & LOWER
    return np.int64((low * np.uint64(rows)) >> HALF)


@kernel
def _times(m, n, depth, a, a_at, a_row, b, b_at, c, c_at, c_row):
    """Write the product of a block with the weights, which lie close."""
    if m * n * depth >= WORTH_BLAS:
        blas_product(m, n, depth, a, a_at, a_row, 0, b, b_at, n, 0, c, c_at, c_row, 0)
    else:
        product(m, n, depth, a, a_at, a_row, 1, b, b_at, n, c, c_at, c_row, 0)


@kernel
def _turned_times(m, n, depth, a, a_at, a_row, b, b_at, b_row, c, c_at, add, by_blas):
    """Write or add the product of a turned block with a block, to the gradient of the weights."""
    if by_blas:
        blas_product(m, n, depth, a, a_at, a_row, 1, b, b_at, b_row, 0, c, c_at, n, add)
    else:
        product(m, n, depth, a, a_at, 1, a_row, b, b_at, b_row, c, c_at, n, add)


@kernel
def _affine(layer, parameters, vectors):
    """Write the vectors of a layer without batch norm."""
    at, pitch = layer[VECTORS], layer[PITCH]
    for j in range(layer[OUTPUTS]):
        gamma = parameters[layer[GAMMA] + j] if layer[GAMMA] >= 0 else parameters.dtype.type(1)
        vectors[at + block.SCALE * pitch + j] = gamma
        vectors[at + block.SHIFT * pitch + j] = parameters[layer[SHIFT] + j]


@kernel
def _batch_norm(layer, batch, eps, momentum, unbiased, parameters, running, sums, vectors):
    """Write the vectors of a layer with batch norm, and move its running statistics."""
    at, pitch, dtype = layer[VECTORS], layer[PITCH], vectors.dtype.type
    tracked = len(running) > 0
    correction = batch / (batch - 1) if unbiased else 1.0
    for j in range(layer[OUTPUTS]):
        mean, variance = sums[layer[SUMS] + j], sums[layer[SUMS] + pitch + j] / batch
        rstd = 1 / np.sqrt(variance + eps)
        sums[layer[SUMS] + 2 * pitch + j] = rstd
        high = dtype(mean)
        vectors[at + block.HIGH * pitch + j] = high
        vectors[at + block.LOW * pitch + j] = dtype(mean - high)
        vectors[at + block.SCALE * pitch + j] = dtype(parameters[layer[GAMMA] + j] * rstd)
        vectors[at + block.SHIFT * pitch + j] = parameters[layer[SHIFT] + j]
        if tracked:
            for place, new in ((layer[MEAN] + j, mean), (layer[VARIANCE] + j, variance * correction)):
                running[place] = dtype((1 - momentum) * running[place] + momentum * new)


@kernel
def _vectors(layer, batch, found, sums, gradients, vectors):
    """Write the gradients of gamma and of the shift, and with batch norm what dz takes from its sums."""
    at, pitch, dtype = layer[VECTORS], layer[PITCH], vectors.dtype.type
    for j in range(layer[OUTPUTS]):
        gradients[layer[SHIFT] + j] = dtype(found[j])
        rstd = sums[layer[SUMS] + 2 * pitch + j] if layer[NORM] == BATCH else 1.0
        of_product = found[pitch + j] * rstd
        if layer[NORM] != NONE:
            gradients[layer[GAMMA] + j] = dtype(of_product)
        vectors[at + block.OF_SUM * pitch + j] = dtype(found[j] / batch)
        vectors[at + block.OF_PRODUCT * pitch + j] = dtype(of_product * rstd / batch)


@kernel
def _update(optimizer, rate, correction1, root_correction2, parameters, gradients, first, second):
    """Make the step of `sgd_update`, `momentum_update` or `adam_update`."""
    dtype = parameters.dtype.type
    if optimizer == 0:
        for i in range(len(parameters)):
            parameters[i] -= rate * gradients[i]
    elif optimizer == 1:
        decay = dtype(MOMENTUM)
        for i in range(len(parameters)):
            first[i] = first[i] * decay + gradients[i]
            parameters[i] -= rate * first[i]
    else:
        decay1, decay2, rest1, rest2 = dtype(BETA1), dtype(BETA2), dtype(1 - BETA1), dtype(1 - BETA2)
        scale, root_correction, eps = dtype(rate / correction1), dtype(1 / root_correction2), dtype(ADAM_EPS)
        for i in range(len(parameters)):
            g = gradients[i]
            first[i] = first[i] * decay1 + rest1 * g
            second[i] = second[i] * decay2 + rest2 * g * g
            parameters[i] -= scale * (first[i] / (np.sqrt(second[i]) * root_correction + eps))
