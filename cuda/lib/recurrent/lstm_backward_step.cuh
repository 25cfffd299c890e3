// A time step of an LSTM backwards, before its products: the argument and the functions of lstm_backward.cu.
#pragma once

#include "lib/kernel.cuh"
#include "lib/numbers/activation.cuh"
#include "lib/recurrent/step_items.cuh"

template <typename A>
struct LstmBackward {
    const A* dy;
    A* dh;
    const A* dh_n;
    const A* dc_n;
    A* dc;
    const A* gates;
    const A* before;
    const A* cells;
    const A* c_hat;
    const A* x_hat;
    const A* h_hat;
    const A* rstd;
    const A* gamma_x;
    const A* gamma_h;
    const A* gamma_c;
    const A* beta_c;
    A* dx_part;
    A* dh_part;
    A* da;
    A* dz;
    A* sums;
    const int* lengths;
    const A* states;  // cells of all steps; from here on of a sequence alone, but for the sizes of a step
    const A* weight_hh;
    const A* counts;
    unsigned* barrier_counter;
    long long rows, units, step, end;
    long long steps, rstd_pitch, sums_pitch;
    A inverse_count;
    int live, held;
};

// The gradients of a pair behind its output gate: of the cell's norm or the cell, and of the output gate; norm(c);
// whether its example ends with the step.
template <typename A>
struct OutputGradient {
    A dz, of_o, c_hat;
    bool ends;
};

template <int NORM, typename A>
__device__ __forceinline__ OutputGradient<A> through_output(const LstmBackward<A>& a, const Items<NORM>& pair) {
    const long long at = pair.state();
    OutputGradient<A> found = {A(0), A(0), A(0), ends_with_step(a, pair.n)};
    A z;
    if (NORM == PLAIN) {
        z = a.cells[at];
    } else {
        found.c_hat = a.c_hat[at];
        z = fma(a.gamma_c[pair.u], found.c_hat, a.beta_c[pair.u]);
    }
    A dh = found.ends ? (a.dh_n ? a.dh_n[at] : A(0)) : a.dh[at];
    if (a.dy) dh += a.dy[at];
    const Gate<A> tanh = gate_of(z, TANH);
    const A o = a.gates[pair.gate(GATES - 1)];
    found.dz = dh * o * tanh.density;
    found.of_o = dh * tanh.gate * o * (A(1) - o);
    return found;
}

// The gradients of a pair's gates from that of its cell; writes that of the cell before.
template <int NORM, typename A>
__device__ __forceinline__ void through_gates(const LstmBackward<A>& a, const Items<NORM>& pair, A more,
                                              const OutputGradient<A>& output, A (&da)[GATES]) {
    const long long at = pair.state();
    const A dc = (output.ends ? (a.dc_n ? a.dc_n[at] : A(0)) : a.dc[at]) + more;
    const A i = a.gates[pair.gate(0)], f = a.gates[pair.gate(1)], g = a.gates[pair.gate(2)];
    da[0] = dc * g * i * (A(1) - i);
    da[1] = dc * a.before[at] * f * (A(1) - f);
    da[2] = dc * i * fma(-g, g, A(1));
    da[3] = output.of_o;
    a.dc[at] = dc * f;
}

template <typename A>
__device__ __forceinline__ void plain_step(const LstmBackward<A>& a, Team<A, PLAIN, GATES>& team) {
    A sums[GATES] = {};
    for (Items<PLAIN> pair(a); pair.inside(); pair.advance()) {
        A da[GATES] = {};
        if (has_step(a, pair.n)) {
            const OutputGradient<A> output = through_output(a, pair);
            through_gates(a, pair, output.dz, output, da);
        }
#pragma unroll
        for (int gate = 0; gate < GATES; ++gate) {
            a.dx_part[pair.gate(gate)] = da[gate];
            sums[gate] += da[gate];
        }
    }
    team.sum(sums);
    const Items<PLAIN> first(a);
    if (!first.inside() || !first.speaks()) return;
#pragma unroll
    for (int gate = 0; gate < GATES; ++gate) a.sums[first.column(gate)] = sums[gate];
}

// Gradients of gates: by unit their sums, and those with both normalised parts; by example the sums of both scaled, and
// with the normalised parts.
template <int NORM>
constexpr int GATE_SUMS = NORM == BATCH ? 3 * GATES : 2 * PARTS;

// The numbers of a thread's pairs that stay in registers.
template <typename A>
struct Gradients {
    OutputGradient<A> output[HELD];
    A da[GATES][HELD], hats[PARTS][GATES][HELD];
    bool there[HELD];
};

// Calls work(pair, k, there) for the pairs of a thread, HELD at a time; k: the place in registers.
template <int NORM, typename A, typename Work>
__device__ __forceinline__ void for_pairs(const LstmBackward<A>& a, const Gradients<A>& kept, const Work& work) {
    Items<NORM> pair(a);
    do {
#pragma unroll
        for (int k = 0; k < HELD; ++k) {
            if (pair.inside()) work(pair, k, a.held ? kept.there[k] : has_step(a, pair.n));
            pair.advance();
        }
    } while (!a.held && pair.inside());
}

// The gradients of gates, and the sums of these. sums: of dz, scaled by example, and dz norm(c), over the team.
template <int NORM, typename A>
__device__ __forceinline__ void gates_and_sums(const LstmBackward<A>& a, Gradients<A>& kept, const A (&of_cells)[2],
                                               A (&sums)[GATE_SUMS<NORM>]) {
    const A share = NORM == LAYER ? A(1) / A(a.units) : a.live ? a.inverse_count : A(0);
    const A mean = of_cells[0] * share, slope = of_cells[1] * share;
    for_pairs<NORM>(a, kept, [&](const Items<NORM>& pair, int k, bool there) {
        if (!there) return;
        const OutputGradient<A> output = a.held ? kept.output[k] : through_output(a, pair);
        const A rstd = a.rstd[NORM == LAYER ? 2 * a.rows + pair.n : 2 * GATES * a.units + pair.u];
        const A gamma = a.gamma_c[pair.u];
        const A through = NORM == LAYER ? fma(-output.c_hat, slope, fma(gamma, output.dz, -mean))
                                        : gamma * fma(-output.c_hat, slope, output.dz - mean);
        A da[GATES];
        through_gates(a, pair, rstd * through, output, da);
        if (NORM == LAYER) a.dz[pair.state()] = output.dz;
#pragma unroll
        for (int gate = 0; gate < GATES; ++gate) {
            const long long at = pair.gate(gate);
            const A x = a.x_hat[at], h = a.h_hat[at];
            if (NORM == LAYER) a.da[at] = da[gate];
            if (NORM == BATCH && !a.held) a.dx_part[at] = da[gate];
            if (a.held) {
                kept.da[gate][k] = da[gate];
                kept.hats[0][gate][k] = x;
                kept.hats[1][gate][k] = h;
            }
            if (NORM == BATCH) {
                sums[gate] += da[gate];
                sums[GATES + gate] = fma(da[gate], x, sums[GATES + gate]);
                sums[2 * GATES + gate] = fma(da[gate], h, sums[2 * GATES + gate]);
            } else {
                const A of_x = a.gamma_x[pair.column(gate)] * da[gate], of_h = a.gamma_h[pair.column(gate)] * da[gate];
                sums[0] += of_x;
                sums[1] = fma(of_x, x, sums[1]);
                sums[2] += of_h;
                sums[3] = fma(of_h, h, sums[3]);
            }
        }
    });
}

// The gradient of a number that was normalised, by unit with the scale in front.
template <int NORM, typename A>
__device__ __forceinline__ A through_norm(A da, A gamma, A hat, A rstd, A mean, A slope) {
    if (NORM == LAYER) return rstd * fma(-hat, slope, fma(gamma, da, -mean));
    return rstd * gamma * fma(-hat, slope, da - mean);
}

// Writes the gradients of a pair whose example does not have the step.
template <int NORM, typename A>
__device__ __forceinline__ void write_zeros(const LstmBackward<A>& a, const Items<NORM>& pair) {
    if (NORM == LAYER) a.dz[pair.state()] = A(0);
#pragma unroll
    for (int gate = 0; gate < GATES; ++gate) {
        a.dx_part[pair.gate(gate)] = A(0);
        a.dh_part[pair.gate(gate)] = A(0);
        if (NORM == LAYER) a.da[pair.gate(gate)] = A(0);
    }
}

// Writes the gradients of both parts from the sums over the team.
template <int NORM, typename A>
__device__ __forceinline__ void write_parts(const LstmBackward<A>& a, const Gradients<A>& kept,
                                            const A (&sums)[GATE_SUMS<NORM>]) {
    const A share = NORM == LAYER ? A(1) / A(GATES * a.units) : a.live ? a.inverse_count : A(0);
    const A* const of_gates = NORM == LAYER ? a.da : a.dx_part;
    for_pairs<NORM>(a, kept, [&](const Items<NORM>& pair, int k, bool there) {
        if (!there) {
            write_zeros(a, pair);
            return;
        }
        A da[GATES], hats[PARTS][GATES], gamma[PARTS][GATES], rstd[PARTS][GATES];  // all are read before one is written
#pragma unroll
        for (int gate = 0; gate < GATES; ++gate) {
            const long long at = pair.gate(gate), column = pair.column(gate);
            da[gate] = a.held ? kept.da[gate][k] : of_gates[at];
            hats[0][gate] = a.held ? kept.hats[0][gate][k] : a.x_hat[at];
            hats[1][gate] = a.held ? kept.hats[1][gate][k] : a.h_hat[at];
            gamma[0][gate] = a.gamma_x[column];
            gamma[1][gate] = a.gamma_h[column];
            rstd[0][gate] = a.rstd[NORM == LAYER ? pair.n : column];
            rstd[1][gate] = a.rstd[NORM == LAYER ? a.rows + pair.n : GATES * a.units + column];
        }
#pragma unroll
        for (int gate = 0; gate < GATES; ++gate) {
            A through[PARTS];
#pragma unroll
            for (int part = 0; part < PARTS; ++part) {
                const A mean = share * sums[NORM == LAYER ? 2 * part : gate];
                const A slope = share * sums[NORM == LAYER ? 2 * part + 1 : (part + 1) * GATES + gate];
                through[part] =
                    through_norm<NORM>(da[gate], gamma[part][gate], hats[part][gate], rstd[part][gate], mean, slope);
            }
            a.dx_part[pair.gate(gate)] = through[0];
            a.dh_part[pair.gate(gate)] = through[1];
        }
    });
}

template <int NORM, typename A>
__device__ __forceinline__ void norm_step(const LstmBackward<A>& a, Team<A, NORM, GATE_SUMS<NORM>>& team) {
    Gradients<A> kept;
    A of_cells[2] = {}, of_gates[GATE_SUMS<NORM>] = {};
    Items<NORM> pair(a);
#pragma unroll
    for (int k = 0; k < HELD; ++k) {
        kept.there[k] = pair.inside() && has_step(a, pair.n);
        pair.advance();
    }
    for_pairs<NORM>(a, kept, [&](const Items<NORM>& pair, int k, bool there) {
        if (!there) return;
        const OutputGradient<A> output = through_output(a, pair);
        if (a.held) kept.output[k] = output;
        const A scaled = NORM == LAYER ? a.gamma_c[pair.u] * output.dz : output.dz;
        of_cells[0] += scaled;
        of_cells[1] = fma(scaled, output.c_hat, of_cells[1]);
    });
    team.sum(of_cells);
    gates_and_sums<NORM>(a, kept, of_cells, of_gates);
    team.sum(of_gates);
    write_parts<NORM>(a, kept, of_gates);
    const Items<NORM> first(a);
    if (NORM == LAYER || !first.inside() || !first.speaks()) return;
    const long long columns = GATES * a.units;
#pragma unroll
    for (int i = 0; i < GATE_SUMS<NORM>; ++i) a.sums[i / GATES * columns + first.column(i % GATES)] = of_gates[i];
    a.sums[3 * columns + first.u] = of_cells[1];
    a.sums[3 * columns + a.units + first.u] = of_cells[0];
}
