// A time step of an LSTM behind its products: the argument and the functions of lstm_forward.cu.
#pragma once

#include "lib/kernel.cuh"
#include "lib/numbers/activation.cuh"
#include "lib/numbers/rsqrt.cuh"
#include "lib/recurrent/step_items.cuh"
#include "lib/recurrent/step_statistic.cuh"

template <typename A>
struct LstmForward {
    A* x_part;
    A* h_part;
    const A* before;
    const A* bias;
    const A* gamma_x;
    const A* gamma_h;
    const A* gamma_c;
    const A* beta_c;
    A* gates;
    A* cells;
    A* c_hat;
    A* rstd;
    A* h;
    A* h_n;
    A* c_n;
    const int* lengths;
    A* mean_x;
    A* var_x;
    A* mean_h;
    A* var_h;
    A* mean_c;
    A* var_c;
    const A* weight_hh;  // from here on of a sequence alone, but for the sizes of a step
    const A* h0;
    const A* counts;
    unsigned* barrier_counter;
    long long rows, units, step, end, chosen;
    long long steps, tracked, gates_pitch, h_part_pitch, state_pitch, rstd_pitch;
    A eps, momentum, count, inverse_count;
    int live, moving, held;
};

// The sums of a step: by unit of the gates of both parts, by example of both parts.
template <int NORM>
constexpr int SUMS = NORM == BATCH ? PARTS * GATES : PARTS;
template <int NORM>
__device__ __forceinline__ constexpr int statistic_of(int part, int gate) {
    return NORM == BATCH ? part * GATES + gate : part;
}

// The products of a thread's pairs: those in registers, or the next ones.
template <typename A>
struct Products {
    A values[PARTS][GATES][HELD];
    bool there[HELD];

    template <int NORM>
    __device__ __forceinline__ void load(const LstmForward<A>& a, Items<NORM> items) {
#pragma unroll
        for (int k = 0; k < HELD; ++k) {
            there[k] = items.inside() && has_step(a, items.n);
            if (there[k])
#pragma unroll
                for (int gate = 0; gate < GATES; ++gate) {
                    values[0][gate][k] = a.x_part[items.gate(gate)];
                    values[1][gate][k] = a.h_part[items.gate(gate)];
                }
            items.advance();
        }
    }
};

// Calls work(items, products) for the pairs, HELD at a time.
template <int NORM, typename A, typename Work>
__device__ __forceinline__ void for_products(const LstmForward<A>& a, Products<A>& products, const Work& work) {
    Items<NORM> items(a);
    do {
        if (!a.held) products.load(a, items);
        work(items, products);
#pragma unroll
        for (int k = 0; k < HELD; ++k) items.advance();
    } while (!a.held && items.inside());
}

// Moves the population statistics of both products. All of them are read before one is written.
template <typename A>
__device__ __forceinline__ void move_population(const LstmForward<A>& a, const Items<BATCH>& first,
                                                const Statistic<A> (&statistics)[SUMS<BATCH>],
                                                const A (&vars)[SUMS<BATCH>]) {
    A mean[SUMS<BATCH>], of_var[SUMS<BATCH>];
#pragma unroll
    for (int i = 0; i < SUMS<BATCH>; ++i) {
        mean[i] = (i < GATES ? a.mean_x : a.mean_h)[first.column(i % GATES)];
        of_var[i] = (i < GATES ? a.var_x : a.var_h)[first.column(i % GATES)];
    }
#pragma unroll
    for (int i = 0; i < SUMS<BATCH>; ++i) {
        statistics[i].move(a, mean[i], of_var[i], vars[i]);
        // Named pointers: with g++ 12 and UBSan a store through a conditional one is lost.
        A *const to_mean = i < GATES ? a.mean_x : a.mean_h, *const to_var = i < GATES ? a.var_x : a.var_h;
        to_mean[first.column(i % GATES)] = mean[i];
        to_var[first.column(i % GATES)] = of_var[i];
    }
}

// Finds the statistics of both products. All threads must call.
template <int NORM, typename A, typename Shared>
__device__ __forceinline__ void find_statistics(const LstmForward<A>& a, Products<A>& products, Shared& team,
                                                Statistic<A> (&statistics)[SUMS<NORM>]) {
    constexpr int COUNT = SUMS<NORM>;
    const Items<NORM> first(a);
    const long long row = NORM == LAYER ? first.n : a.chosen, stride = a.units;
    A sums[COUNT] = {}, squares[COUNT] = {};
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        const A* const part = i < COUNT / PARTS ? a.x_part : a.h_part;
        const bool there = NORM == LAYER ? first.n < a.rows : first.u < a.units;
        const long long column = NORM == LAYER ? 0 : first.column(i % GATES);
        statistics[i].shift = there ? part[row * GATES * stride + column] : A(0);
        statistics[i].rest = A(0);
    }
    const auto add = [&](A(&to)[COUNT], bool squared) {
        for_products<NORM>(a, products, [&](const Items<NORM>&, const Products<A>& p) {
#pragma unroll
            for (int k = 0; k < HELD; ++k)
                if (p.there[k])
#pragma unroll
                    for (int j = 0; j < PARTS * GATES; ++j) {
                        const int i = statistic_of<NORM>(j / GATES, j % GATES);
                        const A d = statistics[i].centred(p.values[j / GATES][j % GATES][k]);
                        to[i] = squared ? fma(d, d, to[i]) : to[i] + d;
                    }
        });
        team.sum(to);
    };
    const A share = NORM == LAYER ? A(1) / A(GATES * a.units) : a.inverse_count;
    add(sums, false);
#pragma unroll
    for (int i = 0; i < COUNT; ++i) statistics[i].rest = sums[i] * share;
    add(squares, true);
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        squares[i] *= share;
        statistics[i].rstd = reciprocal_sqrt(squares[i] + a.eps);
    }
    if (!first.inside() || !first.speaks()) return;
    if constexpr (NORM == LAYER) {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) a.rstd[i * a.rows + first.n] = statistics[i].rstd;
    } else {
        if (a.moving) move_population(a, first, statistics, squares);
    }
}

template <typename A>
__device__ __forceinline__ void take_population(const LstmForward<A>& a, const Items<BATCH>& first,
                                                Statistic<A> (&statistics)[SUMS<BATCH>]) {
    if (!first.inside()) return;
#pragma unroll
    for (int i = 0; i < SUMS<BATCH>; ++i)
        statistics[i].take(i < GATES ? a.mean_x : a.mean_h, i < GATES ? a.var_x : a.var_h, first.column(i % GATES),
                           a.eps);
}

// The cells and output gates of a thread's pairs.
template <typename A>
struct Cells {
    A c[HELD], o[HELD];
    bool there[HELD];

    template <int NORM>
    __device__ __forceinline__ void load(const LstmForward<A>& a, Items<NORM> items) {
#pragma unroll
        for (int k = 0; k < HELD; ++k) {
            there[k] = items.inside() && has_step(a, items.n);
            if (there[k]) {
                c[k] = a.cells[items.state()];
                o[k] = a.gates[items.gate(GATES - 1)];
            }
            items.advance();
        }
    }
};

// Opens the gates of a pair and returns its cell; a: the inputs of the gates, which become the gates.
template <typename A, typename Pair>
__device__ __forceinline__ A next_cell(const LstmForward<A>& a, const Pair& pair, A (&gates)[GATES]) {
    const A before = a.before[pair.state()];
#pragma unroll
    for (int gate = 0; gate < GATES; ++gate) {
        gates[gate] = gate_of(gates[gate], gate == 2 ? TANH : SIGMOID).gate;
        a.gates[pair.gate(gate)] = gates[gate];
    }
    const A c = fma(gates[1], before, gates[0] * gates[2]);
    a.cells[pair.state()] = c;
    return c;
}

// Writes the hidden state of a pair, which is 0 where its example does not have the step.
template <typename A, typename Pair>
__device__ __forceinline__ void write_hidden(const LstmForward<A>& a, const Pair& pair, A c, A h) {
    a.h[pair.state()] = h;
    if (!ends_with_step(a, pair.n)) return;
    a.h_n[pair.state()] = h;
    a.c_n[pair.state()] = c;
}

template <typename A>
__device__ __forceinline__ void plain_step(const LstmForward<A>& a) {
    for (Items<PLAIN> pair(a); pair.inside(); pair.advance()) {
        A gates[GATES], c = A(0), h = A(0);
        if (has_step(a, pair.n)) {
#pragma unroll
            for (int gate = 0; gate < GATES; ++gate) {
                gates[gate] = a.x_part[pair.gate(gate)] + a.h_part[pair.gate(gate)];
                if (a.bias) gates[gate] += a.bias[pair.column(gate)];
            }
            c = next_cell(a, pair, gates);
            h = gates[3] * gate_of(c, TANH).gate;
        }
        write_hidden(a, pair, c, h);
    }
}

// Normalises the products, opens the gates, and computes the cells.
template <int NORM, typename A>
__device__ __forceinline__ void compute_cells(const LstmForward<A>& a, Products<A>& products, Cells<A>& cells,
                                              const Statistic<A> (&statistics)[SUMS<NORM>]) {
    for_products<NORM>(a, products, [&](Items<NORM> pair, const Products<A>& p) {
#pragma unroll
        for (int k = 0; k < HELD; ++k) {
            cells.there[k] = p.there[k];
            if (p.there[k]) {
                A gates[GATES];
#pragma unroll
                for (int gate = 0; gate < GATES; ++gate) {
                    const A x = statistics[statistic_of<NORM>(0, gate)](p.values[0][gate][k]);
                    const A h = statistics[statistic_of<NORM>(1, gate)](p.values[1][gate][k]);
                    const long long at = pair.gate(gate), column = pair.column(gate);
                    a.x_part[at] = x;
                    a.h_part[at] = h;
                    gates[gate] = fma(a.gamma_x[column], x, a.gamma_h[column] * h);
                    if (a.bias) gates[gate] += a.bias[column];
                }
                cells.c[k] = next_cell(a, pair, gates);
                cells.o[k] = gates[3];
            }
            pair.advance();
        }
    });
}

// Calls work(pair, there, c, o) for all pairs.
template <int NORM, typename A, typename Work>
__device__ __forceinline__ void for_cells(const LstmForward<A>& a, Cells<A>& cells, const Work& work) {
    Items<NORM> items(a);
    do {
        if (!a.held) cells.load(a, items);
#pragma unroll
        for (int k = 0; k < HELD; ++k) {
            if (items.inside()) work(items, cells.there[k], cells.c[k], cells.o[k]);
            items.advance();
        }
    } while (!a.held && items.inside());
}

// The statistics of the cells. All threads must call.
template <int NORM, typename A, typename Shared>
__device__ __forceinline__ Statistic<A> statistic_of_cells(const LstmForward<A>& a, Cells<A>& cells, Shared& team) {
    Statistic<A> found = {A(0), A(0), A(0)};
    const Items<NORM> first(a);
    if (NORM == BATCH && !a.live) {
        if (first.inside()) found.take(a.mean_c, a.var_c, first.u, a.eps);
    } else {
        A chosen = A(0), sum[1] = {A(0)}, squares[1] = {A(0)};
        bool mine = false;
        for_cells<NORM>(a, cells, [&](const Items<NORM>& pair, bool there, A c, A) {
            if (there && (NORM == LAYER ? pair.u == 0 : pair.n == a.chosen)) {
                chosen = c;
                mine = true;
            }
        });
        found.shift = team.take(chosen, mine);
        for_cells<NORM>(a, cells, [&](const Items<NORM>&, bool there, A c, A) {
            if (there) sum[0] += c - found.shift;
        });
        team.sum(sum);
        const A share = NORM == LAYER ? A(1) / A(a.units) : a.inverse_count;
        found.rest = sum[0] * share;
        for_cells<NORM>(a, cells, [&](const Items<NORM>&, bool there, A c, A) {
            const A d = found.centred(c);
            if (there) squares[0] = fma(d, d, squares[0]);
        });
        team.sum(squares);
        const A var = squares[0] * share;
        found.rstd = reciprocal_sqrt(var + a.eps);
        if (NORM == BATCH && a.moving && first.inside() && first.speaks())
            found.move(a, a.mean_c[first.u], a.var_c[first.u], var);
    }
    if (first.inside() && first.speaks())
        a.rstd[NORM == LAYER ? 2 * a.rows + first.n : 2 * GATES * a.units + first.u] = found.rstd;
    return found;
}

template <int NORM, typename A>
__device__ __forceinline__ void norm_step(const LstmForward<A>& a, Team<A, NORM, SUMS<NORM>>& team) {
    const Items<NORM> first(a);
    Products<A> products;
    Cells<A> cells;
    Statistic<A> statistics[SUMS<NORM>] = {};
    if (a.held) products.load(a, first);
    if constexpr (NORM == BATCH) {
        if (a.live)
            find_statistics<NORM>(a, products, team, statistics);
        else
            take_population(a, first, statistics);
        if (first.inside() && first.speaks())
#pragma unroll
            for (int i = 0; i < SUMS<NORM>; ++i)
                a.rstd[i / GATES * GATES * a.units + first.column(i % GATES)] = statistics[i].rstd;
    } else {
        find_statistics<NORM>(a, products, team, statistics);
    }
    compute_cells<NORM>(a, products, cells, statistics);
    const Statistic<A> of_cells = statistic_of_cells<NORM>(a, cells, team);
    for_cells<NORM>(a, cells, [&](const Items<NORM>& pair, bool there, A c, A o) {
        const A hat = of_cells(c);
        a.c_hat[pair.state()] = there ? hat : A(0);
        const A h = there ? o * gate_of(fma(a.gamma_c[pair.u], hat, a.beta_c[pair.u]), TANH).gate : A(0);
        write_hidden(a, pair, c, h);
    });
}
