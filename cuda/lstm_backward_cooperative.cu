// A whole sequence of an LSTM backwards: the recurrent products too, in one launch.
//
// Formulas:  For every time step t, from the last on, those of lstm_backward.cu, and then dh = W_hh^T dh_part[t].
// Arrays:    As in lstm_backward.cu, of all steps: dy, cells, c_hat, dz (T, N, H), gates, x_hat, h_hat, dx_part,
//            dh_part, da (T, N, 4, H), rstd and sums `pitch` elements from step to step. before: c0. dh (N, H): in the
//            end the gradient of h0. weight_hh (4, H, H). counts (T,): examples that every step has. barrier_counter:
//            see lib/sync/grid_barrier.cuh.
// Launch:    As lstm_forward_cooperative.cu, by example with 4 r H numbers, dh_part of the block's examples; then as
//            lstm_backward.cu.
// Traffic:   As T launches of lstm_backward.cu, and W_hh once, or by example once in every block. By unit every block
//            reads dh_part of every step, from the L2 cache; one grid barrier a step.
// Numerics:  As in lstm_backward.cu; products are sums of A in the order of the columns.
// Called by: bnkernels/ops/lstm/kernels.py
#include "lib/kernel.cuh"
#include "lib/recurrent/lstm_backward_step.cuh"
#include "lib/sync/grid_barrier.cuh"

// The argument of a step.
template <typename A>
__device__ __forceinline__ LstmBackward<A> of_step(LstmBackward<A> a, long long t) {
    const long long state = a.rows * a.units;
    if (a.dy) a.dy += t * state;
    a.gates += t * GATES * state;
    if (t > 0) a.before = a.states + (t - 1) * state;
    if (a.cells) a.cells += t * state;
    if (a.c_hat) {
        a.c_hat += t * state;
        a.x_hat += t * GATES * state;
        a.h_hat += t * GATES * state;
        a.rstd += t * a.rstd_pitch;
        a.dh_part += t * GATES * state;
    }
    a.dx_part += t * GATES * state;
    if (a.sums) a.sums += t * a.sums_pitch;
    if (a.da) {
        a.da += t * GATES * state;
        a.dz += t * state;
    }
    a.step = t;
    a.inverse_count = A(1) / a.counts[t];
    return a;
}

// The weights are those of the units of the block, of four gates after the other.
template <int NORM, typename A>
__device__ __forceinline__ void load_weights(const LstmBackward<A>& a, Four<A>* weights) {
    const Items<NORM> own(a);
    const bool there = own.u < a.units;
#pragma unroll 4
    for (int c = threadIdx.y; c < GATES * (int)a.units; c += blockDim.y)
        if (NORM != LAYER || there)
            weights[c / 4 * own.pitch() + own.place()].of[c % 4] = there ? a.weight_hh[c * a.units + own.u] : A(0);
}

// Writes the gradients of the hidden state of the thread's pairs. rows: by example dh_part of the block's examples.
template <int NORM, typename A>
__device__ __forceinline__ void multiply(const LstmBackward<A>& a, const A* dh_part, const Four<A>* weights,
                                         Four<A>* rows) {
    const int units = (int)a.units;
    if (NORM == LAYER) {  // a thread has written its own
        A* const numbers = reinterpret_cast<A*>(rows + threadIdx.y * units);
        for (Items<NORM> pair(a); pair.inside(); pair.advance())
#pragma unroll
            for (int gate = 0; gate < GATES; ++gate) numbers[pair.column(gate)] = dh_part[pair.gate(gate)];
        __syncthreads();
    }
    for (Items<NORM> pair(a); pair.inside(); pair.advance()) {
        A sum = A(0);
        const Four<A>* const row =
            NORM == LAYER ? rows + threadIdx.y * units : reinterpret_cast<const Four<A>*>(dh_part) + pair.n * units;
#pragma unroll 8
        for (int c = 0; c < units; ++c) {
            const Four<A> gradient = row[c], weight = weights[c * pair.pitch() + pair.place()];
#pragma unroll
            for (int i = 0; i < 4; ++i) sum = fma(gradient.of[i], weight.of[i], sum);
        }
        a.dh[pair.state()] = sum;
    }
}

template <int NORM, typename A>
__device__ __forceinline__ void lstm_sequence_backward(LstmBackward<A> a) {
    take_constants(a);
    BNK_DYNAMIC_SHARED(Four<A>, weights);
    constexpr int COUNT = NORM == PLAIN ? GATES : GATE_SUMS<NORM>;
    Four<A>* const rows = weights + a.units * Items<NORM>(a).pitch();
    Team<A, NORM, COUNT> team(reinterpret_cast<A*>(NORM == LAYER ? rows + a.units * blockDim.y : rows));
    load_weights<NORM>(a, weights);
#pragma unroll 1
    for (long long t = a.steps - 1; t >= 0; --t) {
        const LstmBackward<A> step = of_step(a, t);
        if constexpr (NORM == PLAIN)
            plain_step(step, team);
        else
            norm_step<NORM>(step, team);
        if (NORM != LAYER) {
            if (gridDim.x > 1)
                grid_barrier(a.barrier_counter, gridDim.x, blockIdx.x);
            else
                __syncthreads();
        }
        multiply<NORM>(step, NORM == PLAIN ? step.dx_part : step.dh_part, weights, rows);
    }
}

#define LSTM_BACKWARD_COOPERATIVE(variant, suffix, norm, A)                                   \
    BNK_KERNEL(bnk_lstm_backward_cooperative_##variant##_##suffix, (LstmBackward<A>), 256, 1, \
               (lstm_sequence_backward<norm, A>))

LSTM_BACKWARD_COOPERATIVE(plain, f32, PLAIN, float)
LSTM_BACKWARD_COOPERATIVE(batch, f32, BATCH, float)
LSTM_BACKWARD_COOPERATIVE(layer, f32, LAYER, float)
LSTM_BACKWARD_COOPERATIVE(plain, f64, PLAIN, double)
LSTM_BACKWARD_COOPERATIVE(batch, f64, BATCH, double)
LSTM_BACKWARD_COOPERATIVE(layer, f64, LAYER, double)
