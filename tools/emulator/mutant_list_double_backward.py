"""The bugs that `mutants.py` plants in the double backward, and in the second derivatives of the activations."""

from __future__ import annotations

from .mutants import Mutant

DOUBLE, SUMS, ACTIVATION = "batch_norm_double_backward.cu", "lib/reduce/sums.cuh", "lib/numbers/activation.cuh"

MUTANTS = [
    Mutant(
        "double backward: no barrier before the sums",
        SUMS,
        "    __syncthreads();\n    if (workers > SERIAL_WORKERS) {",
        "    if (workers > SERIAL_WORKERS) {",
    ),
    Mutant(
        "double backward: no barrier between the levels of the sums",
        SUMS,
        "        __syncthreads();\n    }\n    return merge_workers",
        "    }\n    return merge_workers",
    ),
    Mutant(
        "double backward: threads without a channel return before the barrier",
        DOUBLE,
        "    const ChannelSums<A, SUMS> total = merge_block(own);\n    if (!active) return;",
        "    if (!active) return;\n    const ChannelSums<A, SUMS> total = merge_block(own);",
    ),
    Mutant(
        "double backward: nothing through s e",
        DOUBLE,
        "- coefficients.fall * sum[V_XHAT] + s * e)",
        "- coefficients.fall * sum[V_XHAT])",
    ),
    Mutant("double backward: frozen statistics depend on x", DOUBLE, "a.frozen ? A(0) : of_all / n", "of_all / n"),
    Mutant(
        "double backward: nothing through the second derivative", DOUBLE, "row.k = dy * phi.second;", "row.k = A(0);"
    ),
    Mutant("double backward: dgamma misses the scale", DOUBLE, "sum_q_xhat + channel.rstd * e;", "sum_q_xhat;"),
    Mutant(
        "double backward: an infinite gradient through a flat piece",
        DOUBLE,
        "activation == LINEAR && slope == A(0) ? A(0) : value * slope",
        "value * slope",
    ),
    Mutant(
        "activation: the second derivative of a gate without the first of its own",
        ACTIVATION,
        "fma(z, bend, A(2))",
        "z * bend",
    ),
    Mutant(
        "activation: gelu_tanh's argument taken for straight",
        ACTIVATION,
        "fma(fall, slope, A(6) * b * z / slope)",
        "fall * slope",
    ),
]
