"""The bugs that `mutants.py` plants in layer norm of rows that several blocks share."""

from __future__ import annotations

from .mutants import Mutant

SHARED, MOMENTS = "lib/reduce/shared_rows.cuh", "lib/reduce/row_moments.cuh"
FORWARD, BACKWARD = "layer_norm_forward_cooperative.cu", "layer_norm_backward_cooperative.cu"
TESTS = ("tests/ops/test_layer_norm_long_rows.py",)
ORDER, AGAIN, PIPELINE = "test_the_order_of_blocks", "beyond_the_chip_are", "on_their_way"
FAR, SPECIAL = "far_from", "special_rows"

MUTANTS = [
    Mutant("long rows: the first span is a full one", SHARED, "span ? pitch : rest", "pitch", select=AGAIN),
    Mutant(
        "long rows: blocks show their numbers over those still read",
        SHARED,
        "(turn % 2 * (long long)gridDim.x + blockIdx.x)",
        "(long long)blockIdx.x",
        ("plain", "tsan"),
        select=ORDER,
    ),
    Mutant(
        "long rows: blocks do not wait for one another",
        SHARED,
        "        grid_barrier(counter + blockIdx.x * BARRIER_PITCH, gridDim.y, blockIdx.y);\n",
        "        __syncthreads();\n",
        select=ORDER,
    ),
    Mutant(
        "long rows: groups share a barrier",
        SHARED,
        "counter + blockIdx.x * BARRIER_PITCH",
        "counter",
        select=f"{PIPELINE} or {ORDER}",
    ),
    Mutant(
        "long rows: the distances of the blocks' means are left out",
        MOMENTS,
        "fma(A(4) * share * a.count * half, half, a.m2 + b.m2)",
        "a.m2 + b.m2",
        select=FAR,
        among=TESTS,
    ),
    Mutant(
        "long rows: a distance of means overflows",
        MOMENTS,
        "fma(A(0.5), b.mean.high, -A(0.5) * a.mean.high)",
        "A(0.5) * (b.mean.high - a.mean.high)",
        select=SPECIAL,
        among=TESTS,
    ),
    Mutant(
        "long rows: merged means in one float",
        MOMENTS,
        "return {count, two_sum(high, low),",
        "return {count, {high, A(0)},",
        select=FAR,
        among=TESTS,
    ),
    Mutant(
        "long rows: nothing is a part",
        MOMENTS,
        "    if (a.count == A(0)) return b;\n",
        "",
        select=FAR,
        among=TESTS,
    ),
    Mutant(
        "long rows: all parts have the weight of the larger",
        MOMENTS,
        "share = b.count / count",
        "share = A(0.5)",
        select=AGAIN,
        among=TESTS,
    ),
    Mutant(
        "long rows forward: the first number before it is there",
        FORWARD,
        "        __syncthreads();\n        if (!a.centred) {",
        "        if (!a.centred) {",
        ("plain", "tsan"),
        select=ORDER,
    ),
    Mutant(
        "long rows forward: the copies of a row are not waited for",
        FORWARD,
        "wait_for_copies<1>();",
        "wait_for_copies<2>();",
        select=PIPELINE,
    ),
    Mutant(
        "long rows forward: the copies of a span are not waited for",
        FORWARD,
        "                share.ask(n, span, turn);\n                wait_for_copies<0>();\n",
        "                share.ask(n, span, turn);\n                wait_for_copies<1>();\n",
        select=AGAIN,
    ),
    Mutant(
        "long rows forward: the next row over the one in use",
        FORWARD,
        "share.ask(n + gridDim.x, 0, turn + 1);",
        "share.ask(n + gridDim.x, 0, turn);",
        select=PIPELINE,
    ),
    Mutant(
        "long rows forward: every span is taken for the one that is held",
        FORWARD,
        "return span == last ? held[k]",
        "return true ? held[k]",
        select=AGAIN,
    ),
    Mutant(
        "long rows forward: two blocks of a row",
        FORWARD,
        "split < gridDim.y; split += WARP",
        "split < 2; split += WARP",
        select="one_row_and_many",
    ),
    Mutant(
        "long rows forward: infinity times rstd 0", FORWARD, "if (rstd == A(0)) mean", "if (false) mean", select=SPECIAL
    ),
    Mutant(
        "long rows backward: the first terms are added to what was there",
        SHARED,
        "if (!first) sum = add",
        "if (true) sum = add",
        select=PIPELINE,
    ),
    Mutant(
        "long rows backward: later terms take the place of the first",
        BACKWARD,
        "summed <= (spans > 1 ? 1 : ROWS_IN_REGISTERS)",
        "true",
        select=PIPELINE,
    ),
    Mutant(
        "long rows backward: the last rows are in no column sum",
        BACKWARD,
        "spans > 1 || last ||",
        "spans > 1 ||",
        select=PIPELINE,
    ),
    Mutant(
        "long rows backward: terms of a span for the next one",
        BACKWARD,
        "if (spans > 1 || last",
        "if (last",
        select=AGAIN,
    ),
    Mutant(
        "long rows backward: spans are not copied again",
        BACKWARD,
        "                    if (span < spans - 1) {\n",
        "                    if (false) {\n",
        select=AGAIN,
    ),
    Mutant(
        "long rows backward: the copies of the next rows are those waited for",
        BACKWARD,
        "wait_for_copies<1>();",
        "wait_for_copies<2>();",
        select=PIPELINE,
    ),
    Mutant(
        "long rows backward: the copies of a span are not waited for",
        BACKWARD,
        "                part.ask();\n                wait_for_copies<0>();\n            }\n            part.add",
        "                part.ask();\n                wait_for_copies<1>();\n            }\n            part.add",
        select=AGAIN,
    ),
    Mutant(
        "long rows backward: the next rows over those in use",
        BACKWARD,
        "a.stages == 2 && turn % 2 ?",
        "false ?",
        select=PIPELINE,
    ),
    Mutant(
        "long rows backward: the rows of a turn share a place",
        BACKWARD,
        "a.at_once : 0) + i;",
        "a.at_once : 0);",
        select=PIPELINE,
    ),
    Mutant(
        "long rows backward: the sums of a turn are those of its first row",
        BACKWARD,
        "(split * a.at_once + i) * 2",
        "split * a.at_once * 2",
        select=PIPELINE,
    ),
    Mutant(
        "long rows backward: a sum over one that is still read",
        BACKWARD,
        "summed % 2 * 2 * blockDim.x / WARP",
        "0",
        ("plain", "tsan"),
        select=ORDER,
    ),
    Mutant(
        "long rows backward: groups are merged before all are done",
        BACKWARD,
        "        if (rows().blocks > 1)\n            grid_barrier(",
        "        if (false)\n            grid_barrier(",
        select=f"{ORDER} or {PIPELINE}",
    ),
    Mutant(
        "long rows backward: the first group alone",
        SHARED,
        "group < gridDim.x; group += step",
        "group < 1; group += step",
        select=PIPELINE,
    ),
]
