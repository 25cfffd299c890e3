"""CPU kernels of softmax cross-entropy of (N, K) logits and N labels.

Formulas: top[n]       = max_k logits[n,k], NaN ignored
          total[n]     = sum_k exp(logits[n,k] - top[n])
          loss[n]      = log(total[n]) - (logits[n,label[n]] - top[n])
          dlogits[n,k] = (exp(logits[n,k] - top[n]) / total[n] - [k = label[n]]) / N     of the mean loss
Arrays:   logits, dlogits (N, K), loss (N,), float32 or float64, C order; dlogits may be logits. labels (N,), int32 or
          int64.
Traffic:  Of memory, one read of logits and one write of dlogits, while a row fits into the cache. Rows of up to SHORT
          classes are transposed into a block in the L1 cache, class by class, so that a vector holds as many examples;
          longer ones are worked on row by row.
Numerics: In the type of the logits, shifted by the row's maximum: neither exp nor log can overflow. Sums, their
          logarithms, and the gradient at the label are float64.
Order:    Sums of short rows class by class, of long ones in LANES lanes that are added in order. A row's bits depend
          on no other row, so not on threads either.
"""

import numpy as np

from bnkernels.ops.softmax_cross_entropy.reference import label_out_of_range
from bnkernels.runtime.cpu.language import DOUBLE, LINE, kernel, part, stack
from bnkernels.runtime.cpu.mathematics import exp, select
from bnkernels.runtime.cpu.threads import share

SHORT = 64  # classes
STRIP = 64  # examples of a block
BLOCK = SHORT * STRIP
LANES = 32


def softmax_cross_entropy(logits, labels, loss, dlogits):
    """Write the losses and the gradient of their mean; raise ValueError for a wrong label, and write nothing."""
    rows, classes = logits.shape
    wrong = first_wrong(labels, classes)
    if wrong >= 0:
        raise ValueError(label_out_of_range(labels[wrong], classes))
    work = short_rows if classes <= SHORT else long_rows
    share(work, rows, logits.size, logits, labels, loss, dlogits)


@kernel
def first_wrong(labels, classes):
    """Return the index of the first label that is no class, -1 if there is none."""
    found = False
    for i in range(len(labels)):
        found |= (labels[i] < 0) | (labels[i] >= classes)
    if found:
        for i in range(len(labels)):
            if labels[i] < 0 or labels[i] >= classes:
                return i
    return -1


@kernel
def short_rows(logits, labels, loss, dlogits, first, last):
    """Compute rows `first` to `last` - 1 of at most SHORT classes."""
    rows, classes = logits.shape
    zero = loss.dtype.type(0)
    source, target = logits.reshape(logits.size), dlogits.reshape(dlogits.size)
    block, top, scale = stack(zero, BLOCK), stack(zero, STRIP), stack(zero, STRIP)
    total = stack(DOUBLE(0), STRIP)
    each = 1.0 / rows
    for start in range(first, last, STRIP):
        count = min(STRIP, last - start)
        for i in range(count):
            top[i] = -np.inf
            total[i] = 0.0
        for k in range(classes):
            line = part(block, k * STRIP, count)
            column = part(source, start * classes + k, (count - 1) * classes + 1)
            for i in range(count):
                line[i] = column[i * classes]
            for i in range(count):
                top[i] = select(line[i] > top[i], line[i], top[i])  # ignores NaN, which reaches the row through the sum
        for i in range(count):
            loss[start + i] = block[labels[start + i] * STRIP + i] - top[i]
        for k in range(classes):
            line = part(block, k * STRIP, count)
            for i in range(count):
                line[i] = exp(line[i] - top[i])
            for i in range(count):
                total[i] += DOUBLE(line[i])
        for i in range(count):
            loss[start + i] = np.log(total[i]) - loss[start + i]
            total[i] = 1.0 / (total[i] * rows)
            scale[i] = total[i]
        for k in range(classes):
            line = part(block, k * STRIP, count)
            column = part(target, start * classes + k, (count - 1) * classes + 1)
            for i in range(count):
                column[i * classes] = line[i] * scale[i]
        for i in range(count):
            label = labels[start + i]
            target[(start + i) * classes + label] = DOUBLE(block[label * STRIP + i]) * total[i] - each


@kernel
def long_rows(logits, labels, loss, dlogits, first, last):
    """Compute rows `first` to `last` - 1."""
    rows, classes = logits.shape
    zero = loss.dtype.type(0)
    source, target = logits.reshape(logits.size), dlogits.reshape(dlogits.size)
    line, highest, lanes = stack(zero, LINE), stack(zero, LANES), stack(DOUBLE(0), LANES)
    for row in range(first, last):
        z, d = part(source, row * classes, classes), part(target, row * classes, classes)
        top = maximum(z, highest)
        at_label = z[labels[row]] - top
        for j in range(LANES):
            lanes[j] = 0.0
        for start in range(0, classes, LINE):
            count = min(LINE, classes - start)
            chunk, some = part(z, start, count), part(d, start, count)
            for j in range(count):
                line[j] = exp(chunk[j] - top)
            add(part(line, 0, count), lanes)
            if classes > LINE:
                for j in range(count):
                    some[j] = line[j]
        total = 0.0
        for j in range(LANES):
            total += lanes[j]
        loss[row] = np.log(total) - at_label
        factor = 1.0 / (total * rows)
        scale = loss.dtype.type(factor)
        if classes > LINE:
            for j in range(classes):
                d[j] *= scale
        else:
            for j in range(classes):
                d[j] = line[j] * scale
        d[labels[row]] = DOUBLE(exp(loss.dtype.type(at_label))) * factor - 1.0 / rows


@kernel
def maximum(z, highest):
    """Return the largest number that is not NaN; `highest` has room for LANES of them."""
    for j in range(LANES):
        highest[j] = -np.inf
    whole = len(z) - len(z) % LANES
    for start in range(0, whole, LANES):
        some = part(z, start, LANES)
        for j in range(LANES):
            highest[j] = select(some[j] > highest[j], some[j], highest[j])
    top = highest[0]
    for j in range(1, LANES):
        top = select(highest[j] > top, highest[j], top)
    for j in range(whole, len(z)):
        top = select(z[j] > top, z[j], top)
    return top


@kernel
def add(line, lanes):
    """Add numbers to sums in LANES lanes."""
    whole = len(line) - len(line) % LANES
    for start in range(0, whole, LANES):
        some = part(line, start, LANES)
        for j in range(LANES):
            lanes[j] += DOUBLE(some[j])
    rest = part(line, whole, len(line) - whole)
    for j in range(len(rest)):
        lanes[j] += DOUBLE(rest[j])
