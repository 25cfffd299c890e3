// Gradients of batch normalisation in training of a tensor that lies in rows of 16 bytes: every SM takes part.
//
// Formulas:  those of batch_norm_backward.cu, for batch statistics.
// Arrays:    dy, x, residual (outer, C, inner), dx and dresidual in C order, of type T: float or 16 bits, all with strides
//            and addresses as in batch_norm_forward_spread.cu; the others as in batch_norm_backward.cu, of float.
//            partial: 2 groups G 2 w floats; arrivals: a counter for every group.
// Launch:    as batch_norm_forward_spread.cu; shared memory 8 w lanes bytes and 32 threads held: x and dy.
// Traffic:   2 N C reads and N C writes of T as long as all rows are held; the others are read twice, the second time from
//            the last on. A residual is read twice, its gradient written once. Between blocks 16 G bytes a channel.
// Numerics:  as batch_norm_backward.cu: both sums in pairs. Deterministic: a thread's rows, then lanes in eights, then
//            blocks in eights, always in their order.
// Reference: Ioffe and Szegedy, Batch Normalization, 2015, arXiv:1502.03167, section 3.
// Called by: bnkernels/ops/batch_norm/training.py
#include "activation.cuh"
#include "common.cuh"
#include "moments.cuh"
#include "spread.cuh"

constexpr int CHUNK = 2;  // rows that a thread has in flight, each of x and of dy

template <typename T>
struct BatchNormBackwardSpread {
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
    unsigned* arrivals;
    long long outer, channels, inner;
    long long dy_outer, dy_channel;  // strides, in elements
    long long x_outer, x_channel;
    long long residual_outer, residual_channel;
    long long held;  // rows of a thread that stay in shared memory
    float alpha;
    int activation;
};

// Sums over rows, of g and of g (x - mean).
struct PartialSums {
    static constexpr int QUANTITIES = 2;

    static __device__ __forceinline__ void merge(float* to, long long to_plane, const float* slots, long long plane,
                                                 long long pitch, const Shares&, int first, int last, int step) {
        Pair<float> g = {0.0f, 0.0f}, g_centred = {0.0f, 0.0f};
        for (int lane = first; lane < last; lane += step, slots += pitch) {
            g = add(g, slots[0]);
            g_centred = add(g_centred, slots[plane]);
        }
        to[0] = value(g);
        to[to_plane] = value(g_centred);
    }
};

// What a thread knows of its channels.
template <int OWN>
struct Channels {
    Pair<float> mean[OWN];
    float scale[OWN], beta[OWN];  // scale = gamma rstd

    template <typename Arguments>
    __device__ __forceinline__ Channels(const Arguments& a, long long c) {
#pragma unroll
        for (int i = 0; i < OWN; ++i) {
            mean[i] = {a.mean[c + i], a.mean_low[c + i]};
            scale[i] = a.gamma ? a.gamma[c + i] * a.rstd[c + i] : a.rstd[c + i];
            beta[i] = a.beta ? a.beta[c + i] : 0.0f;
        }
    }
};

// A row of the inputs.
struct Inputs {
    Vector x, dy, residual;
};

// x - mean and g of a row.
template <typename T>
struct RowGradient {
    static constexpr int COUNT = Packed<T>::COUNT;
    float centred[COUNT], g[COUNT];

    template <int OWN>
    __device__ __forceinline__ RowGradient(const BatchNormBackwardSpread<T>& a, const Channels<OWN>& channels,
                                           const Inputs& row) {
        float z[COUNT];
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const int c = OWN == 1 ? 0 : i;
            centred[i] = subtract(Packed<T>::get(row.x, i), channels.mean[c]);
            g[i] = Packed<T>::get(row.dy, i);
            // The same, bit for bit, as the forward's.
            z[i] = fma(channels.scale[c], centred[i], channels.beta[c]);
            if (a.residual) z[i] += Packed<T>::get(row.residual, i);
        }
        pull_back_all(g, z, a.activation, a.alpha);
    }
};

template <typename T, bool CHANNELS>
__device__ __forceinline__ Vector load_residual(const BatchNormBackwardSpread<T>& a, const Place<T, CHANNELS>& place,
                                                const Rows<CHANNELS>& row, long long c) {
    if (!a.residual) return {};
    return bnk_load_vector(a.residual + place.at(row, a.residual_outer, a.residual_channel, c));
}

template <typename T, bool CHANNELS>
__device__ __forceinline__ Inputs load_inputs(const BatchNormBackwardSpread<T>& a, const Place<T, CHANNELS>& place,
                                              const Rows<CHANNELS>& row, long long c) {
    return {bnk_load_vector(a.x + place.at(row, a.x_outer, a.x_channel, c)),
            bnk_load_vector(a.dy + place.at(row, a.dy_outer, a.dy_channel, c)), load_residual(a, place, row, c)};
}

// The sums of a thread's rows over its channels, c the first of them, go to its slot; keeps the first rows.
template <typename T, bool CHANNELS, int OWN>
__device__ __forceinline__ void read_rows(const BatchNormBackwardSpread<T>& a, const Place<T, CHANNELS>& place,
                                          long long c, const Channels<OWN>& channels, const Held& held_x,
                                          const Held& held_dy, float* slot, int plane) {
    Pair<float> g[OWN], g_centred[OWN];
#pragma unroll
    for (int i = 0; i < OWN; ++i) g[i] = g_centred[i] = {0.0f, 0.0f};
    Rows<CHANNELS> row = place.from(0);
    for (long long first = 0; row.inside(); first += CHUNK) {
        Inputs chunk[CHUNK];
        int count = 0;
#pragma unroll
        for (int i = 0; i < CHUNK; ++i)
            if (row.inside()) {
                chunk[i] = load_inputs(a, place, row, c);
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
                const int own = OWN == 1 ? 0 : j;
                g[own] = add(g[own], gradient.g[j]);
                g_centred[own] = add(g_centred[own], gradient.g[j] * gradient.centred[j]);
            }
            rotate(chunk);
        }
    }
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
        slot[i] = value(g[i]);
        slot[plane + i] = value(g_centred[i]);
    }
}

// dx = scale (g - mean_g - (x - mean) slope); the first lane of the first block writes the parameters' gradients.
template <int OWN>
struct Means {
    float g[OWN], slope[OWN];

    template <typename Arguments>
    __device__ __forceinline__ Means(const Arguments& a, long long c, const float* sums, int plane) {
        const float n = float(a.outer * a.inner);
#pragma unroll
        for (int i = 0; i < OWN; ++i) {
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

// The last rows first: those that are read again were read last.
template <typename T, bool CHANNELS, int OWN>
__device__ __forceinline__ void write_rows(const BatchNormBackwardSpread<T>& a, const Place<T, CHANNELS>& place,
                                           long long c, const Channels<OWN>& channels, const Held& held_x,
                                           const Held& held_dy, const Means<OWN>& means) {
    for (long long i = place.rows() - 1; i >= 0; --i) {
        const Rows<CHANNELS> row = place.from(i);
        const Inputs inputs =
            i < a.held ? Inputs{held_x[i], held_dy[i], load_residual(a, place, row, c)} : load_inputs(a, place, row, c);
        const RowGradient<T> gradient(a, channels, inputs);
        Vector dx, dresidual;
#pragma unroll
        for (int j = 0; j < RowGradient<T>::COUNT; ++j) {
            const int own = OWN == 1 ? 0 : j;
            const float mean = fma(gradient.centred[j], means.slope[own], means.g[own]);
            Packed<T>::set(dx, j, channels.scale[own] * (gradient.g[j] - mean));
            Packed<T>::set(dresidual, j, gradient.g[j]);
        }
        const long long at = place.at_output(row, a.channels, c);
        bnk_store_vector(a.dx + at, dx);
        if (a.dresidual) bnk_store_vector(a.dresidual + at, dresidual);
    }
}

template <typename T, bool CHANNELS>
__device__ __forceinline__ void batch_norm_backward_spread(const BatchNormBackwardSpread<T>& a) {
    BNK_DYNAMIC_SHARED(float, shared);
    constexpr int OWN = Place<T, CHANNELS>::OWN;
    const Place<T, CHANNELS> place(a.outer, a.inner);
    const int width = blockDim.x * OWN;
    const Meeting<PartialSums> meeting(shared, place.shares(), width);
    float* const rows = shared + PartialSums::QUANTITIES * meeting.plane;
    const Held held_x(rows), held_dy(rows + a.held * blockDim.x * blockDim.y * (sizeof(Vector) / sizeof(float)));
    bool odd = false;
    for (long long slice = blockIdx.x; slice * width < a.channels; slice += gridDim.x) {
        const long long c = slice * width + threadIdx.x * OWN;
        const bool active = c < a.channels;  // no early return: every thread must reach the barriers
        if (active) read_rows(a, place, c, Channels<OWN>(a, c), held_x, held_dy, meeting.slot(OWN), meeting.plane);
        meeting.merge(a.partial, a.arrivals, odd);
        if (active) {
            const Means<OWN> means(a, c, shared + threadIdx.x * OWN, meeting.plane);
            write_rows(a, place, c, Channels<OWN>(a, c), held_x, held_dy, means);
        }
        __syncthreads();  // all have seen the merged sums
        odd = !odd;
    }
}

#define BATCH_NORM_BACKWARD_SPREAD(variant, suffix, T, threads, channels)                                             \
    using arguments_backward_##variant##_##suffix = BatchNormBackwardSpread<T>;                                       \
    BNK_KERNEL_PAIRED(bnk_batch_norm_backward_##variant##_##suffix, arguments_backward_##variant##_##suffix, threads, \
                      (batch_norm_backward_spread<T, channels>))

// Eight channels a thread need more registers than 256 threads of two blocks have.
BATCH_NORM_BACKWARD_SPREAD(spread, f32, float, 256, true)
BATCH_NORM_BACKWARD_SPREAD(spread_inner, f32, float, 256, false)
BATCH_NORM_BACKWARD_SPREAD(spread, f16, Float16, 192, true)
BATCH_NORM_BACKWARD_SPREAD(spread_inner, f16, Float16, 256, false)
BATCH_NORM_BACKWARD_SPREAD(spread, bf16, BFloat16, 192, true)
BATCH_NORM_BACKWARD_SPREAD(spread_inner, bf16, BFloat16, 256, false)
