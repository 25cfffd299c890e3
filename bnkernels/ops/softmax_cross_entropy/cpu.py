"""CPU kernels of softmax cross-entropy of (N, K) logits and N labels.

Formulas: top[n]       = max_k logits[n,k]
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
from bnkernels.runtime.cpu.language import LINE, device, kernel, part, stack
from bnkernels.runtime.cpu.mathematics import exp, maximum
from bnkernels.runtime.cpu.threads import share

SHORT = 128  # classes, at most
STRIP = 64  # examples of a block, at most
BLOCK = 4096
LANES = LINE // 8


def softmax_cross_entropy(loss, dlogits, logits, labels):
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
    total = stack(np.float64(0), STRIP)
    strip = min(STRIP, (BLOCK // classes) & ~7)
    for start in range(first, last, strip):
        count = min(strip, last - start)
        width = (count + 7) & ~7  # whole vectors
        for i in range(width):
            top[i] = -np.inf
            total[i] = 0.0
        for k in range(classes):
            line = part(block, k * strip, width)
            column = part(source, start * classes + k, (count - 1) * classes + 1)
            for i in range(count):
                line[i] = column[i * classes]
            for i in range(count, width):
                line[i] = zero
            for i in range(width):
                top[i] = maximum(line[i], top[i])
        for i in range(count):
            loss[start + i] = block[labels[start + i] * strip + i] - top[i]
        for k in range(classes):
            line = part(block, k * strip, width)
            for i in range(width):
                line[i] = exp(line[i] - top[i])
            for i in range(width):
                total[i] += np.float64(line[i])
        for i in range(count):
            loss[start + i] = np.log(total[i]) - loss[start + i]
        for i in range(width):
            total[i] = 1.0 / (total[i] * rows)
            scale[i] = total[i]
        for k in range(classes):
            line = part(block, k * strip, count)
            column = part(target, start * classes + k, (count - 1) * classes + 1)
            for i in range(count):
                column[i * classes] = line[i] * scale[i]
        for i in range(count):
            label = labels[start + i]
            target[(start + i) * classes + label] = np.float64(block[label * strip + i]) * total[i] - 1.0 / rows


@kernel
def long_rows(logits, labels, loss, dlogits, first, last):
    """Compute rows `first` to `last` - 1."""
    rows, classes = logits.shape
    zero = loss.dtype.type(0)
    source, target = logits.reshape(logits.size), dlogits.reshape(dlogits.size)
    line, highest, sums = stack(zero, LINE), stack(zero, LANES), stack(np.float64(0), LANES)
    lanes = whole(min(classes, LINE)) // 8
    for row in range(first, last):
        z, d = part(source, row * classes, classes), part(target, row * classes, classes)
        for j in range(lanes):
            highest[j] = -np.inf
            sums[j] = 0.0
        for start in range(0, classes, LINE):
            highest_of(fill(line, z, start), highest)
        top = highest_lane(part(highest, 0, lanes))
        label = labels[row]
        at_label = z[label] - top
        for start in range(0, classes, LINE):
            some = fill(line, z, start) if classes > LINE else part(line, 0, whole(classes))
            for j in range(len(some)):
                some[j] = exp(some[j] - top)
            add(some, sums)
            if classes > LINE:
                kept = part(d, start, min(LINE, classes - start))
                for j in range(len(kept)):
                    kept[j] = line[j]
        total = sum_of_lanes(part(sums, 0, lanes))
        loss[row] = np.log(total) - at_label
        factor = 1.0 / (total * rows)
        scale = loss.dtype.type(factor)
        if classes > LINE:
            of_label = d[label]
            for j in range(classes):
                d[j] *= scale
        else:
            of_label = line[label]
            for j in range(classes):
                d[j] = line[j] * scale
        d[label] = np.float64(of_label) * factor - 1.0 / rows


@device
def whole(count):
    """Return the numbers that eight whole vectors need."""
    return (count + 63) & ~63


@device
def fill(line, z, start):
    """Copy numbers of a row into the line; return them with minus infinity behind, whose exp is 0."""
    some = part(z, start, min(LINE, len(z) - start))
    for j in range(len(some)):
        line[j] = some[j]
    for j in range(len(some), whole(len(some))):
        line[j] = -np.inf
    return part(line, 0, whole(len(some)))


@device
def eighths(line):
    """Return the eight parts of a line."""
    w = len(line) // 8
    return (
        part(line, 0, w),
        part(line, w, w),
        part(line, 2 * w, w),
        part(line, 3 * w, w),
        part(line, 4 * w, w),
        part(line, 5 * w, w),
        part(line, 6 * w, w),
        part(line, 7 * w, w),
    )


@device
def highest_of(line, highest):
    """Raise the lanes to the numbers of a line."""
    a, b, c, d, e, f, g, h = eighths(line)
    for j in range(len(a)):
        this = maximum(
            maximum(maximum(a[j], b[j]), maximum(c[j], d[j])), maximum(maximum(e[j], f[j]), maximum(g[j], h[j]))
        )
        highest[j] = maximum(this, highest[j])


@device
def add(line, sums):
    """Add the numbers of a line to lanes."""
    a, b, c, d, e, f, g, h = eighths(line)
    for j in range(len(a)):
        one = (np.float64(a[j]) + np.float64(b[j])) + (np.float64(c[j]) + np.float64(d[j]))
        other = (np.float64(e[j]) + np.float64(f[j])) + (np.float64(g[j]) + np.float64(h[j]))
        sums[j] += one + other


@device
def highest_lane(highest):
    """Return the largest of the lanes."""
    a, b, c, d, e, f, g, h = eighths(highest)
    top = a[0]
    for j in range(len(a)):
        this = maximum(
            maximum(maximum(a[j], b[j]), maximum(c[j], d[j])), maximum(maximum(e[j], f[j]), maximum(g[j], h[j]))
        )
        top = maximum(this, top)
    return top


@device
def sum_of_lanes(sums):
    """Return the sum of the lanes."""
    a, b, c, d, e, f, g, h = eighths(sums)
    total = 0.0
    for j in range(len(a)):
        total += ((a[j] + b[j]) + (c[j] + d[j])) + ((e[j] + f[j]) + (g[j] + h[j]))
    return total
