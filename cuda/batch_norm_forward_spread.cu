// Batch normalisation in training of a tensor that lies in rows of 16 bytes, then an activation: every SM takes part.
//
// Formulas:  those of batch_norm_forward.cu.
// Arrays:    x, residual (outer, C, inner), y in C order, of type T: float or 16 bits. CHANNELS: inner = 1, C, the outer
//            strides and all addresses multiples of 16 bytes, neighbouring channels side by side. Else inner and the
//            strides are such multiples, neighbouring inner positions side by side. The others as in
//            batch_norm_forward.cu, of float. partial: 2 groups G 3 w floats; arrivals: a counter for every group.
// Launch:    block (w / COUNT, lanes, 1) where CHANNELS, else (1, lanes, 1) and w = 1; COUNT numbers have 16 bytes, lanes is
//            a multiple of 4. Grid (groups, G, 1), see spread.cuh; cooperative if G > 1, a power of two, at most 8 lanes.
//            Every lane has a row. A block keeps `held` rows a thread in shared memory: 12 w lanes bytes and
//            16 threads held. Neighbouring threads move neighbouring 16 bytes.
// Traffic:   N C reads and N C writes of T as long as all rows are held; the others are read twice, the second time from
//            the last on, whose bytes are the likeliest in the L2 cache. N C reads more of a residual. Between blocks 24 G
//            bytes a channel.
// Numerics:  as batch_norm_forward.cu: chunks of a thread's rows in pairs, merged after Chan, Golub and LeVeque.
//            Deterministic: chunks, then lanes in eights, then blocks in eights, always in their order.
// Reference: Ioffe and Szegedy, Batch Normalization, 2015, arXiv:1502.03167, algorithm 1.
// Called by: bnkernels/ops/batch_norm/training.py
#include "activation.cuh"
#include "common.cuh"
#include "moments.cuh"
#include "spread.cuh"

constexpr int CHUNK = 4;  // rows that a thread has in flight

template <typename T>
struct BatchNormForwardSpread {
    const T* x;
    const T* residual;
    const float* gamma;
    const float* beta;
    T* y;
    float* statistics;
    float* running_mean;
    float* running_var;
    float* partial;
    unsigned* arrivals;
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
                                                 long long pitch, const Shares& shares, int first, int last, int step) {
        store(to, to_plane, merge_lanes(slots, plane, pitch, shares, first, last, step));
    }
};

// What the second pass knows of a thread's channels.
template <int OWN>
struct Normalisation {
    Pair<float> mean[OWN];
    float scale[OWN], beta[OWN];  // scale = gamma rstd
};

// Adds the moments of a chunk's first `count` rows to those of the rows before.
template <typename T, bool CHANNELS, int OWN>
__device__ __forceinline__ void add_chunk(Moments<float> (&own)[OWN], const Vector (&chunk)[CHUNK], int count,
                                          bool first) {
    constexpr int COUNT = Packed<T>::COUNT, VALUES = CHANNELS ? CHUNK : CHUNK * COUNT;
#pragma unroll
    for (int c = 0; c < OWN; ++c) {
        float values[VALUES];
#pragma unroll
        for (int i = 0; i < VALUES; ++i)
            values[i] = CHANNELS ? Packed<T>::get(chunk[i], c) : Packed<T>::get(chunk[i / COUNT], i % COUNT);
        Moments<float> moments = moments_of(values, CHANNELS ? count : count * COUNT);
        if (!first) moments = merge(own[c], moments);
        own[c] = {moments.count, moments.mean, {value(moments.m2), 0.0f}};  // one number: registers are scarce
    }
}

// The moments of a thread's rows of its channels, c the first of them; keeps the first rows.
template <typename T, bool CHANNELS, int OWN>
__device__ __forceinline__ void read_rows(const BatchNormForwardSpread<T>& a, const Place<T, CHANNELS>& place,
                                          long long c, const Held& held, Moments<float> (&own)[OWN]) {
    Rows<CHANNELS> row = place.from(0);
    for (long long first = 0; row.inside(); first += CHUNK) {
        Vector chunk[CHUNK];
        int count = 0;
#pragma unroll
        for (int i = 0; i < CHUNK; ++i)
            if (row.inside()) {
                chunk[i] = bnk_load_vector(a.x + place.at(row, a.x_outer, a.x_channel, c));
                row.advance();
                ++count;
            }
#pragma unroll
        for (int i = 0; i < CHUNK; ++i)
            if (i < count && first + i < a.held) held[first + i] = chunk[i];
        add_chunk<T, CHANNELS>(own, chunk, count, first == 0);
    }
}

// The merged moments of channel `own` of a thread.
struct Merged {
    Pair<float> mean;
    float m2, rstd;

    template <typename T>
    __device__ __forceinline__ Merged(const BatchNormForwardSpread<T>& a, const Meeting<PartialMoments>& meeting,
                                      int channel) {
        const float* slot = meeting.shared + channel;
        mean = {slot[0], slot[meeting.plane]};
        m2 = slot[2 * meeting.plane];
        rstd = 1.0f / sqrt(m2 / float(a.outer * a.inner) + a.eps);
    }
};

// What the first lane of the first block writes, of its channels from c on.
template <typename T, int OWN>
__device__ __forceinline__ void write_statistics(const BatchNormForwardSpread<T>& a, long long c,
                                                 const Meeting<PartialMoments>& meeting) {
#pragma unroll 1
    for (int i = 0; i < OWN; ++i, ++c) {
        const Merged merged(a, meeting, threadIdx.x * OWN + i);
        a.statistics[c] = merged.mean.high;
        a.statistics[a.channels + c] = merged.mean.low;
        a.statistics[2 * a.channels + c] = merged.rstd;
        const float keep = 1.0f - a.momentum, var = merged.m2 / a.divisor;
        if (a.running_mean) a.running_mean[c] = fma(a.momentum, merged.mean.high, keep * a.running_mean[c]);
        if (a.running_var) a.running_var[c] = fma(a.momentum, var, keep * a.running_var[c]);
    }
}

template <typename T, int OWN>
__device__ __forceinline__ Normalisation<OWN> normalisation_of(const BatchNormForwardSpread<T>& a, long long c,
                                                               const Meeting<PartialMoments>& meeting) {
    Normalisation<OWN> n;
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
        const Merged merged(a, meeting, threadIdx.x * OWN + i);
        n.mean[i] = merged.mean;
        n.scale[i] = a.gamma ? a.gamma[c + i] * merged.rstd : merged.rstd;
        n.beta[i] = a.beta ? a.beta[c + i] : 0.0f;
    }
    return n;
}

template <typename T, int OWN>
__device__ __forceinline__ Vector normalise(const BatchNormForwardSpread<T>& a, const Normalisation<OWN>& n,
                                            const Vector& x, const Vector& residual) {
    constexpr int COUNT = Packed<T>::COUNT;
    float z[COUNT];
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        const int c = OWN == 1 ? 0 : i;
        z[i] = fma(n.scale[c], subtract(Packed<T>::get(x, i), n.mean[c]), n.beta[c]);
        if (a.residual) z[i] += Packed<T>::get(residual, i);
    }
    activate_all(z, a.activation, a.alpha);
    Vector y;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) Packed<T>::set(y, i, z[i]);
    return y;
}

// The last rows first: those that are read again were read last.
template <typename T, bool CHANNELS, int OWN>
__device__ __forceinline__ void write_rows(const BatchNormForwardSpread<T>& a, const Place<T, CHANNELS>& place,
                                           long long c, const Held& held, const Normalisation<OWN>& n) {
    constexpr int AHEAD = OWN > 4 ? 1 : 2;  // rows in flight; registers are scarce
    for (long long last = place.rows(); last > 0; last -= AHEAD) {
        const long long first = max(last - AHEAD, 0ll);
        const Rows<CHANNELS> start = place.from(first);
        Vector x[AHEAD], residual[AHEAD];
        Rows<CHANNELS> row = start;
#pragma unroll
        for (int i = 0; i < AHEAD; ++i)
            if (first + i < last) {
                x[i] = first + i < a.held ? held[first + i]
                                          : bnk_load_vector(a.x + place.at(row, a.x_outer, a.x_channel, c));
                if (a.residual)
                    residual[i] = bnk_load_vector(a.residual + place.at(row, a.residual_outer, a.residual_channel, c));
                row.advance();
            }
        row = start;
#pragma unroll
        for (int i = 0; i < AHEAD; ++i)
            if (first + i < last) {
                bnk_store_vector(a.y + place.at_output(row, a.channels, c), normalise(a, n, x[i], residual[i]));
                row.advance();
            }
    }
}

template <typename T, bool CHANNELS>
__device__ __forceinline__ void batch_norm_forward_spread(const BatchNormForwardSpread<T>& a) {
    BNK_DYNAMIC_SHARED(float, shared);
    constexpr int OWN = Place<T, CHANNELS>::OWN;
    const Place<T, CHANNELS> place(a.outer, a.inner);
    const int width = blockDim.x * OWN;
    const Meeting<PartialMoments> meeting(shared, place.shares(), width);
    const Held held(shared + PartialMoments::QUANTITIES * meeting.plane);
    bool odd = false;
    for (long long slice = blockIdx.x; slice * width < a.channels; slice += gridDim.x) {
        const long long c = slice * width + threadIdx.x * OWN;
        const bool active = c < a.channels;  // no early return: every thread must reach the barriers
        if (active) {
            Moments<float> own[OWN];
            read_rows(a, place, c, held, own);
#pragma unroll
            for (int i = 0; i < OWN; ++i) PartialMoments::store(meeting.slot(OWN) + i, meeting.plane, own[i]);
        }
        meeting.merge(a.partial, a.arrivals, odd);
        if (active) {
            if (threadIdx.y == 0 && blockIdx.y == 0) write_statistics<T, OWN>(a, c, meeting);
            write_rows(a, place, c, held, normalisation_of<T, OWN>(a, c, meeting));
        }
        __syncthreads();  // all have seen the merged moments
        odd = !odd;
    }
}

#define BATCH_NORM_FORWARD_SPREAD(variant, suffix, T, channels)                                                 \
    using arguments_forward_##variant##_##suffix = BatchNormForwardSpread<T>;                                   \
    BNK_KERNEL_PAIRED(bnk_batch_norm_forward_##variant##_##suffix, arguments_forward_##variant##_##suffix, 256, \
                      (batch_norm_forward_spread<T, channels>))

BATCH_NORM_FORWARD_SPREAD(spread, f32, float, true)
BATCH_NORM_FORWARD_SPREAD(spread_inner, f32, float, false)
BATCH_NORM_FORWARD_SPREAD(spread, f16, Float16, true)
BATCH_NORM_FORWARD_SPREAD(spread_inner, f16, Float16, false)
BATCH_NORM_FORWARD_SPREAD(spread, bf16, BFloat16, true)
BATCH_NORM_FORWARD_SPREAD(spread_inner, bf16, BFloat16, false)
