// A whole sequence of an LSTM: the recurrent products too, in one launch.
//
// Formulas:  For every time step t H = W_hh h[t-1], with h[-1] = h0, and then those of lstm_forward.cu.
// Arrays:    As in lstm_forward.cu, of all steps: x_part (T, N, 4, H), h (T, N, H); gates, h_part, cells, c_hat and
//            rstd `pitch` elements from step to step, 0 for those that are not kept. before: c0. weight_hh (4, H, H).
//            h0 (N, H). counts (T,): examples that every step has. mean_x to var_c (tracked, ...): a row for every
//            step, the last for those beyond. barrier_counter: see lib/sync/grid_barrier.cuh.
// Launch:    plain, batch: by unit, see lib/recurrent/step_items.cuh, grid (ceil(H/w), 1, 1), cooperative if that is
//            more than 1. layer: by example, grid (ceil(N/r), 1, 1), w >= H; no block waits for another. Dynamic shared
//            memory: by unit 4 w H numbers, which are the weights of the block's units, by example 4 H (H | 1), which
//            are all, and the hidden states of the block's examples, r H; then as lstm_forward.cu.
// Traffic:   As T launches of lstm_forward.cu, and W_hh once, or by example once in every block. By unit every block
//            reads the hidden state of every step, from the L2 cache; one grid barrier a step, but for the last.
// Numerics:  As in lstm_forward.cu; products are sums of A in the order of the units.
// Called by: bnkernels/ops/lstm/kernels.py
#include "lib/kernel.cuh"
#include "lib/recurrent/lstm_forward_step.cuh"
#include "lib/sync/grid_barrier.cuh"

// The argument of a step.
template <typename A>
__device__ __forceinline__ LstmForward<A> of_step(LstmForward<A> a, long long t) {
    const long long state = a.rows * a.units, row = t < a.tracked ? t : a.tracked - 1, columns = GATES * a.units;
    a.x_part += t * GATES * state;
    a.h_part += t * a.h_part_pitch;
    a.gates += t * a.gates_pitch;
    if (t > 0) a.before = a.cells + (t - 1) * a.state_pitch;
    a.cells += t * a.state_pitch;
    if (a.c_hat) a.c_hat += t * a.state_pitch;
    if (a.rstd) a.rstd += t * a.rstd_pitch;
    a.h += t * state;
    if (a.tracked) {
        a.mean_x += row * columns;
        a.var_x += row * columns;
        a.mean_h += row * columns;
        a.var_h += row * columns;
        a.mean_c += row * a.units;
        a.var_c += row * a.units;
    }
    a.step = t;
    a.count = a.counts[t];
    a.inverse_count = A(1) / a.count;
    a.moving = a.live && t < a.tracked && a.count > A(1);
    return a;
}

// Weights of a unit's gates for the hidden state of unit k.
template <typename A>
__device__ __forceinline__ Four<A> weights_of(const LstmForward<A>& a, long long u, long long k) {
    Four<A> found;
#pragma unroll
    for (int gate = 0; gate < GATES; ++gate)
        found.of[gate] = u < a.units ? a.weight_hh[(gate * a.units + u) * a.units + k] : A(0);
    return found;
}

// The weights are those of the gates of a unit of the block, of one unit before after the other.
template <int NORM, typename A>
__device__ __forceinline__ void load_weights(const LstmForward<A>& a, Four<A>* weights) {
    const Items<NORM> own(a);
    if constexpr (NORM == LAYER) {  // a warp along the units before, whose weights are neighbours
        const int thread = threadIdx.y * blockDim.x + threadIdx.x, warps = blockDim.x * blockDim.y / WARP;
        for (int k = thread % WARP; k < (int)a.units; k += WARP)
#pragma unroll 4
            for (int u = thread / WARP; u < (int)a.units; u += warps)
                weights[k * own.pitch() + u] = weights_of(a, u, k);
    } else {
        for (int k = threadIdx.y; k < (int)a.units; k += blockDim.y)
            weights[k * own.pitch() + own.place()] = weights_of(a, own.u, k);
    }
}

// Writes the recurrent products of the thread's pairs. rows: by example the hidden states of the block's examples.
template <int NORM, typename A>
__device__ __forceinline__ void multiply(const LstmForward<A>& a, const A* h, const Four<A>* weights, A* rows) {
    const int units = (int)a.units;
    if (NORM == LAYER) {  // a thread has written its own
        for (Items<NORM> pair(a); pair.inside(); pair.advance()) rows[threadIdx.y * units + pair.u] = h[pair.state()];
        __syncthreads();
    }
    for (Items<NORM> pair(a); pair.inside(); pair.advance()) {
        A sums[GATES] = {};
        const A* const row = NORM == LAYER ? rows + threadIdx.y * units : h + pair.n * units;
#pragma unroll 8
        for (int k = 0; k < units; ++k) {
            const A number = row[k];
            const Four<A> weight = weights[k * pair.pitch() + pair.place()];
#pragma unroll
            for (int gate = 0; gate < GATES; ++gate) sums[gate] = fma(number, weight.of[gate], sums[gate]);
        }
#pragma unroll
        for (int gate = 0; gate < GATES; ++gate) a.h_part[pair.gate(gate)] = sums[gate];
    }
    __syncthreads();
}

template <int NORM, typename A>
__device__ __forceinline__ void lstm_sequence_forward(LstmForward<A> a) {
    take_constants(a);
    BNK_DYNAMIC_SHARED(Four<A>, weights);
    constexpr int COUNT = SUMS<NORM>;
    A* const rows = reinterpret_cast<A*>(weights + a.units * Items<NORM>(a).pitch());
    Team<A, NORM, COUNT> team(NORM == LAYER ? rows + a.units * blockDim.y : rows);
    load_weights<NORM>(a, weights);
    __syncthreads();
    const A* h = a.h0;
#pragma unroll 1
    for (long long t = 0; t < a.steps; ++t) {
        const LstmForward<A> step = of_step(a, t);
        multiply<NORM>(step, h, weights, rows);
        if constexpr (NORM == PLAIN)
            plain_step(step);
        else
            norm_step<NORM>(step, team);
        h = step.h;
        if (NORM != LAYER && t + 1 < a.steps) {
            if (gridDim.x > 1)
                grid_barrier(a.barrier_counter, gridDim.x, blockIdx.x);
            else
                __syncthreads();
        }
    }
}

#define LSTM_FORWARD_COOPERATIVE(variant, suffix, norm, A)                                  \
    BNK_KERNEL(bnk_lstm_forward_cooperative_##variant##_##suffix, (LstmForward<A>), 256, 1, \
               (lstm_sequence_forward<norm, A>))

LSTM_FORWARD_COOPERATIVE(plain, f32, PLAIN, float)
LSTM_FORWARD_COOPERATIVE(batch, f32, BATCH, float)
LSTM_FORWARD_COOPERATIVE(layer, f32, LAYER, float)
LSTM_FORWARD_COOPERATIVE(plain, f64, PLAIN, double)
LSTM_FORWARD_COOPERATIVE(batch, f64, BATCH, double)
LSTM_FORWARD_COOPERATIVE(layer, f64, LAYER, double)
