// Gradients of a linear layer with batch norm, layer norm or a bias, and an activation, in one launch.
//
// Formulas:  u = scale (z - mean) + beta, scale = gamma rstd;  g = dy phi'(u);  dbeta[m] = sum_n g
//            batch norm: dgamma[m] = sum_n g rstd (z - mean),
//                        dz = scale (g - dbeta / N - (z - mean) rstd dgamma / N), rounded to T
//            layer norm: dgamma[m] = sum_n g rstd[n] (z - mean[n]); over the M neurons of an example, with h = gamma g,
//                        dz = rstd (h - sum h / M - (z - mean) rstd^2 sum (h (z - mean)) / M), rounded to T
//            no norm:    mean 0, scale 1, dz = g
//            dweight = x' dz,  dx = dz W'
// Arrays:    dy, z (N, M), x (N, K), weight (K, M), of type T. gamma, beta (M,) and statistics (3, M), with layer norm
//            (3, N), of the accumulator's type A; each may be null. dx (N, K), null: not computed; dweight (K, M) and
//            the workspace dz (N, M) of type T; dgamma (null: no norm), dbeta (M,), of type A. C order.
//            barrier_counter: see lib/sync/grid_barrier.cuh.
// Launch:    Block (256, 1, 1), any grid; cooperative if it has more than one block and computes dx, or with layer
//            norm. Dynamic shared memory for a product or two tiles (width, pitch) of A. A block owns `width` neurons
//            at a time, N at most 512. Layer norm: a block owns `width` examples at a time, then neurons.
// Traffic:   dy, z, weight read once, dz written once, dweight and dx written once; x and dz read by every block, after
//            the first from the L2 cache. Batch norm adds 4 M words.
// Numerics:  Products as in the forward, those of the kernels tf32x3 too, of dz rounded to T; all sums in a fixed
//            order: deterministic.
// Reference: Ioffe and Szegedy, Batch Normalization, 2015, arXiv:1502.03167, section 3; Ba, Kiros and Hinton, Layer
//            Normalization, 2016, arXiv:1607.06450.
// Called by: bnkernels/ops/linear_batch_norm/op.py
#include "lib/gemm/product.cuh"
#include "lib/gemm/warp_rows.cuh"
#include "lib/kernel.cuh"
#include "lib/sync/grid_barrier.cuh"

template <typename T, typename A>
struct LinearBatchNormBackward {
    const T* dy;
    const T* x;
    const T* weight;
    const A* gamma;
    const A* beta;
    const T* z;
    const A* statistics;
    T* dx;
    T* dweight;
    A* dgamma;
    A* dbeta;
    T* dz;
    unsigned* barrier_counter;
    long long rows, inputs, outputs, width, buffers;
    A alpha;
    int activation;
};

// Replaces dy of a neuron by dz and writes the gradients of its parameters; for the warp that owns it.
template <typename T, typename A>
__device__ __forceinline__ void differentiate(const LinearBatchNormBackward<T, A>& a, const WarpRow<A>& g,
                                              const WarpRow<A>& z, long long m) {
    Affine<A> affine = load_affine(a, m);
    A rstd = A(1);
    if (a.statistics) {
        rstd = a.statistics[2 * a.outputs + m];
        affine = with_statistics(affine, {a.statistics[m], a.statistics[a.outputs + m]}, rstd);
    }
#pragma unroll 1
    for (int n = g.lane; n < g.count; n += WARP)
        g.row[n] = activation_backward(g.row[n], affine(z.row[n]), a.activation, a.alpha);
    const A dbeta = g.sum([](int, A value) { return value; });
    if (g.lane == 0) a.dbeta[m] = dbeta;
    if (!a.statistics) return;
    const A dgamma = g.sum([&](int n, A value) { return value * (subtract(z.row[n], affine.mean) * rstd); });
    if (g.lane == 0) a.dgamma[m] = dgamma;
    const A mean = dbeta / A(a.rows), slope = dgamma * rstd / A(a.rows);
    g.replace(
        [&](int n, A value) { return affine.scale * (value - fma(subtract(z.row[n], affine.mean), slope, mean)); });
}

template <Precision PRECISION, typename T, typename A>
__device__ __forceinline__ void linear_batch_norm_backward(const LinearBatchNormBackward<T, A>& a) {
    BNK_DYNAMIC_SHARED(A, shared);
    const int width = (int)a.width, pitch = pitch_of(a.rows);
    const int rows = (int)a.rows, inputs = (int)a.inputs, outputs = (int)a.outputs;
    const int first = blockIdx.x * width, step = gridDim.x * width;
    A* const tile_g = shared;  // (width, examples); products reuse the memory
    A* const tile_z = shared + width * pitch;
    const Matrix<T, true> dz = {a.dz, rows, outputs, outputs};
    const Matrix<T, false> x_transposed = {a.x, inputs, rows, inputs};
    const Matrix<T, false> weight_transposed = {a.weight, outputs, inputs, outputs};
#pragma unroll 1
    for (int column = first; column < a.outputs; column += step) {
        load_tile(tile_g, a.dy, pitch, a.rows, a.outputs, column, width);
        load_tile(tile_z, a.z, pitch, a.rows, a.outputs, column, width);
        __syncthreads();
        for_each_row(width, a.outputs - column, [&](int c) {
            differentiate(a, WarpRow<A>(tile_g + c * pitch, a.rows), WarpRow<A>(tile_z + c * pitch, a.rows),
                          column + c);
        });
        __syncthreads();
        store_tile(a.dz, tile_g, pitch, a.rows, a.outputs, column, width);
        product<PRECISION>(shared, x_transposed, dz, column, width, (int)a.buffers,
                           [&](int r, int c, A value) { store(a.dweight[r * a.outputs + column + c], value); });
    }
    if (!a.dx) return;
    if (gridDim.x > 1) grid_barrier(a.barrier_counter, gridDim.x, blockIdx.x);  // dz of all neurons
#pragma unroll 1
    for (int column = first; column < a.inputs; column += step)
        product<PRECISION>(shared, dz, weight_transposed, column, width, (int)a.buffers,
                           [&](int r, int c, A value) { store(a.dx[r * a.inputs + column + c], value); });
}

// The map of layer norm from z[n, m] to the input of the activation.
template <typename T, typename A>
__device__ __forceinline__ Affine<A> affine_of_layer(const LinearBatchNormBackward<T, A>& a, long long n, long long m) {
    const Pair<A> mean = {a.statistics[n], a.statistics[a.rows + n]};
    return with_statistics(load_affine(a, m), mean, a.statistics[2 * a.rows + n]);
}

// Replaces dy of an example by dz; for the warp that owns it.
template <typename T, typename A>
__device__ __forceinline__ void differentiate_example(const LinearBatchNormBackward<T, A>& a, const WarpRow<A>& g,
                                                      const WarpRow<A>& z, long long n) {
    const A rstd = a.statistics[2 * a.rows + n], count = A(g.count);
    const Pair<A> mean = centre_of(Pair<A>{a.statistics[n], a.statistics[a.rows + n]}, rstd);
    g.replace([&](int m, A dy) {
        const A slope = activation_backward(dy, affine_of_layer(a, n, m)(z.row[m]), a.activation, a.alpha);
        return a.gamma ? a.gamma[m] * slope : slope;
    });
    const A mean_h = g.sum([](int, A h) { return h; }) / count;
    const A slope = g.sum([&](int m, A h) { return h * (subtract(z.row[m], mean) * rstd); }) * rstd / count;
    g.replace([&](int m, A h) { return rstd * (h - fma(subtract(z.row[m], mean), slope, mean_h)); });
}

// Gradients of the parameters of a neuron; for the warp that owns it.
template <typename T, typename A>
__device__ __forceinline__ void sum_neuron(const LinearBatchNormBackward<T, A>& a, const WarpRow<A>& g,
                                           const WarpRow<A>& z, long long m) {
#pragma unroll 1
    for (int n = g.lane; n < g.count; n += WARP) {
        const Affine<A> affine = affine_of_layer(a, n, m);
        g.row[n] = activation_backward(g.row[n], affine(z.row[n]), a.activation, a.alpha);
        z.row[n] = subtract(z.row[n], affine.mean) * a.statistics[2 * a.rows + n];
    }
    const A dbeta = g.sum([](int, A value) { return value; });
    const A dgamma = g.sum([&](int n, A value) { return value * z.row[n]; });
    if (g.lane != 0) return;
    a.dbeta[m] = dbeta;
    a.dgamma[m] = dgamma;
}

template <Precision PRECISION, typename T, typename A>
__device__ __forceinline__ void linear_layer_norm_backward(const LinearBatchNormBackward<T, A>& a) {
    BNK_DYNAMIC_SHARED(A, shared);
    const int width = (int)a.width, neuron_pitch = pitch_of(a.outputs), example_pitch = pitch_of(a.rows);
    const int rows = (int)a.rows, inputs = (int)a.inputs, outputs = (int)a.outputs;
    const int first = blockIdx.x * width, step = gridDim.x * width;
    const Matrix<T, true> weight = {a.weight, inputs, outputs, outputs};
    const Matrix<T, true> dz = {a.dz, rows, outputs, outputs};
    const Matrix<T, false> dz_transposed = {a.dz, outputs, rows, outputs};
    const Matrix<T, false> x_transposed = {a.x, inputs, rows, inputs};
#pragma unroll 1
    for (int example = first; example < a.rows; example += step) {
        A *const tile_g = shared, *const tile_z = shared + width * neuron_pitch;
        load_rows(tile_g, a.dy, neuron_pitch, a.rows, a.outputs, example, width);
        load_rows(tile_z, a.z, neuron_pitch, a.rows, a.outputs, example, width);
        __syncthreads();
        for_each_row(width, a.rows - example, [&](int c) {
            differentiate_example(a, WarpRow<A>(tile_g + c * neuron_pitch, a.outputs),
                                  WarpRow<A>(tile_z + c * neuron_pitch, a.outputs), example + c);
        });
        __syncthreads();
        store_rows(a.dz, tile_g, neuron_pitch, a.rows, a.outputs, example, width);
        __syncthreads();
        if (a.dx)
            product<PRECISION>(shared, weight, dz_transposed, example, width, (int)a.buffers,
                               [&](int r, int c, A value) { store(a.dx[(example + c) * a.inputs + r], value); });
    }
    if (gridDim.x > 1) grid_barrier(a.barrier_counter, gridDim.x, blockIdx.x);  // dz of all examples
#pragma unroll 1
    for (int column = first; column < a.outputs; column += step) {
        A *const tile_g = shared, *const tile_z = shared + width * example_pitch;
        load_tile(tile_g, a.dy, example_pitch, a.rows, a.outputs, column, width);
        load_tile(tile_z, a.z, example_pitch, a.rows, a.outputs, column, width);
        __syncthreads();
        for_each_row(width, a.outputs - column, [&](int c) {
            sum_neuron(a, WarpRow<A>(tile_g + c * example_pitch, a.rows),
                       WarpRow<A>(tile_z + c * example_pitch, a.rows), column + c);
        });
        product<PRECISION>(shared, x_transposed, dz, column, width, (int)a.buffers,
                           [&](int r, int c, A value) { store(a.dweight[r * a.outputs + column + c], value); });
    }
}

#define LINEAR_BATCH_NORM_BACKWARD(suffix, T, A, precision)                                                  \
    BNK_KERNEL(bnk_linear_batch_norm_backward_##suffix, (LinearBatchNormBackward<T, A>), PRODUCT_THREADS, 1, \
               (linear_batch_norm_backward<precision, T, A>))
#define LINEAR_LAYER_NORM_BACKWARD(suffix, T, A, precision)                                                  \
    BNK_KERNEL(bnk_linear_layer_norm_backward_##suffix, (LinearBatchNormBackward<T, A>), PRODUCT_THREADS, 1, \
               (linear_layer_norm_backward<precision, T, A>))

LINEAR_BATCH_NORM_BACKWARD(f32, float, float, OF_DATA_TYPE)
LINEAR_BATCH_NORM_BACKWARD(f16, Float16, float, OF_DATA_TYPE)
LINEAR_BATCH_NORM_BACKWARD(bf16, BFloat16, float, OF_DATA_TYPE)
LINEAR_BATCH_NORM_BACKWARD(f64, double, double, OF_DATA_TYPE)
LINEAR_LAYER_NORM_BACKWARD(f32, float, float, OF_DATA_TYPE)
LINEAR_LAYER_NORM_BACKWARD(f16, Float16, float, OF_DATA_TYPE)
LINEAR_LAYER_NORM_BACKWARD(bf16, BFloat16, float, OF_DATA_TYPE)
LINEAR_LAYER_NORM_BACKWARD(f64, double, double, OF_DATA_TYPE)
#if BNK_TENSOR_CORES
LINEAR_BATCH_NORM_BACKWARD(tf32x3_f32, float, float, TF32X3)
LINEAR_LAYER_NORM_BACKWARD(tf32x3_f32, float, float, TF32X3)
#endif
