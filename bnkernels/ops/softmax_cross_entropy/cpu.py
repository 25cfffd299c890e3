"""CPU kernels of softmax cross-entropy of (N, K) logits and N labels.

Formulas: top[n]       = max_k logits[n,k]
          total[n]     = sum_k exp(logits[n,k] - top[n])
          q[n,k]       = (1 - smoothing) [k = label[n]] + smoothing / K
          loss[n]      = log(total[n]) - sum_k q[n,k] (logits[n,k] - top[n])
          dlogits[n,k] = (exp(logits[n,k] - top[n]) / total[n] - q[n,k]) / M     of the mean loss, M the number of
          examples whose label is not the ignored one; the others have 0
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
NOTHING = -(2**63)  # in place of a label to ignore: `ignore_index` is never so low


def softmax_cross_entropy(loss, dlogits, logits, labels, ignore_index=None, label_smoothing=0.0):
    """Write the losses and the gradient of their mean; raise ValueError for a wrong label, and write nothing."""
    rows, classes = logits.shape
    ignored = NOTHING if ignore_index is None else ignore_index
    wrong = first_wrong(labels, classes, ignored)
    if wrong >= 0:
        raise ValueError(label_out_of_range(labels[wrong], classes))
    counted = rows if ignore_index is None else max(1, rows - np.count_nonzero(labels == ignore_index))
    work = short_rows if classes <= SHORT else long_rows
    share(work, rows, logits.size, logits, labels, loss, dlogits, ignored, counted, label_smoothing)


@kernel
def first_wrong(labels, classes, ignored):
    """Return the index of the first label that is no class and not ignored, -1 if there is none."""
    found = False
    for i in range(len(labels)):
        found |= (labels[i] < 0) | (labels[i] >= classes)
    if found:
        for i in range(len(labels)):
            if (labels[i] < 0 or labels[i] >= classes) and (labels[i] != ignored or ignored == NOTHING):
                return i
    return -1


@kernel
def short_rows(logits, labels, loss, dlogits, ignored, counted, smoothing, first, last):
    """Compute rows `first` to `last` - 1 of at most SHORT classes."""
    classes = logits.shape[1]
    zero = loss.dtype.type(0)
    source, target = logits.reshape(logits.size), dlogits.reshape(dlogits.size)
    block, top, scale = stack(zero, BLOCK), stack(zero, STRIP), stack(zero, STRIP)
    total, spread = stack(np.float64(0), STRIP), stack(np.float64(0), STRIP)
    strip = min(STRIP, (BLOCK // classes) & ~7)
    shared, of_label = smoothing / classes, 1.0 - smoothing
    less = loss.dtype.type(shared / counted)
    for start in range(first, last, strip):
        count = min(strip, last - start)
        width = (count + 7) & ~7  # whole vectors
        for i in range(width):
            top[i] = -np.inf
            total[i] = 0.0
            spread[i] = 0.0
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
            label = class_of(labels[start + i], ignored)
            loss[start + i] = block[label * strip + i] - top[i]
        if smoothing > 0.0:
            for k in range(classes):
                line = part(block, k * strip, width)
                for i in range(width):
                    spread[i] += np.float64(line[i] - top[i])
        for k in range(classes):
            line = part(block, k * strip, width)
            for i in range(width):
                line[i] = exp(line[i] - top[i])
            for i in range(width):
                total[i] += np.float64(line[i])
        for i in range(count):
            loss[start + i] = np.log(total[i]) - (of_label * np.float64(loss[start + i]) + shared * spread[i])
        for i in range(width):
            total[i] = 1.0 / (total[i] * counted)
            scale[i] = total[i]
        for k in range(classes):
            line = part(block, k * strip, count)
            column = part(target, start * classes + k, (count - 1) * classes + 1)
            for i in range(count):
                column[i * classes] = line[i] * scale[i] - less
        for i in range(count):
            label = class_of(labels[start + i], ignored)
            of_class = np.float64(block[label * strip + i]) * total[i]
            target[(start + i) * classes + label] = of_class - (of_label + shared) / counted
    clear(labels, loss, target, classes, ignored, first, last)


@kernel
def long_rows(logits, labels, loss, dlogits, ignored, counted, smoothing, first, last):
    """Compute rows `first` to `last` - 1."""
    classes = logits.shape[1]
    zero = loss.dtype.type(0)
    source, target = logits.reshape(logits.size), dlogits.reshape(dlogits.size)
    line, highest, sums = stack(zero, LINE), stack(zero, LANES), stack(np.float64(0), LANES)
    lanes = whole(min(classes, LINE)) // 8
    shared, of_label = smoothing / classes, 1.0 - smoothing
    less = loss.dtype.type(shared / counted)
    for row in range(first, last):
        z, d = part(source, row * classes, classes), part(target, row * classes, classes)
        for j in range(lanes):
            highest[j] = -np.inf
            sums[j] = 0.0
        for start in range(0, classes, LINE):
            highest_of(fill(line, z, start), highest)
        top = highest_lane(part(highest, 0, lanes))
        label = class_of(labels[row], ignored)
        at_label = np.float64(z[label] - top)
        spread = distances(z, top) if smoothing > 0.0 else 0.0
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
        loss[row] = np.log(total) - (of_label * at_label + shared * spread)
        factor = 1.0 / (total * counted)
        scale = loss.dtype.type(factor)
        if classes > LINE:
            of_class = d[label]
            for j in range(classes):
                d[j] = d[j] * scale - less
        else:
            of_class = line[label]
            for j in range(classes):
                d[j] = line[j] * scale - less
        d[label] = np.float64(of_class) * factor - (of_label + shared) / counted
    clear(labels, loss, target, classes, ignored, first, last)


@device
def class_of(label, ignored):
    """Return the class of an example; 0 for one that is ignored, which is cleared in the end."""
    return 0 if label == ignored else label


@device
def clear(labels, loss, target, classes, ignored, first, last):
    """Set what belongs to ignored examples to 0."""
    if ignored != NOTHING:
        for row in range(first, last):
            if labels[row] == ignored:
                loss[row] = 0
                for k in range(classes):
                    target[row * classes + k] = 0


@device
def distances(z, top):
    """Return the sum of the distances of a row's logits from the largest."""
    total = 0.0
    for j in range(len(z)):
        total += np.float64(z[j] - top)
    return total


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
