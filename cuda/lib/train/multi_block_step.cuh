// The common part of a training step of a multilayer perceptron by several blocks, for either norm: shared memory,
// softmax cross-entropy, weight updates.
#pragma once

#include "lib/gemm/product.cuh"
#include "lib/gemm/warp_rows.cuh"
#include "lib/numbers/rsqrt.cuh"
#include "lib/sync/grid_barrier.cuh"
#include "lib/train/network.cuh"
#include "lib/train/own_weights.cuh"

constexpr long long WARPS_OF_BLOCK = PRODUCT_THREADS / WARP;

// Layout of a block's shared memory.
template <typename T>
struct MultiBlockSharedLayout {
    T* terms;     // stages of products
    T* tile;      // (width, examples) or (width, neurons)
    T* saved;     // (warps, examples): z of the neuron that each warp differentiates
    T* top;       // largest logit of every example; NaN if its label is not a class
    T* scale;     // of exp(logit - top) of every example in the gradients of its logits
    T* losses;    // loss of every example
    int* labels;  // label of every example, of this step and the next
    int* data;    // row of the data of each example, of this step and the next

    template <typename Arguments>
    __device__ __forceinline__ MultiBlockSharedLayout(const Arguments& a, T* shared, int pitch, int saved_rows) {
        const int example_pitch = pitch_of(a.batch);
        top = shared;
        scale = top + example_pitch;
        losses = scale + example_pitch;
        labels = reinterpret_cast<int*>(losses + example_pitch);
        data = labels + 2 * example_pitch;
        tile = losses + 5 * example_pitch;
        saved = tile + a.width * pitch;
        terms = saved + saved_rows * pitch;
    }
};

// Gradients of a layer's z, (examples, neurons), by neurons: stored, or computed from the logits of the last layer.
template <typename T>
struct Gradients : Matrix<T, false> {
    bool of_logits;
    const T *top, *scale;  // of MultiBlockSharedLayout
    const int* labels;

    __device__ __forceinline__ bool is_stored() const { return !of_logits; }
    __device__ __forceinline__ T value(T stored, int m, int n) const {
        if (!of_logits) return stored;
        return fma(exp(stored - top[n]), scale[n], m == labels[n] ? T(-1) / T(Matrix<T, false>::rows) : T(0));
    }
};

template <typename T>
struct Centred {
    T mean, m2, rstd;
};

// Subtracts the mean of a row and returns its statistics; for the warp that owns the row. A part that all values
// have in common costs no digits of the mean: the sum is that of their differences from the first.
template <typename T>
__device__ __forceinline__ Centred<T> centre(const WarpRow<T>& z, T eps) {
    const T share = T(1) / T(z.count), first = z.row[0];
    const T mean = z.sum([=](int, T value) { return value - first; }) * share;
    __syncwarp();  // all threads have read the first
    T m2 = T(0);
#pragma unroll 2
    for (int n = z.lane; n < z.count; n += WARP) {
        const T value = z.row[n] = (z.row[n] - first) - mean;
        m2 = fma(value, value, m2);
    }
    m2 = warp_sum(m2);
    return {first + mean, m2, reciprocal_sqrt(fma(m2, share, eps))};
}

// Barrier: GridBarrier or ClusterBarrier.
template <typename T, typename Arguments, typename Barrier>
struct MultiBlockStep {
    const Arguments& a;
    const Barrier barrier;
    const int block;                         // index among the blocks of the model
    const OwnWeights<T, Arguments> weights;  // the first in shared memory
    const MultiBlockSharedLayout<T> smem;
    const T lr;

    __device__ __forceinline__ MultiBlockStep(const Arguments& a, const Barrier& barrier, int block, T* shared,
                                              int beside, int pitch, int saved_rows)
        : a(a),
          barrier(barrier),
          block(block),
          weights(a, shared),
          smem(a, weights.end() + beside, pitch, saved_rows),
          lr(a.rates[0]) {}

    __device__ __forceinline__ int field(int layer, Layer which) const { return field_of(a, layer, which); }
    __device__ __forceinline__ bool is_last(int layer) const { return layer + 1 == a.depth; }
    __device__ __forceinline__ const T* schedule_of(long long step) const { return a.schedule + 3 * step; }
    __device__ __forceinline__ const T* parameters_of(int layer, Layer which) const {
        return a.parameters + field(layer, which);
    }

    __device__ __forceinline__ Parameter<T> parameter(long long i) const {
        return load_parameter(a, a.parameters, a.first, a.second, i);
    }
    __device__ __forceinline__ void move(long long i, const Parameter<T>& before, T g, const T* schedule) const {
        update(a, a.parameters, a.first, a.second, i, before, g, lr, schedule);
    }
    __device__ __forceinline__ void move(long long i, T g, long long step) const {
        move(i, parameter(i), g, schedule_of(step));
    }

    // Calls work(first) for every tile of `width` neurons or examples, of `count`, that block number `owner` owns.
    template <typename Work>
    __device__ __forceinline__ void for_each_tile(int count, int owner, const Work& work) const {
#pragma unroll 1
        for (int first = owner * (int)a.width; first < count; first += (int)(a.blocks * a.width)) work(first);
    }

    __device__ __forceinline__ int* rows_of(long long step) const { return smem.data + (step & 1) * pitch_of(a.batch); }
    __device__ __forceinline__ void look_up_labels(long long step) const {
#pragma unroll 1
        for (int n = threadIdx.x; n < a.batch; n += PRODUCT_THREADS) labels_of(step)[n] = a.labels[rows_of(step)[n]];
    }
    __device__ __forceinline__ int* labels_of(long long step) const {
        return smem.labels + (step & 1) * pitch_of(a.batch);
    }
    __device__ __forceinline__ void choose_rows(long long step) const {
#pragma unroll 1
        for (int n = threadIdx.x; n < a.batch && step < a.steps; n += PRODUCT_THREADS)
            rows_of(step)[n] = row_of(a, step, n);
    }

    // Copies rows of the data, examples one after the other: part number `part` of `parts`, by all threads of a block.
    __device__ __forceinline__ void copy_rows(T* to, const int* rows, int examples, int part, int parts) const {
        const int inputs = field(0, INPUTS);
        if (inputs % COLUMNS<T> == 0 && (unsigned long long)a.x % 16 == 0 && (unsigned long long)to % 16 == 0)
            copy_pieces<SharedVector<T>>(to, rows, inputs / COLUMNS<T>, examples, part, parts);
        else
            copy_pieces<T>(to, rows, inputs, examples, part, parts);
    }

    // The same, of `count` pieces a row.
    template <typename Piece>
    __device__ __forceinline__ void copy_pieces(T* to, const int* rows, int count, int examples, int part,
                                                int parts) const {
        constexpr int AHEAD = STAGES_WRITTEN_OUT == 1 ? 1 : 4;  // pieces of a thread on their way
        const Piece* const from = reinterpret_cast<const Piece*>(a.x);
        const int all = count * examples, apart = parts * PRODUCT_THREADS;
#pragma unroll 1
        for (int first = part * PRODUCT_THREADS + threadIdx.x; first < all; first += AHEAD * apart) {
            Piece pieces[AHEAD];
#pragma unroll
            for (int j = 0; j < AHEAD; ++j) {
                const int i = first + j * apart;
                if (i < all) pieces[j] = from[(long long)rows[i / count] * count + i % count];
            }
#pragma unroll
            for (int j = 0; j < AHEAD; ++j)
                if (first + j * apart < all) reinterpret_cast<Piece*>(to)[first + j * apart] = pieces[j];
        }
    }

    // Softmax statistics and losses of `count` examples from number `begin` on, four threads an example, which share
    // its classes; logit(i, k) is the k-th logit of the i-th of them.
    template <typename Logit>
    __device__ __forceinline__ void softmax_cross_entropy(long long step, int begin, int count,
                                                          const Logit& logit) const {
        constexpr int SHARE = 4, HELD = 4;  // threads an example, and its logits that a thread keeps
        const int classes = field((int)a.depth - 1, OUTPUTS), own = threadIdx.x % SHARE;
#pragma unroll 1
        for (int first = threadIdx.x / WARP * WARP / SHARE; first < count; first += PRODUCT_THREADS / SHARE) {
            const int i = first + threadIdx.x % WARP / SHARE, here = min(i, count - 1), n = begin + here;
            const int label = labels_of(step)[n];
            T held[HELD], top = log(T(0)), of_label = T(0), total = T(0);
#pragma unroll
            for (int j = 0; j < HELD; ++j) {
                held[j] = log(T(0));
                if (own + j * SHARE < classes) held[j] = logit(here, own + j * SHARE);
            }
            const auto compare = [&](int k, T value) {
                top = value > top ? value : top;
                if (k == label) of_label = value;
            };
#pragma unroll
            for (int j = 0; j < HELD; ++j) compare(own + j * SHARE, held[j]);
#pragma unroll 1
            for (int k = own + HELD * SHARE; k < classes; k += SHARE) compare(k, logit(here, k));
#pragma unroll
            for (int lanes = 1; lanes < SHARE; lanes *= 2) {
                const T others = __shfl_xor_sync(0xffffffffu, top, lanes);
                top = others > top ? others : top;
            }
#pragma unroll
            for (int j = 0; j < HELD; ++j)
                if (own + j * SHARE < classes) total += exp(held[j] - top);
#pragma unroll 1
            for (int k = own + HELD * SHARE; k < classes; k += SHARE) total += exp(logit(here, k) - top);
#pragma unroll
            for (int lanes = 1; lanes < SHARE; lanes *= 2) {
                total += __shfl_xor_sync(0xffffffffu, total, lanes);
                of_label += __shfl_xor_sync(0xffffffffu, of_label, lanes);
            }
            if (i >= count || own != 0) continue;
            const T poison = 0 <= label && label < classes ? T(0) : T(nan(""));
            smem.scale[n] = T(1) / (total * T(a.batch));
            smem.top[n] = top + poison;
            smem.losses[n] = log(total) - (of_label - top) + poison;
        }
    }

    // Updates the weights (inputs, outputs) of a layer from its transposed inputs (inputs, examples) and dz (examples,
    // outputs). Weights that other blocks read are published: kept ones are stored in global memory, too.
    template <typename Inputs, typename Outputs>
    __device__ __forceinline__ void update_weights(int layer, long long step, const Inputs& inputs_transposed,
                                                   const Outputs& dz, int column, bool published) const {
        const auto own = weights.tiles(layer, column);
        const WeightTile<T> global = weights.stored(0, layer, column);
        const T* const row = schedule_of(step);
        const T schedule[3] = {row[0], row[1], row[2]};
        fma_product<(STAGES_WRITTEN_OUT == 1 ? 1 : 4)>(
            smem.terms, inputs_transposed, dz, column, (int)a.width, (int)a.buffers,
            [&](int r, int c) { return load_parameter(a, own.weight, own.first, own.second, Element{r, c}); },
            [&](int r, int c, T g, const Parameter<T>& before) {
                const Element e = {r, c};
                const T value = update(a, own.weight, own.first, own.second, e, before, g, lr, schedule);
                if (a.kept && published) global[e] = value;
            });
    }
};
