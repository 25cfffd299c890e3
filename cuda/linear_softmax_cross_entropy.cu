// The last layer of a classifier, whole: linear layer, softmax cross-entropy and all gradients, in one launch.
//
// Formulas:  logits = x W + bias;  top[n] = max_m logits[n,m];  total[n] = sum_m exp(logits[n,m] - top[n])
//            loss[n]      = log(total[n]) - (logits[n,label[n]] - top[n])
//            dlogits[n,m] = (exp(logits[n,m] - top[n]) / total[n] - [m = label[n]]) / N     of the mean loss
//            dx = dlogits W',  dweight = x' dlogits,  dbias[m] = sum_n dlogits[n,m]
//            A label outside 0 ... M-1 gives NaN in its example, and reads nothing.
// Arrays:    x (N, K), weight (K, M), bias (M,), null: zeros; labels (N,) of type L; loss (N,); dx (N, K), null: not
//            computed; dweight (K, M), dbias (M,) and the workspace dlogits (N, M). Type T; C order.
//            barrier_counter: see lib/sync/grid_barrier.cuh.
// Launch:    Block (256, 1, 1), any grid; cooperative if it has more than one block. A block owns `width` examples at a
//            time with all of their classes, at most 1024, and behind the grid barrier `width` classes of at most 512
//            examples. Dynamic shared memory for a tile (width, pitch) and a product, see launch.py.
// Traffic:   x, weight read and dx, dweight written once; dlogits written once and read by every block; what several
//            blocks read comes after the first from the L2 cache. Logits stay in shared memory. One grid barrier.
// Numerics:  In T with fma, all sums in a fixed order: deterministic. Shifted by the example's maximum: neither exp nor
//            log can overflow. An example with NaN has NaN in its loss and dx, and in dweight and dbias.
// Reference: P. Blanchard, D. J. Higham and N. J. Higham, Accurately computing the log-sum-exp and softmax functions,
//            IMA J. Numer. Anal. 41, 2021.
// Called by: bnkernels/ops/linear_softmax_cross_entropy/op.py
#include "lib/gemm/product.cuh"
#include "lib/gemm/warp_rows.cuh"
#include "lib/kernel.cuh"
#include "lib/sync/grid_barrier.cuh"

template <typename T, typename L>
struct LinearSoftmaxCrossEntropy {
    const T* x;
    const T* weight;
    const T* bias;
    const L* labels;
    T* loss;
    T* dx;
    T* dweight;
    T* dbias;
    T* dlogits;
    unsigned* barrier_counter;
    long long rows, inputs, outputs, width, buffers;
};

// Replaces the logits of example n by their gradients and writes its loss; for the warp that owns it.
template <typename T, typename L>
__device__ __forceinline__ void differentiate_loss(const LinearSoftmaxCrossEntropy<T, L>& a, const WarpRow<T>& logits,
                                                   long long n) {
    const long long label = a.labels[n];
    T top = log(T(0)), at_label = T(0), total = T(0);  // a lane reads only the logits that it writes
#pragma unroll 1
    for (int m = logits.lane; m < logits.count; m += WARP) {
        const T logit = logits.row[m];
        top = logit > top ? logit : top;  // ignores NaN, which reaches the example through the sum
        if (m == label) at_label = logit;
    }
    top = warp_max(top);
#pragma unroll 1
    for (int m = logits.lane; m < logits.count; m += WARP) total += logits.row[m] = exp(logits.row[m] - top);
    total = warp_sum(total);
    at_label = warp_sum(at_label);
    const T poison = 0 <= label && label < logits.count ? T(0) : T(nan(""));
    if (logits.lane == 0) a.loss[n] = log(total) - (at_label - top) + poison;
    const T inverse = T(1) / total, each = T(1) / T(a.rows) + poison;
    logits.replace([=](int m, T value) { return fma(value, inverse, m == label ? T(-1) : T(0)) * each; });
}

template <typename T, typename L>
__device__ __forceinline__ void linear_softmax_cross_entropy(const LinearSoftmaxCrossEntropy<T, L>& a) {
    BNK_DYNAMIC_SHARED(T, shared);
    const int width = (int)a.width, class_pitch = pitch_of(a.outputs), example_pitch = pitch_of(a.rows);
    const int rows = (int)a.rows, inputs = (int)a.inputs, outputs = (int)a.outputs;
    const int first = blockIdx.x * width, step = gridDim.x * width;
    const Matrix<T, true> weight = {a.weight, inputs, outputs, outputs};
    const Matrix<T, false> weight_transposed = {a.weight, outputs, inputs, outputs};
    const Matrix<T, false> x_transposed = {a.x, inputs, rows, inputs};
    const Matrix<T, true> dlogits = {a.dlogits, rows, outputs, outputs};
    const Matrix<T, false> dlogits_transposed = {a.dlogits, outputs, rows, outputs};
#pragma unroll 1
    for (int example = first; example < rows; example += step) {
        T* const tile = shared;  // (width, classes)
        product(shared + width * class_pitch, weight_transposed, x_transposed, example, width, (int)a.buffers,
                [&](int r, int c, T value) { tile[c * class_pitch + r] = value + (a.bias ? a.bias[r] : T(0)); });
        for_each_row(width, rows - example,
                     [&](int c) { differentiate_loss(a, WarpRow<T>(tile + c * class_pitch, outputs), example + c); });
        __syncthreads();
        store_rows(a.dlogits, tile, class_pitch, a.rows, a.outputs, example, width);
        __syncthreads();
        if (a.dx)
            product(shared, weight, dlogits_transposed, example, width, (int)a.buffers,
                    [&](int r, int c, T value) { a.dx[(example + c) * a.inputs + r] = value; });
    }
    if (gridDim.x > 1) grid_barrier(a.barrier_counter, gridDim.x, blockIdx.x);  // dlogits of all examples
#pragma unroll 1
    for (int column = first; column < outputs; column += step) {
        load_tile(shared, a.dlogits, example_pitch, a.rows, a.outputs, column, width);  // (width, examples)
        __syncthreads();
        for_each_row(width, outputs - column, [&](int c) {
            const WarpRow<T> of_class(shared + c * example_pitch, rows);
            const T sum = of_class.sum([](int, T value) { return value; });
            if (of_class.lane == 0) a.dbias[column + c] = sum;
        });
        product(shared, x_transposed, dlogits, column, width, (int)a.buffers,
                [&](int r, int c, T value) { a.dweight[r * a.outputs + column + c] = value; });
    }
}

#define LINEAR_SOFTMAX_CROSS_ENTROPY(labels, suffix, L, T)                                              \
    BNK_KERNEL(bnk_linear_softmax_cross_entropy_##labels##_##suffix, (LinearSoftmaxCrossEntropy<T, L>), \
               PRODUCT_THREADS, 1, (linear_softmax_cross_entropy<T, L>))

LINEAR_SOFTMAX_CROSS_ENTROPY(i32, f32, int, float)
LINEAR_SOFTMAX_CROSS_ENTROPY(i32, f64, int, double)
LINEAR_SOFTMAX_CROSS_ENTROPY(i64, f32, long long, float)
LINEAR_SOFTMAX_CROSS_ENTROPY(i64, f64, long long, double)
