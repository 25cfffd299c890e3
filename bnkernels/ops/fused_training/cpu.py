"""CPU kernels of fused training: all steps of a network in one call, a network per thread.

Formulas: those of `reference.py`. A layer is one sweep forward and one backward over blocks of rows. Forward takes the
block of the layer before, normalises and activates it anew, multiplies it with the weights and adds up the statistics
of the product. Backward makes dz of the block, its part of the gradient of the weights, and dz times the turned
weights, with phi' and the sums that the norm below needs. Then all parameters are updated at once.

Arrays: parameters, state and running statistics of M models, one behind the other; x in place, or the rows drawn or
named, copied. Every layer keeps z, (batch, pitch); all else belongs to a block.

Traffic: forward reads z of the layer before and writes its own; backward reads dz, z and z below and writes dz below. A
norm adds work within the cache alone: two passes of a block in the forward, one in the backward.

Numerics: elements and products in the type of the data; sums of columns, rows and losses in float64; means as two
numbers; variances around the mean of the block, merged by Chan's formula.

Determinism: blocks follow from the sizes; a model is computed by one thread.
"""

import threading
from functools import lru_cache
from itertools import accumulate, pairwise

import numpy as np

from bnkernels.ops.activations import activation_named
from bnkernels.ops.fused_training import cpu_blocks as block
from bnkernels.ops.parameter_update.op import ADAM_EPS, BETA1, BETA2, MOMENTUM, STATES
from bnkernels.runtime.arguments import addresses, arguments_type, pack
from bnkernels.runtime.cpu.language import doubles, inner, int32s, int64s, kernel, numbers, part
from bnkernels.runtime.cpu.products import product, worth_blas
from bnkernels.runtime.cpu.threads import share
from bnkernels.runtime.cpu.vectors import WIDTH

INPUTS, OUTPUTS, WEIGHT, GAMMA, SHIFT, MEAN, VARIANCE, NORM, PITCH, Z, VECTORS, SUMS, RSTDS, COLUMNS = range(
    14
)  # entries of the table
NONE, BATCH, LAYER = range(3)  # norms
COUNT = 6  # vectors of a layer, see cpu_blocks.py
BLOCK = 2**14  # numbers of a block, of which several fit into the L2 cache
FEWEST_ROWS, ROWS_OF_BLAS, WIDE = 128, 512, 256  # rows of a block; more where layers are wide and the BLAS multiplies
SAME_SETS = 256  # bytes: rows at multiples of it fall into few sets of the L1 cache, and push each other out
MOST_KEPT = 2**27  # bytes of a model's memory that the next call may take over: the system clears new memory slowly
IN_ORDER, NAMED, DRAWN = range(3)  # rows of the mini-batches
POINTERS = "layers schedule rates seeds parameters first second running x labels indices losses space wide classes"
SIZES = (
    "first_model last_model depth steps batch parameter_count running_count data_rows first_step rows widest sums "
    "slopes_at h_at y_at weights_at gathered_at gradients_at"
)
ARGUMENTS = arguments_type(POINTERS, SIZES, "eps alpha", "activation optimizer order own_rows unbiased")
ONE = np.int64(1)  # not a literal, with which a kernel would be compiled anew
HALF, LOWER = np.uint64(32), np.uint64(2**32 - 1)


def train(network, batch, optimizer, arrays, losses, rates, seeds, schedule, steps_before):
    """Make all steps of all models; see `reference.train`."""
    parameters, _, _, running, x, _, indices = arrays
    table, starts, counts = _layout(network.layers, network.norm, batch, parameters.dtype, parameters.shape[-1])
    given = *addresses(None, table, schedule, rates, seeds, *arrays, losses), 0, 0, 0, 0, 0  # filled in below
    order = DRAWN if seeds is not None else IN_ORDER if indices is None else NAMED
    own_rows = int(indices is not None and indices.ndim == 3)
    phi = activation_named(network.activation)
    sizes = len(table), losses.shape[-1], batch, parameters.shape[-1], 0 if running is None else running.shape[-1]
    codes = phi.code, list(STATES).index(optimizer), order, own_rows, network.unbiased
    values = *given, *sizes, len(x), steps_before, *starts, network.eps, phi.alpha, *codes
    size = losses.size * batch * parameters.shape[-1]
    share(_train_models, len(rates), size, values, parameters.dtype, counts)


def _train_models(values, dtype, counts, first, last):
    """Train the models of a range, one after the other, in memory of their own."""
    own = _memory(dtype, counts)
    arguments = pack(ARGUMENTS[dtype], *values)
    arguments["space"], arguments["wide"], arguments["classes"] = addresses(None, *own)
    arguments["first_model"], arguments["last_model"] = first, last
    _models(arguments)


def _memory(dtype, counts):
    """Return arrays of so many numbers of the type, of float64 and of int32, for this thread."""
    if getattr(_kept, "key", None) == (dtype, counts):
        return _kept.arrays
    arrays = np.zeros(counts[0], dtype), np.zeros(counts[1]), np.zeros(counts[2], np.int32)
    if sum(array.nbytes for array in arrays) <= MOST_KEPT:
        _kept.key, _kept.arrays = (dtype, counts), arrays
    return arrays


_kept = threading.local()


@lru_cache(maxsize=16)
def _layout(layers, norm_of_network, batch, dtype, parameters):
    """Return the table of the layers, where parts of a model's memory start, and its counts of numbers."""
    table, of_layers, sums = [], 0, 0
    for layer in layers:
        pitch = _whole(layer.outputs)
        pitch += WIDTH * (pitch * dtype.itemsize % SAME_SETS == 0)
        norm = NONE if layer.gamma < 0 else LAYER if norm_of_network == "layer" else BATCH
        rstds = of_layers + pitch * (batch + COUNT)
        table.append((*layer, norm, pitch, of_layers, of_layers + pitch * batch, sums, rstds))
        of_layers, sums = rstds + _whole(batch), sums + 3 * pitch
    widest = max(row[PITCH] for row in table)
    rows = min(max(BLOCK // widest, ROWS_OF_BLAS if widest >= WIDE else FEWEST_ROWS), batch)
    weights = max((below[PITCH] * layer[OUTPUTS] for below, layer in pairwise(table)), default=0)
    sizes = of_layers, 2 * batch * widest, rows * widest, rows * widest, weights, batch * layers[0].inputs
    *starts, count = accumulate(_whole(size) for size in (*sizes, parameters))
    return np.array(table), (rows, widest, sums, *starts), (count, sums + 2 * widest, batch)


def _whole(count):
    """Return a count rounded up to whole vectors."""
    return -(-count // WIDTH) * WIDTH


@kernel
def _models(arguments):
    """Train the models of a range, one after the other."""
    a = arguments[()]
    layers = int64s(a.layers, 0, a.depth * COLUMNS)
    inputs, batch, count, rows, zero = layers[INPUTS], a.batch, a.parameter_count, a.data_rows, layers[Z]
    schedule, rates = doubles(a.schedule, 0, 3 * a.steps), doubles(a.rates, 0, a.last_model)
    work = numbers(a.alpha, a.space, 0, a.slopes_at)
    slopes = numbers(a.alpha, a.space, a.slopes_at, 2 * batch * a.widest)
    h, y = numbers(a.alpha, a.space, a.h_at, a.rows * a.widest), numbers(a.alpha, a.space, a.y_at, a.rows * a.widest)
    weights = numbers(a.alpha, a.space, a.weights_at, a.gathered_at - a.weights_at)
    gathered = numbers(a.alpha, a.space, a.gathered_at, batch * inputs)
    gradients = numbers(a.alpha, a.space, a.gradients_at, count)
    sums, found = doubles(a.wide, 0, a.sums), doubles(a.wide, a.sums, 2 * a.widest)
    classes = int32s(a.classes, 0, batch)
    x, labels = numbers(a.alpha, a.x, 0, rows * inputs), int32s(a.labels, 0, rows)
    for turn in range(a.first_model * a.steps, a.last_model * a.steps):
        model, step = turn // a.steps, turn % a.steps
        parameters = numbers(a.alpha, a.parameters, model * count, count)
        running = numbers(a.alpha, a.running, model * a.running_count, a.running_count)
        named = int32s(a.indices, (a.own_rows * model * a.steps + step) * batch, batch)
        for i in range(batch):
            row = step * batch + i
            if a.order == NAMED:
                row = np.int64(named[i])
            elif a.order == DRAWN:
                row = _drawn(int32s(a.seeds, model, 1)[0], a.first_step * batch + row, rows)
            classes[i] = labels[row]
            if a.order != IN_ORDER:
                _copy(part(x, row * inputs, inputs), part(gathered, i * inputs, inputs))
        examples = x if a.order == IN_ORDER else gathered
        examples_at = step * batch * inputs if a.order == IN_ORDER else zero
        parts = work, slopes, h, y, weights
        momentum = schedule[3 * step]
        loss = _forward(a, layers, momentum, parameters, running, examples, examples_at, classes, parts, sums)
        numbers(a.alpha, a.losses, turn, 1)[0] = loss / batch
        _backward(a, layers, parameters, examples, examples_at, gradients, parts, sums, found)
        _update(a, rates[model], schedule[3 * step + 1], schedule[3 * step + 2], parameters, gradients, model * count)


@inner
def _forward(a, layers, momentum, parameters, running, x, x_at, labels, parts, sums):
    """Write z of all layers, and the gradients of the mean loss over the logits; return the sum of the losses."""
    work, _, h, _, _ = parts
    batch, rows, code, alpha, loss = a.batch, a.rows, a.activation, a.alpha, 0.0
    for at_layer in range(0, len(layers), COLUMNS):
        layer, below = part(layers, at_layer, COLUMNS), part(layers, max(at_layer - COLUMNS, 0), COLUMNS)
        pitch, outputs, inputs, norm = layer[PITCH], layer[OUTPUTS], layer[INPUTS], layer[NORM]
        if norm != BATCH:
            _affine(layer, parameters, work)
        for at in range(0, batch, rows):
            count, z = min(rows, batch - at), layer[Z] + at * pitch
            h_, h_at, h_row = x, x_at + at * inputs, inputs
            if at_layer > 0:
                h_, h_at, h_row = h, layers[Z], below[PITCH]
                block.activations(work, below[Z] + at * h_row, h_row, count, below[VECTORS], code, alpha, h)
            product(
                count,
                outputs,
                inputs,
                h_,
                h_at,
                h_row,
                ONE,
                parameters,
                layer[WEIGHT],
                outputs,
                ONE,
                work,
                z,
                pitch,
                at < 0,
            )
            if norm == BATCH:
                block.statistics(work, z, pitch, count, at, sums, layer[SUMS])
            elif norm == LAYER:
                block.normalise_rows(work, z, pitch, count, outputs, a.eps, layer[RSTDS] + at)
            elif at_layer + COLUMNS == len(layers):
                own = part(labels, at, count)
                loss += block.cross_entropy(work, z, pitch, outputs, layer[VECTORS], own, batch, h)
        if norm == BATCH:
            _batch_norm(a, layer, momentum, parameters, running, sums, work)
    return loss


@inner
def _backward(a, layers, parameters, x, x_at, gradients, parts, sums, found):
    """Write all gradients."""
    work, slopes, h, y, weights = parts
    batch, rows, code, alpha, half = a.batch, a.rows, a.activation, a.alpha, a.batch * a.widest
    for at_layer in range(len(layers) - COLUMNS, -1, -COLUMNS):
        layer, below = part(layers, at_layer, COLUMNS), part(layers, max(at_layer - COLUMNS, 0), COLUMNS)
        pitch, outputs, inputs, norm = layer[PITCH], layer[OUTPUTS], layer[INPUTS], layer[NORM]
        g, g_at, lower = slopes, at_layer // COLUMNS % 2 * half, (at_layer // COLUMNS + 1) % 2 * half
        if at_layer + COLUMNS == len(layers):
            g, g_at = work, layer[Z]
            block.column_sums(work, g_at, pitch, batch, found)
        _vectors(layer, batch, found, sums, gradients, work)
        b, b_at, b_row, b_column = parameters, layer[WEIGHT], ONE, outputs
        if at_layer > 0 and not worth_blas(rows, inputs, outputs):
            block.turned(parameters, b_at, inputs, outputs, below[PITCH], weights)
            b, b_at, b_row, b_column = weights, layers[Z], below[PITCH], ONE
        for at in range(0, batch, rows):
            count, z, dz = min(rows, batch - at), layer[Z] + at * pitch, g_at + at * pitch
            if norm == BATCH:
                block.batch_norm_backward(work, z, pitch, count, layer[VECTORS], g, dz)
            elif norm == LAYER:
                block.layer_norm_backward(work, z, pitch, count, outputs, layer[VECTORS], layer[RSTDS] + at, g, dz)
            h_, h_at, h_row = x, x_at + at * inputs, inputs
            if at_layer > 0:
                h_, h_at, h_row = h, layers[Z], below[PITCH]
                z = below[Z] + at * h_row
                block.activations(work, z, h_row, count, below[VECTORS], code, alpha, h)
            product(
                inputs,
                outputs,
                count,
                h_,
                h_at,
                ONE,
                h_row,
                g,
                dz,
                pitch,
                ONE,
                gradients,
                layer[WEIGHT],
                outputs,
                at > 0,
            )
            if at_layer > 0:
                dh = lower + at * h_row
                product(count, inputs, outputs, g, dz, pitch, ONE, b, b_at, b_row, b_column, slopes, dh, h_row, at < 0)
                block.activations_backward(
                    work, z, h_row, count, below[VECTORS], code, alpha, h, y, slopes, dh, found, at > 0
                )


@inner
def _copy(source, target):
    for i in range(len(target)):
        target[i] = source[i]


@inner
def _drawn(seed, place, rows):
    """Return the row that `random_rows` draws for a place."""
    counter, key = np.uint64(place), np.uint64(seed) & LOWER  # the bits of a seed of 32 are read as a signed number
    low, high = counter & LOWER, counter >> HALF
    for _ in range(10):
        product_ = low * np.uint64(0xD256D193)
        low = (product_ >> HALF) ^ key ^ high
        high = product_ & LOWER
        key = (key + np.uint64(0x9E3779B9)) & LOWER
    return np.int64((low * np.uint64(rows)) >> HALF)


@inner
def _affine(layer, parameters, vectors):
    """Write the vectors of a layer without batch norm."""
    at, pitch = layer[VECTORS], layer[PITCH]
    for j in range(layer[OUTPUTS]):
        gamma = parameters[layer[GAMMA] + j] if layer[GAMMA] >= 0 else parameters.dtype.type(1)
        vectors[at + block.HIGH * pitch + j] = vectors[at + block.LOW * pitch + j] = 0
        vectors[at + block.SCALE * pitch + j] = gamma
        vectors[at + block.SHIFT * pitch + j] = parameters[layer[SHIFT] + j]


@inner
def _batch_norm(a, layer, momentum, parameters, running, sums, vectors):
    """Write the vectors of a layer with batch norm, and move its running statistics."""
    at, pitch, dtype = layer[VECTORS], layer[PITCH], vectors.dtype.type
    batch, correction = a.batch, a.batch / (a.batch - 1) if a.unbiased else 1.0
    for j in range(layer[OUTPUTS]):
        mean, variance = sums[layer[SUMS] + j], sums[layer[SUMS] + pitch + j] / batch
        rstd = 1 / np.sqrt(variance + a.eps)
        sums[layer[SUMS] + 2 * pitch + j] = rstd
        high = dtype(mean)
        vectors[at + block.HIGH * pitch + j] = high
        vectors[at + block.LOW * pitch + j] = dtype(mean - high)
        vectors[at + block.SCALE * pitch + j] = dtype(parameters[layer[GAMMA] + j] * rstd)
        vectors[at + block.SHIFT * pitch + j] = parameters[layer[SHIFT] + j]
        if a.running_count > 0:
            at_mean, at_variance, variance = layer[MEAN] + j, layer[VARIANCE] + j, variance * correction
            running[at_mean] = dtype((1 - momentum) * running[at_mean] + momentum * mean)
            running[at_variance] = dtype((1 - momentum) * running[at_variance] + momentum * variance)


@inner
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


@inner
def _update(a, rate, correction1, root_correction2, parameters, gradients, at):
    """Make the step of `sgd_update`, `momentum_update` or `adam_update`, with the state from an offset on."""
    dtype, count = parameters.dtype.type, len(parameters)
    lr, first, second = dtype(rate), numbers(a.alpha, a.first, at, count), numbers(a.alpha, a.second, at, count)
    if a.optimizer == 0:
        for i in range(count):
            parameters[i] -= lr * gradients[i]
    elif a.optimizer == 1:
        decay = dtype(MOMENTUM)
        for i in range(count):
            velocity = first[i] * decay + gradients[i]
            first[i] = velocity
            parameters[i] -= lr * velocity
    else:
        decay1, decay2, rest1, rest2 = dtype(BETA1), dtype(BETA2), dtype(1 - BETA1), dtype(1 - BETA2)
        scale, root_correction, eps = dtype(rate / correction1), dtype(1 / root_correction2), dtype(ADAM_EPS)
        for i in range(count):
            g = gradients[i]
            mean, square = first[i] * decay1 + rest1 * g, second[i] * decay2 + rest2 * g * g
            first[i], second[i] = mean, square
            parameters[i] -= scale * (mean / (np.sqrt(square) * root_correction + eps))
