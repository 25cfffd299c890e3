// The gradients of a linear layer with batch norm, or with a bias, and an activation behind it, in one launch.
//
// Formulas:  u = scale (z - mean) + beta, scale = gamma rstd;  g = dy phi'(u);  dbeta[m] = sum_n g;
//            norm: dgamma[m] = rstd sum_n g (z - mean),
//            dz = scale (g - dbeta / N - (z - mean) rstd dgamma / N), rounded to T;  no norm: mean 0, scale 1, dz = g;
//            dweight = x' dz,  dx = dz W'.
// Arrays:    dy, z (N, M), x (N, K), weight (K, M), of type T. gamma, beta (M,) and statistics (3, M) of the accumulator's
//            type A, each may be null. dx (N, K), may be null: then it is not wanted; dweight (K, M) and the workspace dz
//            (N, M) of type T; dgamma (null: no norm), dbeta (M,). C order. arrivals: a counter, see meet.cuh.
// Launch:    block (256, 1, 1), grid a power of two; cooperative if dx is wanted, of more than one block. Dynamic shared
//            memory for a product or two tiles (width, pitch) of A. A block owns `width` neurons at a time, N at most 512.
// Traffic:   dy, z, weight read once, dz written once, dweight and dx written once; x and dz read by every block, from the
//            L2 cache but for the first. With batch norm as many bytes as without, and 4 M words.
// Numerics:  products in A with fma, terms in a fixed order, dz rounded before them: deterministic.
// Reference: Ioffe and Szegedy, Batch Normalization, 2015, arXiv:1502.03167, section 3.
// Called by: bnkernels/linear_batch_norm.py
#include "linear_batch_norm.cuh"
#include "meet.cuh"
#include "product.cuh"

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
    unsigned* arrivals;
    long long rows, inputs, outputs, width;
    A alpha;
    int activation;
};

// By the warp that owns the neuron: dz in the place of dy, and the gradients of its parameters.
template <typename T, typename A>
__device__ __forceinline__ void differentiate(const LinearBatchNormBackward<T, A>& a, const Examples<A>& g,
                                              const Examples<A>& z, long long m) {
    Affine<A> of = load_affine(a, m);
    A rstd = A(1);
    if (a.statistics) {
        of.mean = {a.statistics[m], a.statistics[a.outputs + m]};
        rstd = a.statistics[2 * a.outputs + m];
        of.scale *= rstd;
    }
#pragma unroll 1
    for (int n = g.lane; n < g.count; n += WARP) g.row[n] = pull_back(g.row[n], of(z.row[n]), a.activation, a.alpha);
    const A dbeta = g.sum([](int, A value) { return value; });
    if (g.lane == 0) a.dbeta[m] = dbeta;
    if (!a.statistics) return;
    const A product = g.sum([&](int n, A value) { return value * subtract(z.row[n], of.mean); });
    if (g.lane == 0) a.dgamma[m] = product * rstd;
    const A mean = dbeta / A(a.rows), slope = product * rstd * rstd / A(a.rows);
    g.replace([&](int n, A value) { return of.scale * (value - fma(subtract(z.row[n], of.mean), slope, mean)); });
}

template <typename T, typename A>
__device__ __forceinline__ void linear_batch_norm_backward(const LinearBatchNormBackward<T, A>& a) {
    BNK_DYNAMIC_SHARED(A, shared);
    const int width = (int)a.width, pitch = pitch_of(a.rows);
    const long long first = (long long)blockIdx.x * width, step = (long long)gridDim.x * width;
    A* const tile_g = shared;  // (width, examples); products use the same memory later
    A* const tile_z = shared + width * pitch;
    const Matrix<T> dz = {a.dz, a.rows, a.outputs, a.outputs, 1};
    const Matrix<T> x_transposed = {a.x, a.inputs, a.rows, 1, a.inputs};
    const Matrix<T> weight_transposed = {a.weight, a.outputs, a.inputs, 1, a.outputs};
#pragma unroll 1
    for (long long column = first; column < a.outputs; column += step) {
        load_tile(tile_g, a.dy, pitch, a.rows, a.outputs, column, width);
        load_tile(tile_z, a.z, pitch, a.rows, a.outputs, column, width);
        __syncthreads();
        for_each_neuron(width, a.outputs - column, [&](int c) {
            differentiate(a, Examples<A>(tile_g + c * pitch, a.rows), Examples<A>(tile_z + c * pitch, a.rows),
                          column + c);
        });
        __syncthreads();
        store_tile(a.dz, tile_g, pitch, a.rows, a.outputs, column, width);
        __syncthreads();
#pragma unroll 1
        for (long long row = 0; row < a.inputs; row += PRODUCT_ROWS)
            product(shared, x_transposed, dz, row, column, width,
                    [&](int r, int c, A value) { store(a.dweight[(row + r) * a.outputs + column + c], value); });
    }
    if (!a.dx) return;
    if (gridDim.x > 1) meet(a.arrivals, gridDim.x);  // dz of all neurons
#pragma unroll 1
    for (long long column = first; column < a.inputs; column += step)
#pragma unroll 1
        for (long long row = 0; row < a.rows; row += PRODUCT_ROWS)
            product(shared, dz, weight_transposed, row, column, width,
                    [&](int r, int c, A value) { store(a.dx[(row + r) * a.inputs + column + c], value); });
}

#define LINEAR_BATCH_NORM_BACKWARD(suffix, T, A)                                                                   \
    using arguments_linear_backward_##suffix = LinearBatchNormBackward<T, A>;                                      \
    BNK_KERNEL_ROOMY(bnk_linear_batch_norm_backward_##suffix, arguments_linear_backward_##suffix, PRODUCT_THREADS, \
                     (linear_batch_norm_backward<T, A>))

LINEAR_BATCH_NORM_BACKWARD(f32, float, float)
LINEAR_BATCH_NORM_BACKWARD(f16, Float16, float)
LINEAR_BATCH_NORM_BACKWARD(bf16, BFloat16, float)
LINEAR_BATCH_NORM_BACKWARD(f64, double, double)
