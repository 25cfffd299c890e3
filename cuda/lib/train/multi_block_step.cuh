// What a training step of a multilayer perceptron by a group of blocks is made of: where the blocks of the group leave
// things for each other and for themselves, and what they do whatever the norm.
#pragma once

#include "lib/gemm/product.cuh"
#include "lib/gemm/warp_rows.cuh"
#include "lib/sync/grid_barrier.cuh"
#include "lib/train/network.cuh"

// What a block keeps for itself, in shared memory.
template <typename T>
struct MultiBlockSharedLayout {
    T* terms;    // for products
    T* tile;     // (width, examples) or (width, neurons)
    T* top;      // of every example its largest logit, NaN where the label is none
    T* total;    // and the sum of exp(logit - top)
    T* losses;   // and its loss
    int* label;  // and its class
    int* data;   // which row of the data it is, of this step and the next

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

// The gradients of a layer's z, (examples, neurons): as they lie, or those of the mean loss, made from the logits.
template <typename T>
struct Gradients : Matrix<T> {
    const T *top, *total;  // of BlockMemory; null: as they lie
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

// By the warp that owns the row: takes its mean off it.
template <typename T>
__device__ __forceinline__ Centred<T> centre(const WarpRow<T>& z, T eps) {
    const T n = T(z.count), mean = z.sum([](int, T value) { return value; }) / n;
    const T remainder = z.subtract_and_sum(mean, [](T value) { return value; }) / n;  // what rounding left of it
    const T m2 = z.subtract_and_sum(remainder, [](T value) { return value * value; });
    return {mean + remainder, m2, T(1) / sqrt(m2 / n + eps)};
}

// Meeting: how the blocks of the group meet.
template <typename T, typename Arguments, typename Barrier>
struct MultiBlockStep {
    const Arguments& a;
    const Barrier barrier;
    const MultiBlockSharedLayout<T> smem;
    const int block;  // which of its group
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

    // work(first) for every tile of `width` neurons or examples, of so many, that is the block's.
    template <typename Work>
    __device__ __forceinline__ void for_each_tile(long long count, const Work& work) const {
#pragma unroll 1
        for (long long first = block * a.width; first < count; first += a.blocks * a.width) work(first);
    }

    __device__ __forceinline__ int* rows_of(long long step) const { return smem.data + (step & 1) * pitch_of(a.batch); }
    __device__ __forceinline__ void choose_rows(long long step) const {
        for (int n = threadIdx.x; n < a.batch && step < a.steps; n += blockDim.x) rows_of(step)[n] = row_of(a, step, n);
    }

    // What the gradients of the mean loss are made of, by one thread of each example: of_class(k) is its k-th logit.
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

    // The weights of a layer: (inputs, outputs), by inputs transposed, (inputs, examples), and dz (examples, outputs).
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
