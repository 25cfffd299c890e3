// Gradients of layer norm, RMS norm or group norm with its scale, shift and activation, in one launch.
//
// Formulas:  xhat = rstd[n] (x - mean[n]), z = gamma[c] xhat + beta[c], g = dy phi'(z), h = gamma g
//            dbeta[c] = sum_n g,  dgamma[c] = sum_n g xhat
//            dx = rstd (h - sum h / C - xhat sum (h xhat) / C)        sums over the C values of a row
//            RMS norm, where rows are not centred: without mean, sum h, beta and dbeta.
//            Group norm: as in layer_norm_forward.cu; dgamma and dbeta of a channel sum over its I columns too.
// Arrays:    dy, x, dx as x in layer_norm_forward.cu; dx may alias dy. gamma, beta (G D,) of the accumulator's type A
//            or of T, may be null (1, 0). dgamma, dbeta (G D,) of their type. statistics (3, N) of A: mean, mean_low,
//            rstd; of RMS norm (1, N): rstd. partial (blocks, 2, D) of A: partial sums of dgamma and dbeta of every
//            block, unused where a group of channels has one. barrier_counter: see lib/sync/grid_barrier.cuh.
// Launch:    Block (width, r, 1), width a power of two and width r = `threads` a multiple of 32. The grid is any
//            multiple of G: block b takes rows of group b mod G of the channels, in turn; cooperative if such a group
//            has more than one block. The threads with the same threadIdx.y share a row.
//            A thread has `held` vectors of a row, 1 to MOST_HELD, and keeps the sums of their columns in registers;
//            longer rows are for layer_norm_backward_cooperative.cu. Dynamic shared memory: 4 numbers of type A for
//            every warp; for every thread, `stages` times `held` vectors of dy and of x: a row and with two stages the
//            next one, on its way; and a Pair<A> for every column sum. Variants: linear, of the piecewise linear
//            activations, and curved; and both for channels that come last, of 256 threads at most: places and
//            parameters that are no vectors take more than the registers of 512.
// Traffic:   dy and x read once and dx written once; gamma, beta from the cache. Partial sums: 2 D words of every
//            block, written once and read once; of RMS norm D.
// Numerics:  In A. Sums of a row are plain; a number is divided by C before it is added, so that they cannot overflow.
//            Sums of a column are plain for ROWS_IN_REGISTERS rows of a thread, then in pairs. Blocks' partial sums
//            are in A, rows and blocks in a fixed order: deterministic. A row whose variance counts as infinite has
//            xhat = 0.
// Reference: Ba, Kiros and Hinton, Layer Normalization, 2016, arXiv:1607.06450; Zhang and Sennrich, Root Mean Square
//            Layer Normalization, 2019, arXiv:1910.07467.
// Called by: bnkernels/ops/layer_norm/op.py
#include "lib/kernel.cuh"
#include "lib/numbers/pair.cuh"
#include "lib/reduce/row_gradients.cuh"
#include "lib/reduce/vector_rows.cuh"
#include "lib/reduce/warp.cuh"
#include "lib/sync/async_copy.cuh"
#include "lib/sync/grid_barrier.cuh"

template <typename T>
constexpr int MOST_HELD = sizeof(T) == 4 ? 4 : 2;

// scaled: by gamma, shifted: by beta, as ParameterKind. centred: 0 for RMS norm. channel_groups, inner: G and I.
// adjacent: D if channels come last, else 0. half_share: 1 / (2 C).
template <typename T, typename A>
struct LayerNormBackward {
    const T* dy;
    const T* x;
    const void* gamma;
    const void* beta;
    const A* statistics;
    T* dx;
    void* dgamma;
    void* dbeta;
    A* partial;
    unsigned* barrier_counter;
    long long rows, columns;
    A alpha, half_share;
    int activation, shape, scaled, shifted, centred, channel_groups, inner, width, held, stages, threads, adjacent;
};

// A thread's sums for dgamma and dbeta over the columns of its units, in shared memory.
template <typename T, typename A>
struct ColumnSums {
    Pair<A>* sums;  // [unit of a thread][dgamma, dbeta][element of the unit][thread]
    int thread, threads, width, held, quantities;

    __device__ __forceinline__ ColumnSums(const LayerNormBackward<T, A>& a, void* shared)
        : sums(static_cast<Pair<A>*>(shared)),
          thread((int)threadIdx.y * a.width + (int)threadIdx.x),
          threads(a.threads),
          width(a.width),
          held(a.held),
          quantities(::quantities(a)) {}

    __device__ __forceinline__ Pair<A>& at(int k, int quantity, int i, int owner) const {
        return sums[((k * 2 + quantity) * UNIT<T> + i) * threads + owner];
    }

    __device__ __forceinline__ void clear() const {
        for (int i = 0; i < held * 2 * UNIT<T>; ++i) sums[i * threads + thread] = {A(0), A(0)};
    }

    // Adds the terms of all units, and clears them.
    __device__ __forceinline__ void add_terms(ColumnTerms<T, A> (&terms)[MOST_HELD<T>]) const {
#pragma unroll
        for (int k = 0; k < MOST_HELD<T>; ++k) {
            if (k >= held) continue;
#pragma unroll
            for (int i = 0; i < UNIT<T>; ++i) {
                Pair<A>&dgamma = at(k, 0, i, thread), &dbeta = at(k, 1, i, thread);
                dgamma = add(dgamma, terms[k].dgamma[i]);
                if (quantities == 2) dbeta = add(dbeta, terms[k].dbeta[i]);
            }
            terms[k] = {};
        }
    }

    // Sum of a column over the block's rows of threads, in order.
    __device__ __forceinline__ Pair<A> of_column(int column, int quantity) const {
        const int unit = column / UNIT<T>, i = column % UNIT<T>;
        const int k = unit / width, column_thread = unit % width;
        Pair<A> sum = at(k, quantity, i, column_thread);
        for (int row = 1; row < threads / width; ++row) sum = add(sum, at(k, quantity, i, row * width + column_thread));
        return sum;
    }

    // Calls emit(channel, quantity, sum) for all channels of the row, of `inner` columns each.
    template <typename Units, typename Emit>
    __device__ __forceinline__ void merge_rows(int columns, int inner, const Emit& emit) const {
        if (inner > 1) return merge_channels<Units>(columns / inner, inner, emit);
        for (int item = thread; item < columns * quantities; item += threads)
            emit(item % columns, item / columns, value(of_column(item % columns, item / columns)));
    }

    // The same for channels of several columns, by a warp each.
    template <typename Units, typename Emit>
    __device__ __forceinline__ void merge_channels(int channels, int inner, const Emit& emit) const {
        for (int item = thread / WARP; item < channels * quantities; item += threads / WARP) {
            const int channel = item % channels, quantity = item / channels;
            Pair<A> sum = {A(0), A(0)};
            for (int i = thread % WARP; i < inner; i += WARP)
                sum = add(sum, of_column(Units::column_of(channel, i, inner, channels), quantity));
            sum = warp_sum(sum);
            if (thread % WARP == 0) emit(channel, quantity, value(sum));
        }
    }
};

// The column sums of the block's rows, and their dx.
template <bool CURVED, typename Units, typename T, typename A>
__device__ __forceinline__ void differentiate_rows(const LayerNormBackward<T, A>& a, Vector* stages,
                                                   const ColumnSums<T, A>& sums, A* scratch) {
    using Row = RowGradients<CURVED, MOST_HELD<T>, Units, LayerNormBackward<T, A>>;
    const GroupRows own(a);
    const long long step = (long long)own.blocks * blockDim.y, first = (long long)own.block * blockDim.y;
    const Units units = Units::of_row(a);
    const auto row_of = [&](long long n, int stage, const RowStatistics<A>& statistics) {
        const ThreadVectors places(stages + stage * 2 * a.held * a.threads + sums.thread, a.threads);
        return Row(a, units, places, own.row(n), 0, statistics);
    };
    ColumnTerms<T, A> terms[MOST_HELD<T>] = {};
    RowStatistics<A> next = statistics_of(a, own.row(first + threadIdx.y));
    if (a.stages == 2) row_of(first + threadIdx.y, 0, next).ask();
    sums.clear();
    int summed = 0;
#pragma unroll 1
    for (long long block_row = first; block_row < own.all; block_row += step) {  // the same in all threads
        const int odd = summed % 2;
        const long long n = block_row + threadIdx.y;
        const Row row = row_of(n, a.stages == 2 ? odd : 0, next);
        next = statistics_of(a, own.row(n + step));
        row_of(a.stages == 2 ? n + step : n, a.stages == 2 ? 1 - odd : 0, next).ask();
        if (a.stages == 2)
            wait_for_copies<1>();
        else
            wait_for_copies<0>();
        A of_row[2] = {A(0), A(0)};
        row.add(of_row, terms);
        sums_of_row(a, of_row, a.width,
                    scratch + odd * 2 * a.threads / WARP);  // another thread may still read the other
        row.write(of_row);
        ++summed;
        if (summed % ROWS_IN_REGISTERS == 0 || block_row + step >= own.all) sums.add_terms(terms);
    }
    wait_for_copies<0>();
}

// Merges the partial sums of the blocks of a group, of all its channels; each channel by one block.
template <typename T, typename A>
__device__ __forceinline__ void merge_blocks(const LayerNormBackward<T, A>& a, const GroupRows& rows, A* shared) {
    const int blocks = rows.blocks, thread = threadIdx.y * blockDim.x + threadIdx.x;
    const long long channels = a.columns / a.inner, all = quantities(a) * channels;
    const long long own = (all + blocks - 1) / blocks, first = own * rows.block;
    const int width = (int)min(own, (long long)a.threads), parts = a.threads / width;  // of the blocks, side by side
#pragma unroll 1
    for (long long item = first; item < min(first + own, all); item += width) {
        const int column = thread % width, part = thread / width;
        const bool has = part < parts && item + column < min(first + own, all);
        Pair<A> sum = {A(0), A(0)};
#pragma unroll 4
        for (int block = part; has && block < blocks; block += parts)
            sum = add(sum, a.partial[rows.row(block) * 2 * channels + item + column]);
        shared[thread] = value(sum);
        __syncthreads();
        if (has && part == 0) {
            sum = {A(0), A(0)};
            for (int i = 0; i < parts; ++i) sum = add(sum, shared[i * width + column]);
            const int quantity = item + column < channels ? DGAMMA : DBETA;
            store_sum<T>(a, quantity, rows.group * channels + item + column - quantity * channels, value(sum));
        }
        __syncthreads();
    }
}

template <bool CURVED, typename Units, typename T, typename A>
__device__ __forceinline__ void layer_norm_backward(const LayerNormBackward<T, A>& arguments) {
    BNK_DYNAMIC_SHARED(Vector, shared);
    LayerNormBackward<T, A> a = arguments;
    take_constants(a);
    Vector* const stages = shared + a.threads / WARP * sizeof(A) / 4;
    const ColumnSums<T, A> sums(a, stages + a.stages * 2 * a.held * a.threads);
    differentiate_rows<CURVED, Units>(a, stages, sums, reinterpret_cast<A*>(shared));
    __syncthreads();
    const GroupRows rows(a);
    const long long channels = a.columns / a.inner;
    sums.template merge_rows<Units>((int)a.columns, a.inner, [&](int channel, int quantity, A sum) {
        if (rows.blocks > 1)
            a.partial[((long long)blockIdx.x * 2 + quantity) * channels + channel] = sum;
        else
            store_sum<T>(a, quantity, rows.group * channels + channel, sum);
    });
    if (rows.blocks == 1) return;
    grid_barrier(a.barrier_counter, gridDim.x, blockIdx.x);
    merge_blocks(a, rows, reinterpret_cast<A*>(shared));
}

#define LAYER_NORM_BACKWARD(variant, suffix, curved, T, A)                                      \
    BNK_KERNEL(bnk_layer_norm_backward_##variant##_##suffix, (LayerNormBackward<T, A>), 512, 1, \
               (layer_norm_backward<curved, RowUnits<T>, T, A>))

LAYER_NORM_BACKWARD(linear, f32, false, float, float)
LAYER_NORM_BACKWARD(linear, f16, false, Float16, float)
LAYER_NORM_BACKWARD(linear, bf16, false, BFloat16, float)
LAYER_NORM_BACKWARD(linear, f64, false, double, double)
LAYER_NORM_BACKWARD(curved, f32, true, float, float)
LAYER_NORM_BACKWARD(curved, f16, true, Float16, float)
LAYER_NORM_BACKWARD(curved, bf16, true, BFloat16, float)
LAYER_NORM_BACKWARD(curved, f64, true, double, double)

#define LAYER_NORM_BACKWARD_LAST(variant, suffix, curved, T, A)                                      \
    BNK_KERNEL(bnk_layer_norm_backward_##variant##_last_##suffix, (LayerNormBackward<T, A>), 256, 1, \
               (layer_norm_backward<curved, LastUnits<T>, T, A>))

LAYER_NORM_BACKWARD_LAST(linear, f32, false, float, float)
LAYER_NORM_BACKWARD_LAST(linear, f16, false, Float16, float)
LAYER_NORM_BACKWARD_LAST(linear, bf16, false, BFloat16, float)
LAYER_NORM_BACKWARD_LAST(linear, f64, false, double, double)
LAYER_NORM_BACKWARD_LAST(curved, f32, true, float, float)
LAYER_NORM_BACKWARD_LAST(curved, f16, true, Float16, float)
LAYER_NORM_BACKWARD_LAST(curved, bf16, true, BFloat16, float)
LAYER_NORM_BACKWARD_LAST(curved, f64, true, double, double)
