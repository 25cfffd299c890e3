// A time step of an LSTM backwards, before its products: output, norm of the cell, cell, gates, norms of both parts.
//
// Formulas:  With the names of lstm_forward.cu, z the argument of the second tanh, for examples that have the step:
//            dh[n,u]  = dy + (dh_n if the example ends with the step, else dh)
//            dz       = dh o (1 - tanh(z)^2),  dc = (dc_n if it ends, else dc) + through(c, gamma_c dz); plain: + dz
//            da       = dc g i (1 - i), dc before f (1 - f), dc i (1 - g^2), dh tanh(z) o (1 - o) of i, f, g, o
//            dc       = dc f, for the step before
//            dx_part  = through(X, gamma_x da),  dh_part = through(H, gamma_h da); plain: dx_part = da
//            through(v, q) = rstd (q - mean(q) - norm(v) mean(q norm(v))), means as of norm(v); with live = 0 rstd q
//            sums: over the examples, batch: of da (4, H), da norm(X) (4, H), da norm(H) (4, H), dz norm(c) (H,) and dz
//            (H,); plain: of da (4, H). An example without the step: dx_part = dh_part = 0, its dc stays.
// Arrays:    dy, dh, dh_n, dc_n, dc, before, cells, c_hat, dz (N, H); gates, x_hat, h_hat, dx_part, dh_part, da
//            (N, 4, H); the others as in lstm_forward.cu. dy, dh_n, dc_n may be null: 0. plain: c_hat, x_hat, h_hat,
//            rstd, the scales, beta_c, dh_part, da and dz are null; batch: cells, da and dz; layer: cells and sums. da
//            and dz are written: their sums over all examples and steps are left to the caller. C order.
// Launch:    As lstm_forward.cu; plain: as batch. Dynamic shared memory: plain 8, batch 24, layer 8 numbers for every
//            warp, times min(w, 32) by unit.
// Traffic:   Each array read once; dc, dx_part, dh_part, by example da and dz, written once. plain one barrier, others
//            two.
// Numerics:  In A, plain sums in a fixed order: deterministic.
// Reference: Cooijmans et al., Recurrent Batch Normalization, 2016, arXiv:1603.09025.
// Called by: bnkernels/ops/lstm/kernels.py
#include "lib/kernel.cuh"
#include "lib/recurrent/lstm_backward_step.cuh"

template <int NORM, typename A>
__device__ __forceinline__ void lstm_backward(LstmBackward<A> a) {
    take_constants(a);
    BNK_DYNAMIC_SHARED(A, shared);
    Team<A, NORM, NORM == PLAIN ? GATES : GATE_SUMS<NORM>> team(shared);
    if constexpr (NORM == PLAIN)
        plain_step(a, team);
    else
        norm_step<NORM>(a, team);
}

#define LSTM_BACKWARD(variant, suffix, norm, A, threads) \
    BNK_KERNEL(bnk_lstm_backward_##variant##_##suffix, (LstmBackward<A>), threads, 1, (lstm_backward<norm, A>))

LSTM_BACKWARD(plain, f32, PLAIN, float, 512)
LSTM_BACKWARD(batch, f32, BATCH, float, 512)
LSTM_BACKWARD(layer, f32, LAYER, float, 256)
LSTM_BACKWARD(plain, f64, PLAIN, double, 256)
LSTM_BACKWARD(batch, f64, BATCH, double, 256)
LSTM_BACKWARD(layer, f64, LAYER, double, 256)
