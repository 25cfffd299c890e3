// A time step of an LSTM behind its two products: norms of both, gates, cell, norm of the cell, hidden state.
//
// Formulas:  For gate k of unit u of example n, with the products X = W_ih x and H = W_hh h before:
//            a[n,k,u] = gamma_x[k,u] norm(X)[n,k,u] + gamma_h[k,u] norm(H)[n,k,u] + bias[k,u]; plain: X + H + bias
//            i, f, o  = sigmoid(a), g = tanh(a)
//            c[n,u]   = f before[n,u] + i g
//            h[n,u]   = o tanh(gamma_c[u] norm(c)[n,u] + beta_c[u]); plain: o tanh(c)
//            norm(v)  = (v - mean) rstd, rstd = 1 / sqrt(var + eps), var biased: batch: of every column over the
//            examples that have the step; with live = 0 of mean and var as they are given. layer: of X and of H over
//            the 4H gates of an example, of c over its H cells.
//            moving: mean = (1 - momentum) mean + momentum mean of the batch; var likewise, with count / (count - 1)
//            An example without the step: h = norm(c) = 0. Its last step: h_n = h, c_n = c.
// Arrays:    x_part, h_part (N, 4, H): X and H, overwritten by norm(X) and norm(H); plain: only read. before, cells,
//            c_hat, h, h_n, c_n (N, H); cells may be before, gates (N, 4, H) may be x_part. bias, gamma_x, gamma_h
//            (4, H), gamma_c, beta_c (H,); bias may be null. rstd: batch (9, H), of X, H and c; layer (3, N). mean_x,
//            var_x, mean_h, var_h (4, H), mean_c, var_c (H,): null if there are none. All of type A: float or double.
//            lengths (N,) of int, may be null: all have the step, and end with step `end`. chosen: an example that has
//            the step; count: how many have. C order.
// Launch:    plain, batch: by unit, grid (ceil(H/w), 1, 1). layer: by example, grid (ceil(N/r), 1, 1). See
//            lib/recurrent/step_items.cuh. No block waits for another. held: a thread has at most HELD pairs, which
//            stay in registers; else they are read again, from the cache. Dynamic shared memory: batch 16, layer 4
//            numbers for every warp, times min(w, 32) by unit; plain none. live and held are constants of the launch.
// Traffic:   X and H read once, norm(X), norm(H), gates, c, norm(c) and h written once. Batch and layer: five barriers.
// Numerics:  In A. Distances from the chosen example, or from the first gate or cell, in plain sums; then the squares
//            of distances from their mean. Equal numbers have exactly norm 0. E[x^2] - E[x]^2 is not used.
//            Deterministic.
// Reference: Cooijmans et al., Recurrent Batch Normalization, 2016, arXiv:1603.09025; Ba, Kiros and Hinton, Layer
//            Normalization, 2016, arXiv:1607.06450.
// Called by: bnkernels/ops/lstm/kernels.py
#include "lib/kernel.cuh"
#include "lib/recurrent/lstm_forward_step.cuh"

template <int NORM, typename A>
__device__ __forceinline__ void lstm_forward(LstmForward<A> a) {
    take_constants(a);
    if constexpr (NORM == PLAIN) {
        plain_step(a);
    } else {
        BNK_DYNAMIC_SHARED(A, shared);
        Team<A, NORM, SUMS<NORM>> team(shared);
        norm_step<NORM>(a, team);
    }
}

#define LSTM_FORWARD(variant, suffix, norm, A, threads) \
    BNK_KERNEL(bnk_lstm_forward_##variant##_##suffix, (LstmForward<A>), threads, 1, (lstm_forward<norm, A>))

LSTM_FORWARD(plain, f32, PLAIN, float, 512)
LSTM_FORWARD(batch, f32, BATCH, float, 512)
LSTM_FORWARD(layer, f32, LAYER, float, 256)
LSTM_FORWARD(plain, f64, PLAIN, double, 256)
LSTM_FORWARD(batch, f64, BATCH, double, 256)
LSTM_FORWARD(layer, f64, LAYER, double, 256)
