// Batch normalisation in training, then an activation, by cooperative blocks on the whole device; rows of 16 bytes.
//
// Formulas:  as in batch_norm_forward.cu.
// Arrays:    x, residual (outer, C, inner), y in C order, of type T: float or 16 bits. CHANNELS_LAST: inner = 1; C, the
//            outer strides and all addresses are multiples of 16 bytes, and channels are contiguous. Otherwise inner
//            and the other strides are such multiples, and the inner axis is contiguous. The other arrays as in
//            batch_norm_forward.cu, of float. partial (2, columns, splits, 3, w) of float; barrier_counter: a counter
//            for every column, see lib/sync/grid_barrier.cuh.
// Launch:    Block (w / COUNT, workers, 1) with CHANNELS_LAST, else (1, workers, 1) and w = 1; COUNT is the number of
//            elements in 16 bytes, workers is a multiple of 4. Grid (columns, splits, 1), see
//            lib/reduce/cooperative_slices.cuh; cooperative if splits > 1, a power of two, at most 8 workers. Every
//            worker has a row. A block keeps `held` rows a thread in shared memory: 12 w workers bytes and 16 threads
//            held. Neighbouring threads access neighbouring vectors.
// Traffic:   N C reads and N C writes of T as long as all rows are held. The other rows are read twice, the second time
//            in descending order, which is likely to hit the L2 cache. A residual adds N C reads. The blocks exchange
//            24 splits bytes a channel.
// Numerics:  As batch_norm_forward.cu: chunks of a thread's rows in pairs, merged after Chan, Golub and LeVeque.
//            Deterministic: chunks, then workers 8 at a time, then splits 8 at a time, always in ascending order.
// Reference: Ioffe and Szegedy, Batch Normalization, 2015, arXiv:1502.03167, algorithm 1.
// Called by: bnkernels/ops/batch_norm/training.py
#include "lib/kernel.cuh"
#include "lib/numbers/activation.cuh"
#include "lib/numbers/pair.cuh"
#include "lib/reduce/cooperative_slices.cuh"
#include "lib/reduce/moments.cuh"
#include "lib/reduce/normalisation.cuh"

constexpr int CHUNK = 4;  // rows that a thread has in flight

template <typename T>
struct BatchNormForwardCooperative {
    const T* x;
    const T* residual;
    const float* gamma;
    const float* beta;
    T* y;
    float* statistics;
    float* running_mean;
    float* running_var;
    float* partial;
    unsigned* barrier_counter;
    long long outer, channels, inner;
    long long x_outer, x_channel;  // strides, in elements
    long long residual_outer, residual_channel;
    long long held;  // rows of a thread that stay in shared memory
    float momentum, divisor, eps, alpha;
    int activation;
};

// Mean, mean_low and M2 of a channel.
struct PartialMoments {
    static constexpr int QUANTITIES = 3;

    static __device__ __forceinline__ void store(float* slot, long long plane, const Moments<float>& own) {
        slot[0] = own.mean.high;
        slot[plane] = own.mean.low;
        slot[2 * plane] = value(own.m2);
    }
    static __device__ __forceinline__ void merge(float* to, long long to_plane, const float* slots, long long plane,
                                                 long long pitch, const RowCounts& counts, int first, int last,
                                                 int step) {
        store(to, to_plane, merge_workers(slots, plane, pitch, counts, first, last, step));
    }
};

// Merges the moments of a chunk's first `count` rows into those of the rows before.
template <typename T, bool CHANNELS_LAST, int THREAD_CHANNELS>
__device__ __forceinline__ void add_chunk(Moments<float> (&own)[THREAD_CHANNELS], const Vector (&chunk)[CHUNK],
                                          int count, bool first) {
    constexpr int COUNT = Packed<T>::COUNT, VALUES = CHANNELS_LAST ? CHUNK : CHUNK * COUNT;
#pragma unroll
    for (int c = 0; c < THREAD_CHANNELS; ++c) {
        float values[VALUES];
#pragma unroll
        for (int i = 0; i < VALUES; ++i)
            values[i] = CHANNELS_LAST ? Packed<T>::get(chunk[i], c) : Packed<T>::get(chunk[i / COUNT], i % COUNT);
        Moments<float> moments = moments_of(values, CHANNELS_LAST ? count : count * COUNT);
        if (!first) moments = merge(own[c], moments);
        own[c] = {moments.count, moments.mean, {value(moments.m2), 0.0f}};  // one number: registers are scarce
    }
}

// Moments of the thread's rows of its channels c, c + 1, ...; keeps the first rows in shared memory.
template <typename T, bool CHANNELS_LAST, int THREAD_CHANNELS>
__device__ __forceinline__ void read_rows(const BatchNormForwardCooperative<T>& a,
                                          const ThreadRows<T, CHANNELS_LAST>& thread_rows, long long c,
                                          const ThreadVectors& held, Moments<float> (&own)[THREAD_CHANNELS]) {
    Rows<CHANNELS_LAST> row = thread_rows.from(0);
    for (long long first = 0; row.inside(); first += CHUNK) {
        Vector chunk[CHUNK];
        int count = 0;
#pragma unroll
        for (int i = 0; i < CHUNK; ++i)
            if (row.inside()) {
                chunk[i] = bnk_load_vector(a.x + thread_rows.at(row, a.x_outer, a.x_channel, c));
                row.advance();
                ++count;
            }
#pragma unroll
        for (int i = 0; i < CHUNK; ++i)
            if (i < count && first + i < a.held) held[first + i] = chunk[i];
        add_chunk<T, CHANNELS_LAST>(own, chunk, count, first == 0);
    }
}

// Merged statistics of a channel of the slice.
template <typename T>
__device__ __forceinline__ Statistics<float> merged_statistics(const BatchNormForwardCooperative<T>& a,
                                                               const SliceReduction<PartialMoments>& reduction,
                                                               int channel) {
    const float* slot = reduction.shared + channel;
    const float m2 = slot[2 * reduction.plane];
    return {{slot[0], slot[reduction.plane]}, m2, 1.0f / sqrt(m2 / float(a.outer * a.inner) + a.eps)};
}

// Writes the statistics of the channels c, c + 1, ...; for worker 0 of split 0.
template <typename T, int THREAD_CHANNELS>
__device__ __forceinline__ void write_statistics(const BatchNormForwardCooperative<T>& a, long long c,
                                                 const SliceReduction<PartialMoments>& reduction) {
#pragma unroll 1
    for (int i = 0; i < THREAD_CHANNELS; ++i, ++c) {
        const Statistics<float> merged = merged_statistics(a, reduction, threadIdx.x * THREAD_CHANNELS + i);
        a.statistics[c] = merged.mean.high;
        a.statistics[a.channels + c] = merged.mean.low;
        a.statistics[2 * a.channels + c] = merged.rstd;
        const float keep = 1.0f - a.momentum, var = merged.m2 / a.divisor;
        if (a.running_mean) a.running_mean[c] = fma(a.momentum, merged.mean.high, keep * a.running_mean[c]);
        if (a.running_var) a.running_var[c] = fma(a.momentum, var, keep * a.running_var[c]);
    }
}

template <typename T, int THREAD_CHANNELS>
__device__ __forceinline__ void load_channels(Affine<float> (&channels)[THREAD_CHANNELS],
                                              const BatchNormForwardCooperative<T>& a, long long c,
                                              const SliceReduction<PartialMoments>& reduction) {
#pragma unroll
    for (int i = 0; i < THREAD_CHANNELS; ++i) {
        const Statistics<float> merged = merged_statistics(a, reduction, threadIdx.x * THREAD_CHANNELS + i);
        channels[i] = {merged.mean, a.gamma ? a.gamma[c + i] * merged.rstd : merged.rstd,
                       a.beta ? a.beta[c + i] : 0.0f};
    }
}

template <typename T, int THREAD_CHANNELS>
__device__ __forceinline__ Vector normalise(const BatchNormForwardCooperative<T>& a,
                                            const Affine<float> (&channels)[THREAD_CHANNELS], const Vector& x,
                                            const Vector& residual) {
    constexpr int COUNT = Packed<T>::COUNT;
    float z[COUNT];
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        z[i] = channels[THREAD_CHANNELS == 1 ? 0 : i](Packed<T>::get(x, i));
        if (a.residual) z[i] += Packed<T>::get(residual, i);
    }
    activate_all(z, a.activation, a.alpha);
    Vector y;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) Packed<T>::set(y, i, z[i]);
    return y;
}

// Descending order: the rows that are read again were read last.
template <typename T, bool CHANNELS_LAST, int THREAD_CHANNELS>
__device__ __forceinline__ void write_rows(const BatchNormForwardCooperative<T>& a,
                                           const ThreadRows<T, CHANNELS_LAST>& thread_rows, long long c,
                                           const ThreadVectors& held,
                                           const Affine<float> (&channels)[THREAD_CHANNELS]) {
    constexpr int AHEAD = THREAD_CHANNELS > 4 ? 1 : 2;  // rows in flight; registers are scarce
    for (long long last = thread_rows.count(); last > 0; last -= AHEAD) {
        const long long first = max(last - AHEAD, 0ll);
        const Rows<CHANNELS_LAST> start = thread_rows.from(first);
        Vector x[AHEAD], residual[AHEAD];
        Rows<CHANNELS_LAST> row = start;
#pragma unroll
        for (int i = 0; i < AHEAD; ++i)
            if (first + i < last) {
                x[i] = first + i < a.held ? held[first + i]
                                          : bnk_load_vector(a.x + thread_rows.at(row, a.x_outer, a.x_channel, c));
                if (a.residual)
                    residual[i] =
                        bnk_load_vector(a.residual + thread_rows.at(row, a.residual_outer, a.residual_channel, c));
                row.advance();
            }
        row = start;
#pragma unroll
        for (int i = 0; i < AHEAD; ++i)
            if (first + i < last) {
                bnk_store_vector(a.y + thread_rows.at_output(row, a.channels, c),
                                 normalise(a, channels, x[i], residual[i]));
                row.advance();
            }
    }
}

template <typename T, bool CHANNELS_LAST>
__device__ __forceinline__ void batch_norm_forward_cooperative(const BatchNormForwardCooperative<T>& a) {
    BNK_DYNAMIC_SHARED(float, shared);
    constexpr int THREAD_CHANNELS = ThreadRows<T, CHANNELS_LAST>::THREAD_CHANNELS;
    const ThreadRows<T, CHANNELS_LAST> thread_rows(a.outer, a.inner);
    const int width = blockDim.x * THREAD_CHANNELS;
    const SliceReduction<PartialMoments> reduction(shared, thread_rows.counts(), width);
    const ThreadVectors held(shared + PartialMoments::QUANTITIES * reduction.plane);
    bool odd = false;
    for (long long slice = blockIdx.x; slice * width < a.channels; slice += gridDim.x) {
        const long long c = slice * width + threadIdx.x * THREAD_CHANNELS;
        const bool active = c < a.channels;  // no early return: every thread must reach the barriers
        if (active) {
            Moments<float> own[THREAD_CHANNELS];
            read_rows(a, thread_rows, c, held, own);
#pragma unroll
            for (int i = 0; i < THREAD_CHANNELS; ++i)
                PartialMoments::store(reduction.slot(THREAD_CHANNELS) + i, reduction.plane, own[i]);
        }
        reduction.merge(a.partial, a.barrier_counter, odd);
        if (active) {
            if (threadIdx.y == 0 && blockIdx.y == 0) write_statistics<T, THREAD_CHANNELS>(a, c, reduction);
            Affine<float> channels[THREAD_CHANNELS];
            load_channels(channels, a, c, reduction);
            write_rows(a, thread_rows, c, held, channels);
        }
        __syncthreads();  // all threads have read the merged moments
        odd = !odd;
    }
}

#define BATCH_NORM_FORWARD_COOPERATIVE(variant, suffix, T, channels)                                  \
    BNK_KERNEL(bnk_batch_norm_forward_##variant##_##suffix, (BatchNormForwardCooperative<T>), 256, 2, \
               (batch_norm_forward_cooperative<T, channels>))

BATCH_NORM_FORWARD_COOPERATIVE(cooperative, f32, float, true)
BATCH_NORM_FORWARD_COOPERATIVE(cooperative_inner, f32, float, false)
BATCH_NORM_FORWARD_COOPERATIVE(cooperative, f16, Float16, true)
BATCH_NORM_FORWARD_COOPERATIVE(cooperative_inner, f16, Float16, false)
BATCH_NORM_FORWARD_COOPERATIVE(cooperative, bf16, BFloat16, true)
BATCH_NORM_FORWARD_COOPERATIVE(cooperative_inner, bf16, BFloat16, false)
