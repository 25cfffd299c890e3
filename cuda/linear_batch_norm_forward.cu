// Linear layer with batch norm, layer norm or a bias, and an activation, in one launch.
//
// Formulas:  z = x W, rounded to T
//            batch norm: over the N examples mean[m], m2[m] = sum (z - mean)^2, var = m2 / N,
//                        rstd = 1 / sqrt(var + eps), y = phi(gamma rstd (z - mean) + beta),
//                        running statistics as in batch_norm_forward.cu
//            layer norm: the same over the M neurons of each example n, without running statistics
//            no norm:    y = phi(z + beta)
// Arrays:    x (N, K), weight (K, M), z, y (N, M), of type T. statistics (3, M), with layer norm (3, N): mean,
//            mean_low, rstd; null: no norm. gamma, beta, running_mean, running_var (M,), of the accumulator's type A;
//            each may be null. C order.
// Launch:    Block (256, 1, 1), grid (ceil(M / width), 1, 1), dynamic shared memory for a product and a tile (width,
//            pitch) of A: a block owns `width` neurons for the whole mini-batch, at most 512 examples. Layer norm: a
//            block owns `width` examples with all of their neurons, at most 1024; grid (ceil(N / width), 1, 1).
// Traffic:   z and y written once, weight read once, x read by every block (after the first from the L2 cache). Batch
//            norm adds 3 M words of statistics and no barrier. Layer norm: x read once, weight by every block.
// Numerics:  Products as in lib/gemm/product.cuh: 16-bit ones on tensor cores, whose rounding of sums of 16 terms
//            NVIDIA does not specify, as are floats by the kernels tf32x3, from sm_80 on; others in A with fma, terms
//            in a fixed order. z is rounded before its statistics are taken, which equal those of batch_norm_forward.cu
//            up to rounding: the mean is corrected by the mean of the remainders. Sums of z do not overflow; a variance
//            out of range counts as infinite. Deterministic.
// Reference: Ioffe and Szegedy, Batch Normalization, 2015, arXiv:1502.03167, algorithm 1; Ba, Kiros and Hinton, Layer
//            Normalization, 2016, arXiv:1607.06450.
// Called by: bnkernels/ops/linear_batch_norm/op.py
#include "lib/gemm/product.cuh"
#include "lib/gemm/warp_rows.cuh"
#include "lib/kernel.cuh"

template <typename T, typename A>
struct LinearBatchNormForward {
    const T* x;
    const T* weight;
    const A* gamma;
    const A* beta;
    T* z;
    T* y;
    A* statistics;
    A* running_mean;
    A* running_var;
    long long rows, inputs, outputs, width, buffers;
    A momentum, correction, eps, alpha;
    int activation;
};

// Statistics of a row, number i of `statistics`, which it writes; for the warp that owns the row.
template <typename T, typename A>
__device__ __forceinline__ Statistics<A> normalise(const LinearBatchNormForward<T, A>& a, const WarpRow<A>& z,
                                                   long long i, long long rows) {
    const A n = A(z.count), share = A(1) / n, half = A(0.5), shift = z.row[0];
    // Half the mean's distance from a value: divided before they are added, half distances cannot overflow.
    const auto half_distance = [=](A from) {
        return z.sum([=](int, A value) { return share * fma(half, value, -half * from); });
    };
    const A first = fma(A(2), half_distance(shift), shift);
    __syncwarp();  // all threads have read the first value
    const Pair<A> mean = quick_two_sum(first, A(2) * half_distance(first));
    const A m2 = z.sum([=](int, A value) {
        const A d = subtract(value, mean);
        return d * d;
    });
    const A rstd = A(1) / sqrt(m2 / n + a.eps);
    if (z.lane == 0) {
        a.statistics[i] = mean.high;
        a.statistics[rows + i] = mean.low;
        a.statistics[2 * rows + i] = rstd;
    }
    return {mean, m2, rstd};
}

// The map from z of a neuron to the input of the activation; for the warp that owns it.
template <typename T, typename A>
__device__ __forceinline__ Affine<A> normalise_neuron(const LinearBatchNormForward<T, A>& a, const WarpRow<A>& z,
                                                      long long m) {
    const Affine<A> affine = load_affine(a, m);
    if (!a.statistics) return affine;
    const Statistics<A> row_statistics = normalise(a, z, m, a.outputs);
    if (z.lane == 0) {
        const A keep = A(1) - a.momentum, var = row_statistics.m2 / (A(z.count) - a.correction);
        if (a.running_mean) a.running_mean[m] = fma(a.momentum, row_statistics.mean.high, keep * a.running_mean[m]);
        if (a.running_var) a.running_var[m] = fma(a.momentum, var, keep * a.running_var[m]);
    }
    return with_statistics(affine, row_statistics.mean, row_statistics.rstd);
}

template <Precision PRECISION, typename T, typename A>
__device__ __forceinline__ void linear_batch_norm_forward(const LinearBatchNormForward<T, A>& a) {
    BNK_DYNAMIC_SHARED(A, shared);
    const int width = (int)a.width, pitch = pitch_of(a.rows);
    const int rows = (int)a.rows, inputs = (int)a.inputs, outputs = (int)a.outputs;
    const int column = blockIdx.x * width;
    A* const tile = shared;  // (width, examples)
    const Matrix<T, true> x = {a.x, rows, inputs, inputs}, weight = {a.weight, inputs, outputs, outputs};
    product<PRECISION>(tile + width * pitch, x, weight, column, width, (int)a.buffers, [&](int r, int c, A value) {
        const T z = T(value);
        a.z[r * a.outputs + column + c] = z;
        tile[c * pitch + r] = A(z);
    });
    for_each_row(width, a.outputs - column, [&](int c) {
        const WarpRow<A> z(tile + c * pitch, a.rows);
        const Affine<A> affine = normalise_neuron(a, z, column + c);
        z.replace([&](int, A value) { return activate(affine(value), a.activation, a.alpha); });
    });
    __syncthreads();
    store_tile(a.y, tile, pitch, a.rows, a.outputs, column, width);
}

template <Precision PRECISION, typename T, typename A>
__device__ __forceinline__ void linear_layer_norm_forward(const LinearBatchNormForward<T, A>& a) {
    BNK_DYNAMIC_SHARED(A, shared);
    const int width = (int)a.width, pitch = pitch_of(a.outputs);
    const int rows = (int)a.rows, inputs = (int)a.inputs, outputs = (int)a.outputs;
    const int first = blockIdx.x * width;
    A* const tile = shared;  // (width, neurons)
    const Matrix<T, false> weight_transposed = {a.weight, outputs, inputs, outputs};
    const Matrix<T, false> x_transposed = {a.x, inputs, rows, inputs};
    product<PRECISION>(tile + width * pitch, weight_transposed, x_transposed, first, width, (int)a.buffers,
                       [&](int r, int c, A value) { tile[c * pitch + r] = A(T(value)); });
    store_rows(a.z, tile, pitch, a.rows, a.outputs, first, width);
    __syncthreads();
    for_each_row(width, a.rows - first, [&](int c) {
        const WarpRow<A> z(tile + c * pitch, a.outputs);
        const Statistics<A> row_statistics = normalise(a, z, first + c, a.rows);
        z.replace([&](int m, A value) {
            const Affine<A> affine = with_statistics(load_affine(a, m), row_statistics.mean, row_statistics.rstd);
            return activate(affine(value), a.activation, a.alpha);
        });
    });
    __syncthreads();
    store_rows(a.y, tile, pitch, a.rows, a.outputs, first, width);
}

#define LINEAR_BATCH_NORM_FORWARD(suffix, T, A, precision)                                                 \
    BNK_KERNEL(bnk_linear_batch_norm_forward_##suffix, (LinearBatchNormForward<T, A>), PRODUCT_THREADS, 1, \
               (linear_batch_norm_forward<precision, T, A>))
#define LINEAR_LAYER_NORM_FORWARD(suffix, T, A, precision)                                                 \
    BNK_KERNEL(bnk_linear_layer_norm_forward_##suffix, (LinearBatchNormForward<T, A>), PRODUCT_THREADS, 1, \
               (linear_layer_norm_forward<precision, T, A>))

LINEAR_BATCH_NORM_FORWARD(f32, float, float, OF_DATA_TYPE)
LINEAR_BATCH_NORM_FORWARD(f16, Float16, float, OF_DATA_TYPE)
LINEAR_BATCH_NORM_FORWARD(bf16, BFloat16, float, OF_DATA_TYPE)
LINEAR_BATCH_NORM_FORWARD(f64, double, double, OF_DATA_TYPE)
LINEAR_LAYER_NORM_FORWARD(f32, float, float, OF_DATA_TYPE)
LINEAR_LAYER_NORM_FORWARD(f16, Float16, float, OF_DATA_TYPE)
LINEAR_LAYER_NORM_FORWARD(bf16, BFloat16, float, OF_DATA_TYPE)
LINEAR_LAYER_NORM_FORWARD(f64, double, double, OF_DATA_TYPE)
#if BNK_TENSOR_CORES
LINEAR_BATCH_NORM_FORWARD(tf32x3_f32, float, float, TF32X3)
LINEAR_LAYER_NORM_FORWARD(tf32x3_f32, float, float, TF32X3)
#endif
