"""The bugs that `mutants.py` plants in a time step of the LSTM."""

from __future__ import annotations

from .mutants import Mutant

FORWARD, BACKWARD = "lib/recurrent/lstm_forward_step.cuh", "lib/recurrent/lstm_backward_step.cuh"
ITEMS = "lib/recurrent/step_items.cuh"
STATISTIC = "lib/recurrent/step_statistic.cuh"
FORMULAS = "test_forward_is_its_formulas"
GRADIENTS = "test_gradients_are_those_of_the_reference"
RAGGED = "test_backward_is_central_differences or test_padding"
POPULATION = "population"
SCHEDULES = "test_the_order_of_blocks_and_threads_changes_no_bit"

MUTANTS = [
    Mutant(
        "lstm: the sums of half of a warp",
        ITEMS,
        "offset < WARP; offset *= 2",
        "offset < WARP / 2; offset *= 2",
        select=FORMULAS,
    ),
    Mutant("lstm: neighbouring units in one sum", ITEMS, "if (offset >= width)", "if (true)", select=FORMULAS),
    Mutant("lstm: one warp of a team", ITEMS, "warp < own; ++warp", "warp < 1; ++warp", select=FORMULAS),
    Mutant(
        "lstm: sums are read before all are there",
        ITEMS,
        "sums[i];\n        __syncthreads();",
        "sums[i];",
        ("plain", "tsan"),
        SCHEDULES,
    ),
    Mutant("lstm: one buffer for all sums", ITEMS, "turn % 2 ?", "false ?", ("plain", "tsan"), SCHEDULES),
    Mutant(
        "lstm: the number of a member before it is there",
        ITEMS,
        "*place = number;\n        __syncthreads();",
        "*place = number;",
        ("plain", "tsan"),
        SCHEDULES,
    ),
    Mutant(
        "lstm: an example has one step too many",
        ITEMS,
        "a.lengths[n] > a.step",
        "a.lengths[n] >= a.step",
        select=RAGGED,
    ),
    Mutant(
        "lstm: no example ends before the last", ITEMS, "a.lengths ? a.lengths[n] == a.step + 1 :", "", select=RAGGED
    ),
    Mutant(
        "lstm: cells of the wrong gates", ITEMS, "n * GATES + number", "n * GATES + GATES - 1 - number", select=FORMULAS
    ),
    Mutant("lstm: the candidate is a sigmoid", FORWARD, "gate == 2 ? TANH : SIGMOID", "SIGMOID", select=FORMULAS),
    Mutant("lstm: the cell forgets nothing", FORWARD, "fma(gates[1], before,", "fma(A(1), before,", select=FORMULAS),
    Mutant("lstm: no bias", FORWARD, "if (a.bias) gates[gate] += a.bias[column];", "", select=FORMULAS),
    Mutant(
        "lstm: a plain step without bias",
        FORWARD,
        "if (a.bias) gates[gate] += a.bias[pair",
        "if (false) gates[gate] += a.bias[pair",
        select=FORMULAS,
    ),
    Mutant(
        "lstm: both parts in one norm",
        FORWARD,
        "return NORM == BATCH ? part * GATES + gate : part;",
        "return NORM == BATCH ? gate : 0;",
        select=FORMULAS,
    ),
    Mutant(
        "lstm: variance about the first example",
        STATISTIC,
        "return (x - shift) - rest;",
        "return x - shift;",
        select=FORMULAS,
    ),
    Mutant(
        "lstm: a variance without its mean taken off",
        FORWARD,
        "squared ? fma(d, d, to[i])",
        "squared ? fma(d, A(1), to[i])",
        select=FORMULAS,
    ),
    Mutant(
        "lstm: the next step takes the normalised cell",
        FORWARD,
        "        const A hat = of_cells(c);\n",
        "        const A hat = of_cells(c);\n        if (there) a.cells[pair.state()] = hat;\n",
        select=FORMULAS,
    ),
    Mutant("lstm: the cell's norm without its shift", FORWARD, "hat, a.beta_c[pair.u])", "hat, A(0))", select=FORMULAS),
    Mutant(
        "lstm: padding keeps its hidden state",
        FORWARD,
        "const A h = there ? o * ",
        "const A h = true ? o * ",
        select=RAGGED,
    ),
    Mutant(
        "lstm: padding has a normalised cell",
        FORWARD,
        "a.c_hat[pair.state()] = there ? hat : A(0);",
        "if (there) a.c_hat[pair.state()] = hat;",
        select=RAGGED,
    ),
    Mutant(
        "lstm: the population's variance is biased",
        STATISTIC,
        "var * (a.count / (a.count - A(1)))",
        "var",
        select=POPULATION,
    ),
    Mutant(
        "lstm: the population takes what was left of the mean",
        STATISTIC,
        "shift + rest, keep",
        "shift, keep",
        select=POPULATION,
    ),
    Mutant(
        "lstm: all threads of a unit move the population",
        FORWARD,
        "if (!first.inside() || !first.speaks()) return;",
        "if (!first.inside()) return;",
        ("plain", "tsan"),
        POPULATION,
    ),
    Mutant(
        "lstm: inference normalises with the mini-batch",
        FORWARD,
        "        if (a.live)\n",
        "        if (true)\n",
        select="inference",
    ),
    Mutant(
        "lstm: pairs that are not held are read once",
        FORWARD,
        "} while (!a.held && items.inside());\n}\n\n// Moves",
        "} while (false);\n}\n\n// Moves",
        select=FORMULAS,
    ),
    Mutant(
        "lstm: eps behind the square root",
        FORWARD,
        "reciprocal_sqrt(squares[i] + a.eps)",
        "A(1) / (sqrt(squares[i]) + a.eps)",
        select=FORMULAS,
    ),
    Mutant(
        "lstm backward: the last state has no gradient",
        BACKWARD,
        "a.dh_n ? a.dh_n[at] : A(0)",
        "A(0)",
        select=GRADIENTS,
    ),
    Mutant(
        "lstm backward: the last cell has no gradient", BACKWARD, "a.dc_n ? a.dc_n[at] : A(0)", "A(0)", select=GRADIENTS
    ),
    Mutant("lstm backward: the outputs have no gradients", BACKWARD, "if (a.dy) dh += a.dy[at];", "", select=GRADIENTS),
    Mutant(
        "lstm backward: the candidate's derivative is a sigmoid's",
        BACKWARD,
        "fma(-g, g, A(1))",
        "g * (A(1) - g)",
        select=GRADIENTS,
    ),
    Mutant(
        "lstm backward: the cell keeps its gradient", BACKWARD, "a.dc[at] = dc * f;", "a.dc[at] = dc;", select=GRADIENTS
    ),
    Mutant(
        "lstm backward: no mean is taken off",
        BACKWARD,
        "fma(-hat, slope, da - mean)",
        "fma(-hat, slope, da)",
        select=GRADIENTS,
    ),
    Mutant(
        "lstm backward: no slope is taken off by example",
        BACKWARD,
        "rstd * fma(-hat, slope, fma(gamma, da, -mean))",
        "rstd * fma(gamma, da, -mean)",
        select=GRADIENTS,
    ),
    Mutant(
        "lstm backward: the means of all examples, also of padding",
        BACKWARD,
        "const A mean = of_cells[0] * share,",
        "const A mean = of_cells[0] * (NORM == BATCH ? A(1) / A(a.rows) : share),",
        select=RAGGED,
    ),
    Mutant(
        "lstm backward: statistics of inference have gradients",
        BACKWARD,
        "A(GATES * a.units) : a.live ? a.inverse_count : A(0)",
        "A(GATES * a.units) : a.inverse_count",
        select="inference",
    ),
    Mutant(
        "lstm backward: the input's gradients in place of the state's",
        BACKWARD,
        "gamma[1][gate] = a.gamma_h[column];",
        "gamma[1][gate] = a.gamma_x[column];",
        select=GRADIENTS,
    ),
    Mutant(
        "lstm backward: padding has gradients",
        BACKWARD,
        "        a.dx_part[pair.gate(gate)] = A(0);\n",
        "",
        select=RAGGED,
    ),
    Mutant(
        "lstm backward: gradients of the cell's scale and shift change places",
        BACKWARD,
        "a.sums[3 * columns + first.u] = of_cells[1];",
        "a.sums[3 * columns + first.u] = of_cells[0];",
        select=GRADIENTS,
    ),
    Mutant(
        "lstm backward: gates of padding are in the sums", BACKWARD, "a.da[pair.gate(gate)] = A(0);", ";", select=RAGGED
    ),
    Mutant(
        "lstm backward: pairs that are not held are lost",
        BACKWARD,
        "} while (!a.held && pair.inside());",
        "} while (false);",
        select=GRADIENTS,
    ),
    Mutant(
        "lstm backward: what is not held is not kept",
        BACKWARD,
        "if (NORM == BATCH && !a.held) a.dx_part[at] = da[gate];",
        "",
        select=GRADIENTS,
    ),
]
