"""The bugs that `mutants.py` plants in the merges of the one-block batch-norm kernels, and in sums out of range."""

from __future__ import annotations

from .mutants import Mutant

FORWARD, BACKWARD = "batch_norm_forward.cu", "batch_norm_backward.cu"
PARTS, GRADIENT_SUMS = "lib/reduce/parts.cuh", "lib/reduce/gradient_sums.cuh"
NORMALISATION = "lib/reduce/normalisation.cuh"

MUTANTS = [
    Mutant(
        "parts: no barrier before the merge",
        PARTS,
        "    __syncthreads();\n    Part<A>* const own",
        "    Part<A>* const own",
    ),
    Mutant(
        "parts: threads without a channel return before the barrier",
        PARTS,
        "    __syncthreads();\n    Part<A>* const own",
        "    if (!active) return {};\n    __syncthreads();\n    Part<A>* const own",
    ),
    Mutant("parts: no barrier between the levels of the merge", PARTS, "        __syncthreads();\n    }\n", "    }\n"),
    Mutant(
        "parts: the last worker is left out",
        PARTS,
        "if (first + i < number) work(",
        "if (first + i + 1 < number) work(",
    ),
    Mutant("parts: a mean out of range is not formed anew", PARTS, "if (!is_small(distance)) {", "if (false) {"),
    Mutant("parts: a worker's mean out of range is kept", PARTS, "if (is_small(mean)) return", "return"),
    Mutant("parts: a chunk out of range is added", PARTS, "if (is_small(of_part)) {", "if (true) {"),
    Mutant("parts: the distance of a chunk adds nothing", PARTS, "rest * rest * (count * share)", "A(0)"),
    Mutant(
        "parts: the low part of a mean is dropped",
        PARTS,
        "(part.high - shift) + part.low, sums",
        "part.high - shift, sums",
    ),
    Mutant("parts: the mean of three rows is that of four", PARTS, "A(1) / A(3)", "A(0.25)"),
    Mutant(
        "forward: rows beyond the last are read",
        FORWARD,
        "if (a.full || rows.inside())",
        "if (true)",
    ),
    Mutant(
        "forward: x - mean of a channel without a variance in range",
        NORMALISATION,
        "return rstd == A(0) ? Pair<A>{A(0), A(0)} : mean;",
        "return mean;",
    ),
    Mutant(
        "gradient sums: no barrier before the merge",
        GRADIENT_SUMS,
        "if (active) set(own);\n        __syncthreads();",
        "if (active) set(own);",
    ),
    Mutant(
        "gradient sums: no barrier between the levels of the merge",
        GRADIENT_SUMS,
        "            __syncthreads();\n        }\n",
        "        }\n",
    ),
    Mutant(
        "gradient sums: those out of range are not formed anew",
        GRADIENT_SUMS,
        "if (totals[0].small()) return",
        "return",
    ),
    Mutant("gradient sums: a scaled one counts as it is", GRADIENT_SUMS, "small ? A(SUM_UNIT) : A(1)", "A(SUM_UNIT)"),
    Mutant(
        "gradient sums: the last worker is left out",
        GRADIENT_SUMS,
        "if (first + i < number)",
        "if (first + i + 1 < number)",
    ),
    Mutant(
        "gradient sums: scaled ones are of any size", BACKWARD, "own.scaled = !own.sums.small();", "own.scaled = false;"
    ),
    Mutant(
        "backward: chunks that are added anew are not scaled",
        BACKWARD,
        "sums.add_chunk(chunk.sums(unit));",
        "sums.add_chunk(chunk.sums(A(1)));",
    ),
    Mutant("backward: chunks are taken as they are", BACKWARD, "if (scaled || found.small()) return", "return"),
]
