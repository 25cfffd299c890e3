// Gradients of batch normalisation in training by cooperative blocks on the whole device; rows of 16 bytes.
//
// Formulas:  as in batch_norm_backward.cu, for batch statistics.
// Arrays:    dy, x, residual (outer, C, inner), dx and dresidual in C order, of type T: float or 16 bits, all with
//            strides and addresses as in batch_norm_forward_cooperative.cu. The other arrays as in
//            batch_norm_backward.cu, of float. partial (2, columns, splits, 2, w) of float; barrier_counter: a counter
//            for every column.
// Launch:    As batch_norm_forward_cooperative.cu; shared memory 8 w workers bytes and 32 threads held, for x and dy.
// Traffic:   2 N C reads and N C writes of T as long as all rows are held. The other rows are read twice, the second
//            time in descending order. A residual is read twice, its gradient written once. The blocks exchange 16
//            splits bytes a channel.
// Numerics:  As batch_norm_backward.cu: both sums in pairs. Deterministic: a thread's rows, then workers 8 at a time,
//            then splits 8 at a time, always in ascending order.
// Reference: Ioffe and Szegedy, Batch Normalization, 2015, arXiv:1502.03167, section 3.
// Called by: bnkernels/ops/batch_norm/training.py
#include "lib/kernel.cuh"
#include "lib/numbers/activation.cuh"
#include "lib/numbers/pair.cuh"
#include "lib/reduce/cooperative_slices.cuh"
#include "lib/reduce/normalisation.cuh"

constexpr int CHUNK = 2;  // rows of x and of dy that a thread has in flight

template <typename T>
struct BatchNormBackwardCooperative {
    const T* dy;
    const T* x;
    const T* residual;
    const float* gamma;
    const float* beta;
    const float* mean;
    const float* mean_low;
    const float* rstd;
    T* dx;
    float* dgamma;
    float* dbeta;
    T* dresidual;
    float* partial;
    unsigned* barrier_counter;
    long long outer, channels, inner;
    long long dy_outer, dy_channel;  // strides, in elements
    long long x_outer, x_channel;
    long long residual_outer, residual_channel;
    long long held;  // rows of a thread that stay in shared memory
    float alpha;
    int activation;
};

// Sums over rows: of g, and of g (x - mean).
struct PartialSums {
    static constexpr int QUANTITIES = 2;

    static __device__ __forceinline__ void merge(float* to, long long to_plane, const float* slots, long long plane,
                                                 long long pitch, const RowCounts&, int first, int last, int step) {
        Pair<float> g = {0.0f, 0.0f}, g_centred = {0.0f, 0.0f};
        for (int worker = first; worker < last; worker += step, slots += pitch) {
            g = add(g, slots[0]);
            g_centred = add(g_centred, slots[plane]);
        }
        to[0] = value(g);
        to[to_plane] = value(g_centred);
    }
};

template <typename T, int THREAD_CHANNELS>
__device__ __forceinline__ void load_channels(Affine<float> (&channels)[THREAD_CHANNELS],
                                              const BatchNormBackwardCooperative<T>& a, long long c) {
#pragma unroll
    for (int i = 0; i < THREAD_CHANNELS; ++i)
        channels[i] = {{a.mean[c + i], a.mean_low[c + i]},
                       a.gamma ? a.gamma[c + i] * a.rstd[c + i] : a.rstd[c + i],
                       a.beta ? a.beta[c + i] : 0.0f};
}

// The inputs of a row.
struct Inputs {
    Vector x, dy, residual;
};

// x - mean and g of a row.
template <typename T>
struct RowGradient {
    static constexpr int COUNT = Packed<T>::COUNT;
    float centred[COUNT], g[COUNT];

    template <int THREAD_CHANNELS>
    __device__ __forceinline__ RowGradient(const BatchNormBackwardCooperative<T>& a,
                                           const Affine<float> (&channels)[THREAD_CHANNELS], const Inputs& row) {
        float z[COUNT];
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const Affine<float>& channel = channels[THREAD_CHANNELS == 1 ? 0 : i];
            centred[i] = subtract(Packed<T>::get(row.x, i), channel.mean);
            g[i] = Packed<T>::get(row.dy, i);
            z[i] = channel.of_centred(centred[i]);
            if (a.residual) z[i] += Packed<T>::get(row.residual, i);
        }
        activation_backward_all(g, z, a.activation, a.alpha);
    }
};

template <typename T, bool CHANNELS_LAST>
__device__ __forceinline__ Vector load_residual(const BatchNormBackwardCooperative<T>& a,
                                                const ThreadRows<T, CHANNELS_LAST>& thread_rows,
                                                const Rows<CHANNELS_LAST>& row, long long c) {
    if (!a.residual) return {};
    return bnk_load_vector(a.residual + thread_rows.at(row, a.residual_outer, a.residual_channel, c));
}

template <typename T, bool CHANNELS_LAST>
__device__ __forceinline__ Inputs load_inputs(const BatchNormBackwardCooperative<T>& a,
                                              const ThreadRows<T, CHANNELS_LAST>& thread_rows,
                                              const Rows<CHANNELS_LAST>& row, long long c) {
    return {bnk_load_vector(a.x + thread_rows.at(row, a.x_outer, a.x_channel, c)),
            bnk_load_vector(a.dy + thread_rows.at(row, a.dy_outer, a.dy_channel, c)),
            load_residual(a, thread_rows, row, c)};
}

// Sums the thread's rows of its channels c, c + 1, ... into its slot; keeps the first rows in shared memory.
template <typename T, bool CHANNELS_LAST, int THREAD_CHANNELS>
__device__ __forceinline__ void read_rows(const BatchNormBackwardCooperative<T>& a,
                                          const ThreadRows<T, CHANNELS_LAST>& thread_rows, long long c,
                                          const Affine<float> (&channels)[THREAD_CHANNELS], const ThreadVectors& held_x,
                                          const ThreadVectors& held_dy, float* slot, int plane) {
    Pair<float> g[THREAD_CHANNELS], g_centred[THREAD_CHANNELS];
#pragma unroll
    for (int i = 0; i < THREAD_CHANNELS; ++i) g[i] = g_centred[i] = {0.0f, 0.0f};
    Rows<CHANNELS_LAST> row = thread_rows.from(0);
    for (long long first = 0; row.inside(); first += CHUNK) {
        Inputs chunk[CHUNK];
        int count = 0;
#pragma unroll
        for (int i = 0; i < CHUNK; ++i)
            if (row.inside()) {
                chunk[i] = load_inputs(a, thread_rows, row, c);
                row.advance();
                ++count;
            }
#pragma unroll 1
        for (int i = 0; i < count; ++i) {
            if (first + i < a.held) {
                held_x[first + i] = chunk[0].x;
                held_dy[first + i] = chunk[0].dy;
            }
            const RowGradient<T> gradient(a, channels, chunk[0]);
#pragma unroll
            for (int j = 0; j < RowGradient<T>::COUNT; ++j) {
                const int own = THREAD_CHANNELS == 1 ? 0 : j;
                g[own] = add(g[own], gradient.g[j]);
                g_centred[own] = add(g_centred[own], gradient.g[j] * gradient.centred[j]);
            }
            rotate(chunk);
        }
    }
#pragma unroll
    for (int i = 0; i < THREAD_CHANNELS; ++i) {
        slot[i] = value(g[i]);
        slot[plane + i] = value(g_centred[i]);
    }
}

// Coefficients of dx = scale (g - mean_g - (x - mean) slope). Worker 0 of split 0 writes the parameters' gradients.
template <int THREAD_CHANNELS>
struct Means {
    float g[THREAD_CHANNELS], slope[THREAD_CHANNELS];

    template <typename Arguments>
    __device__ __forceinline__ Means(const Arguments& a, long long c, const float* sums, int plane) {
        const float n = float(a.outer * a.inner);
#pragma unroll
        for (int i = 0; i < THREAD_CHANNELS; ++i) {
            const float rstd = a.rstd[c + i];
            g[i] = sums[i] / n;
            slope[i] = sums[plane + i] * rstd * rstd / n;
            if (threadIdx.y == 0 && blockIdx.y == 0) {
                if (a.dgamma) a.dgamma[c + i] = sums[plane + i] * rstd;
                if (a.dbeta) a.dbeta[c + i] = sums[i];
            }
        }
    }
};

// Descending order: the rows that are read again were read last.
template <typename T, bool CHANNELS_LAST, int THREAD_CHANNELS>
__device__ __forceinline__ void write_rows(const BatchNormBackwardCooperative<T>& a,
                                           const ThreadRows<T, CHANNELS_LAST>& thread_rows, long long c,
                                           const Affine<float> (&channels)[THREAD_CHANNELS],
                                           const ThreadVectors& held_x, const ThreadVectors& held_dy,
                                           const Means<THREAD_CHANNELS>& means) {
    for (long long i = thread_rows.count() - 1; i >= 0; --i) {
        const Rows<CHANNELS_LAST> row = thread_rows.from(i);
        const Inputs inputs = i < a.held ? Inputs{held_x[i], held_dy[i], load_residual(a, thread_rows, row, c)}
                                         : load_inputs(a, thread_rows, row, c);
        const RowGradient<T> gradient(a, channels, inputs);
        Vector dx, dresidual;
#pragma unroll
        for (int j = 0; j < RowGradient<T>::COUNT; ++j) {
            const int own = THREAD_CHANNELS == 1 ? 0 : j;
            const float mean = fma(gradient.centred[j], means.slope[own], means.g[own]);
            Packed<T>::set(dx, j, channels[own].scale * (gradient.g[j] - mean));
            Packed<T>::set(dresidual, j, gradient.g[j]);
        }
        const long long at = thread_rows.at_output(row, a.channels, c);
        bnk_store_vector(a.dx + at, dx);
        if (a.dresidual) bnk_store_vector(a.dresidual + at, dresidual);
    }
}

template <typename T, bool CHANNELS_LAST>
__device__ __forceinline__ void batch_norm_backward_cooperative(const BatchNormBackwardCooperative<T>& a) {
    BNK_DYNAMIC_SHARED(float, shared);
    constexpr int THREAD_CHANNELS = ThreadRows<T, CHANNELS_LAST>::THREAD_CHANNELS;
    const ThreadRows<T, CHANNELS_LAST> thread_rows(a.outer, a.inner);
    const int width = blockDim.x * THREAD_CHANNELS;
    const SliceReduction<PartialSums> reduction(shared, thread_rows.counts(), width);
    float* const rows = shared + PartialSums::QUANTITIES * reduction.plane;
    const ThreadVectors held_x(rows),
        held_dy(rows + a.held * blockDim.x * blockDim.y * (sizeof(Vector) / sizeof(float)));
    bool odd = false;
    for (long long slice = blockIdx.x; slice * width < a.channels; slice += gridDim.x) {
        const long long c = slice * width + threadIdx.x * THREAD_CHANNELS;
        const bool active = c < a.channels;  // no early return: every thread must reach the barriers
        Affine<float> channels[THREAD_CHANNELS];
        if (active) {
            load_channels(channels, a, c);
            read_rows(a, thread_rows, c, channels, held_x, held_dy, reduction.slot(THREAD_CHANNELS), reduction.plane);
        }
        reduction.merge(a.partial, a.barrier_counter, odd);
        if (active) {
            const Means<THREAD_CHANNELS> means(a, c, shared + threadIdx.x * THREAD_CHANNELS, reduction.plane);
            load_channels(channels, a, c);
            write_rows(a, thread_rows, c, channels, held_x, held_dy, means);
        }
        __syncthreads();  // all threads have read the merged sums
        odd = !odd;
    }
}

#define BATCH_NORM_BACKWARD_COOPERATIVE(variant, suffix, T, threads, channels)                              \
    BNK_KERNEL(bnk_batch_norm_backward_##variant##_##suffix, (BatchNormBackwardCooperative<T>), threads, 2, \
               (batch_norm_backward_cooperative<T, channels>))

// With eight channels a thread, two blocks of 256 threads would not have enough registers.
BATCH_NORM_BACKWARD_COOPERATIVE(cooperative, f32, float, 256, true)
BATCH_NORM_BACKWARD_COOPERATIVE(cooperative_inner, f32, float, 256, false)
BATCH_NORM_BACKWARD_COOPERATIVE(cooperative, f16, Float16, 192, true)
BATCH_NORM_BACKWARD_COOPERATIVE(cooperative_inner, f16, Float16, 256, false)
BATCH_NORM_BACKWARD_COOPERATIVE(cooperative, bf16, BFloat16, 192, true)
BATCH_NORM_BACKWARD_COOPERATIVE(cooperative_inner, bf16, BFloat16, 256, false)
