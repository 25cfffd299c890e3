// A whole sequence of an LSTM backwards, without a norm or with batch norm: the recurrent products too, in one launch.
//
// Formulas:  For every time step t, from the last on, those of lstm_backward.cu, and then dh = W_hh^T dh_part[t].
// Arrays:    As in lstm_backward.cu, of all steps: dy, cells, c_hat (T, N, H), gates, x_hat, h_hat, dx_part, dh_part
//            (T, N, 4, H), rstd and sums `pitch` elements from step to step. before: c0. dh (N, H): in the end the
//            gradient of h0. weight_hh (4, H, H). counts (T,): examples that every step has. barrier_counter: see
//            lib/sync/grid_barrier.cuh.
// Launch:    As lstm_forward_cooperative.cu; the shared memory after the weights as lstm_backward.cu.
// Traffic:   As T launches of lstm_backward.cu, and W_hh once. Every block reads dh_part of every step, from the L2
//            cache. One grid barrier a step.
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
    a.sums += t * a.sums_pitch;
    a.step = t;
    a.inverse_count = A(1) / a.counts[t];
    return a;
}

// Writes the gradients of the hidden state of the thread's pairs.
template <typename A>
__device__ __forceinline__ void multiply(const LstmBackward<A>& a, const A* dh_part, const Four<A>* weights) {
    for (Items<PLAIN> pair(a); pair.inside(); pair.advance()) {
        A sum = A(0);
        const Four<A>* const row = reinterpret_cast<const Four<A>*>(dh_part) + pair.n * a.units;  // 4 H columns
#pragma unroll 4
        for (int c = 0; c < (int)a.units; ++c) {
            const Four<A> gradient = row[c], weight = weights[c * blockDim.x + threadIdx.x];
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
    Team<A, NORM, COUNT> team(reinterpret_cast<A*>(weights + a.units * blockDim.x));
    const Items<PLAIN> own(a);
    for (long long c = threadIdx.y; c < GATES * a.units; c += blockDim.y)
        weights[c / 4 * blockDim.x + threadIdx.x].of[c % 4] = own.u < a.units ? a.weight_hh[c * a.units + own.u] : A(0);
#pragma unroll 1
    for (long long t = a.steps - 1; t >= 0; --t) {
        const LstmBackward<A> step = of_step(a, t);
        if constexpr (NORM == PLAIN)
            plain_step(step, team);
        else
            norm_step<NORM>(step, team);
        if (gridDim.x > 1)
            grid_barrier(a.barrier_counter, gridDim.x, blockIdx.x);
        else
            __syncthreads();
        multiply(step, NORM == PLAIN ? step.dx_part : step.dh_part, weights);
    }
}

#define LSTM_BACKWARD_COOPERATIVE(variant, suffix, norm, A)                                   \
    BNK_KERNEL(bnk_lstm_backward_cooperative_##variant##_##suffix, (LstmBackward<A>), 256, 1, \
               (lstm_sequence_backward<norm, A>))

LSTM_BACKWARD_COOPERATIVE(plain, f32, PLAIN, float)
LSTM_BACKWARD_COOPERATIVE(batch, f32, BATCH, float)
LSTM_BACKWARD_COOPERATIVE(plain, f64, PLAIN, double)
LSTM_BACKWARD_COOPERATIVE(batch, f64, BATCH, double)
