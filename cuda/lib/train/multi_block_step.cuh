// The common part of a training step of a multilayer perceptron by several blocks, for either norm: shared memory,
// softmax cross-entropy, weight updates.
#pragma once

#include "lib/gemm/product.cuh"
#include "lib/gemm/warp_rows.cuh"
#include "lib/sync/grid_barrier.cuh"
#include "lib/train/network.cuh"

// Layout of a block's shared memory.
template <typename T>
struct MultiBlockSharedLayout {
    T* terms;    // operands of products
    T* tile;     // (width, examples) or (width, neurons)
    T* top;      // largest logit of every example; NaN if its label is not a class
    T* total;    // sum of exp(logit - top) of every example
    T* losses;   // loss of every example
    int* label;  // label of every example
    int* data;   // row of the data of each example, of this step and the next

    template <typename Arguments>
    __device__ __forceinline__ MultiBlockSharedLayout(const Arguments& a, T* shared, int pitch) {
        const int example_pitch = pitch_of(a.batch);
        top = shared;
        total = top + example_pitch;
        losses = total + example_pitch;
        label = reinterpret_cast<int*>(losses + example_pitch);
        data = label + example_pitch;
        tile = losses + 4 * example_pitch;
        terms = tile + a.width * pitch;
    }
};

// Gradients of a layer's z, (examples, neurons): stored, or computed from the logits for the last layer.
template <typename T>
struct Gradients : Matrix<T> {
    const T *top, *total;  // of MultiBlockSharedLayout; null: stored
    const int* label;

    __device__ __forceinline__ T value(const T* at, int n, int m) const {
        if (!top) return *at;
        return (exp(*at - top[n]) / total[n] - (m == label[n] ? T(1) : T(0))) / T(Matrix<T>::rows);
    }
    __device__ __forceinline__ T at(int n, int m) const { return value(Matrix<T>::address(n, m), n, m); }
};

template <typename T>
struct Centred {
    T mean, m2, rstd;
};

// Subtracts the mean of a row and returns its statistics; for the warp that owns the row.
template <typename T>
__device__ __forceinline__ Centred<T> centre(const WarpRow<T>& z, T eps) {
    const T n = T(z.count), mean = z.sum([](int, T value) { return value; }) / n;
    const T remainder = z.subtract_and_sum(mean, [](T value) { return value; }) / n;  // rounding error of the mean
    const T m2 = z.subtract_and_sum(remainder, [](T value) { return value * value; });
    return {mean + remainder, m2, T(1) / sqrt(m2 / n + eps)};
}

// Barrier: GridBarrier or ClusterBarrier.
template <typename T, typename Arguments, typename Barrier>
struct MultiBlockStep {
    const Arguments& a;
    const Barrier barrier;
    const MultiBlockSharedLayout<T> smem;
    const int block;  // index among the blocks of the model
    const T lr;

    __device__ __forceinline__ int field(int layer, Layer which) const {
        return a.layers[layer * LAYER_FIELDS + which];
    }
    __device__ __forceinline__ bool is_last(int layer) const { return layer + 1 == a.depth; }
    __device__ __forceinline__ const T* schedule_of(long long step) const { return a.schedule + 3 * step; }
    __device__ __forceinline__ const T* parameters_of(int layer, Layer which) const {
        return a.parameters + field(layer, which);
    }

    __device__ __forceinline__ void move(long long i, T g, long long step) const {
        update(a, a.parameters, a.first, a.second, i, g, lr, schedule_of(step));
    }

    // Calls work(first) for every tile of `width` neurons or examples, of `count`, that the block owns.
    template <typename Work>
    __device__ __forceinline__ void for_each_tile(long long count, const Work& work) const {
#pragma unroll 1
        for (long long first = block * a.width; first < count; first += a.blocks * a.width) work(first);
    }

    __device__ __forceinline__ int* rows_of(long long step) const { return smem.data + (step & 1) * pitch_of(a.batch); }
    __device__ __forceinline__ void choose_rows(long long step) const {
        for (int n = threadIdx.x; n < a.batch && step < a.steps; n += blockDim.x) rows_of(step)[n] = row_of(a, step, n);
    }

    // Softmax statistics and loss of example n, by one thread; logit(k) is its k-th logit.
    template <typename Logit>
    __device__ __forceinline__ void softmax_cross_entropy(long long step, int n, const Logit& logit) const {
        const int classes = field((int)a.depth - 1, OUTPUTS), label = a.labels[rows_of(step)[n]];
        T top = logit(0), total = T(0);
#pragma unroll 4
        for (int k = 1; k < classes; ++k) top = logit(k) > top ? logit(k) : top;
#pragma unroll 4
        for (int k = 0; k < classes; ++k) total += exp(logit(k) - top);
        const bool valid = 0 <= label && label < classes;
        smem.label[n] = label;
        smem.total[n] = total;
        smem.top[n] = valid ? top : T(nan(""));
        smem.losses[n] = valid ? log(total) - (logit(label) - top) : T(nan(""));
    }

    // Updates the weights (inputs, outputs) of a layer from its transposed inputs (inputs, examples) and dz (examples,
    // outputs).
    template <typename Inputs, typename Outputs>
    __device__ __forceinline__ void update_weights(int layer, long long step, const Inputs& inputs_transposed,
                                                   const Outputs& dz, long long column) const {
        const long long first = field(layer, WEIGHT) + column;
#pragma unroll 1
        for (long long row = 0; row < inputs_transposed.rows; row += PRODUCT_ROWS)
            fma_product(smem.terms, inputs_transposed, dz, row, column, (int)a.width,
                        [&](int r, int c, T value) { move(first + (row + r) * dz.columns + c, value, step); });
    }
};
