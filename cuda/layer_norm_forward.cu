// Layer norm of every example over its features, scale, shift and activation, in one launch.
//
// Formulas:  Over the C values of a row:
//            mean[n], m2[n] = sum (x - mean)^2, var = m2 / C, rstd = 1 / sqrt(var + eps)
//            y = phi(gamma[c] rstd (x - mean) + beta[c])
// Arrays:    x, y (N, C) of type T, C order; y may alias x. gamma, beta (C,) of the accumulator's type A, may be null
//            (1, 0). statistics (3, N): mean, mean_low, rstd, of type A.
// Launch:    Block (w, r, 1), w a power of two and w r a multiple of 32, grid (ceil(N / r), 1, 1): the w threads with
//            the same threadIdx.y share a row. Dynamic shared memory: a Pair<A> for every warp, and `held` vectors of
//            16 bytes for every thread, 0 if rows are not held.
// Traffic:   x read once (three times if rows are too long to be held), y written once, gamma and beta from the cache.
// Numerics:  In A, sums in pairs, squares about the mean, in a fixed order: deterministic. Alignment changes no bit.
// Reference: Ba, Kiros and Hinton, Layer Normalization, 2016, arXiv:1607.06450.
// Called by: bnkernels/ops/layer_norm/op.py
#include "lib/kernel.cuh"
#include "lib/numbers/activation.cuh"
#include "lib/reduce/vector_rows.cuh"

template <typename T, typename A>
struct LayerNormForward {
    const T* x;
    const A* gamma;
    const A* beta;
    T* y;
    A* statistics;
    long long rows, columns;
    A eps, alpha;
    int activation, aligned16, held;
};

template <typename T, typename A>
__device__ __forceinline__ void layer_norm_forward(const LayerNormForward<T, A>& a) {
    BNK_DYNAMIC_SHARED(Vector, shared);
    const ThreadVectors held(shared);
    Pair<A>* const scratch = reinterpret_cast<Pair<A>*>(shared + a.held * held.threads);
    const VectorRows rows = {a.columns, a.aligned16 != 0};
    const long long n = (long long)blockIdx.x * blockDim.y + threadIdx.y;
    const long long units = n < a.rows ? rows.units<T>() : 0;  // all threads take part in the sums
    const T* const x = a.x + n * a.columns;
    const auto x_of = [&](int k, long long unit) { return a.held ? held[k] : rows.load(x, unit); };
    Pair<A> sum = {A(0), A(0)}, square = sum;
    if (a.held) for_each_unit<4>(0, units, [&](int k, long long unit) { held[k] = rows.load(x, unit); });
    for_each_unit(0, units, [&](int k, long long unit) {
        const Vector values = x_of(k, unit);
#pragma unroll
        for (int i = 0; i < UNIT<T>; ++i) sum = add(sum, Packed<T>::get(values, i));
    });
    const Pair<A> mean = divide(row_sum(sum, scratch), A(a.columns));
    for_each_unit(0, units, [&](int k, long long unit) {
        const Vector values = x_of(k, unit);
#pragma unroll
        for (int i = 0; i < UNIT<T>; ++i) {
            const A d = subtract(Packed<T>::get(values, i), mean);
            if (rows.has<T>(unit, i)) square = add(square, d * d);
        }
    });
    const A rstd = A(1) / sqrt(value(row_sum(square, scratch)) / A(a.columns) + a.eps);
    if (threadIdx.x == 0 && units) {
        a.statistics[n] = mean.high;
        a.statistics[a.rows + n] = mean.low;
        a.statistics[2 * a.rows + n] = rstd;
    }
    for_each_unit(0, units, [&](int k, long long unit) {
        const Vector values = x_of(k, unit);
        A gamma[UNIT<T>], z[UNIT<T>];
        rows.load_parameters<T>(gamma, a.gamma, unit, A(1));
        rows.load_parameters<T>(z, a.beta, unit, A(0));
#pragma unroll
        for (int i = 0; i < UNIT<T>; ++i) z[i] = fma(gamma[i] * rstd, subtract(Packed<T>::get(values, i), mean), z[i]);
        activate_all(z, a.activation, a.alpha);
        rows.store(a.y + n * a.columns, unit, z);
    });
}

#define LAYER_NORM_FORWARD(suffix, T, A) \
    BNK_KERNEL(bnk_layer_norm_forward_##suffix, (LayerNormForward<T, A>), 256, 2, (layer_norm_forward<T, A>))

LAYER_NORM_FORWARD(f32, float, float)
LAYER_NORM_FORWARD(f16, Float16, float)
LAYER_NORM_FORWARD(bf16, BFloat16, float)
LAYER_NORM_FORWARD(f64, double, double)
