// Batch normalisation over all axes but the channel axis, then an activation: training and inference.
//
// Formulas:  For every group, over the N rows of a channel whose mask is true, see lib/reduce/rows.cuh:
//            mean[c] = 1/N sum_n x[n,c]
//            var[c]  = 1/N sum_n (x[n,c] - mean[c])^2    biased
//            rstd[c] = 1 / sqrt(var[c] + eps)
//            y[n,c]  = phi(gamma[c] ((x[n,c] - mean[c]) rstd[c] r[c] + d[c]) + beta[c] + residual[n,c])
//            y[n,c]  = 0 where the mask is false
//            r, d = 1, 0; renormalised, with s = sqrt(running_var + eps) before this mini-batch:
//            r = clip(sqrt(var + eps) / s, 1/r_max, r_max),  d = clip((mean - running_mean) / s, -d_max, d_max)
//            running_mean[c] = (1 - momentum) running_mean[c] + momentum mean[c]
//            running_var[c]  = (1 - momentum) running_var[c] + momentum var[c] N/divisor     divisor: N - correction
//            Inference uses the running statistics as mean and var, and does not change them.
//            No valid row: y = 0, statistics 0, running statistics unchanged. One valid row: y = phi(beta); running_var
//            is unchanged if the divisor would be 0.
// Arrays:    x (groups, outer, C, inner), any strides; residual like x; y in C order, may alias x or residual; all of
//            type T: float, double, or 16 bits (lib/numbers/half.cuh). A is float for 16-bit T, else T. mask (groups,
//            outer, inner) of bytes, any strides. gamma, beta (C,), of type A or, with params_in_storage_type, T.
//            running_mean, running_var (groups, C). residual, mask, gamma, beta and the running statistics may be null
//            (0, all true, 1, 0, not tracked); `given` has a bit for each that is not. statistics (groups, 3, C): the
//            rows mean, mean_low, rstd; renormalised (groups, 5, C): r, d as well. mean + mean_low is the mean to about
//            twice the precision of A: rounding it to one A would cause an error in y of that rounding times rstd.
//            Written, or read in the stage APPLY. moments (4, C): count, mean, mean_low, and the sum of squared
//            distances from the mean, written in the stage COLLECT. All of type A. Without a mask rows = N,
//            inverse_rows = 1/N, inverse_divisor = 1/divisor.
// Launch:    Block (w, l, 1) = (width, workers, 1), grid (ceil(C/w), min(groups, 65535), 1), shared memory
//            4 w (l + 1) sizeof(A). Thread (i, j) owns the channel c = w blockIdx.x + i and its rows j, j + l, j + 2l,
//            ...: neighbouring threads read neighbouring channels, or for w = 1 neighbouring rows. Every thread has a
//            row: N >= l. No block waits for another. registers4, 8, 16: a thread's rows, at most that many, stay in
//            registers; registers4 requires inner = 1 and tensors that reach less than 2^31 elements. two_pass: chunks
//            of 16 or 8 rows, read twice. The kernels named options know masks, groups, renormalisation, stages, and
//            parameters of type T (lib/reduce/options.cuh), with 8 rows, or 4 of double; the others have one group.
//            full: every thread has a channel, and as many rows as it has registers for. activation, width, workers,
//            full, what is given, options, and alpha where it is 0 or 1 are constants of the launch. 64 x 20: one block
//            (20, 16, 1), 4 values a thread, one barrier; with more than 64 workers two barriers, and one after each of
//            several groups. Inference, which does the stages FROZEN and APPLY: blocks of the same layout, grid
//            (ceil(C/w), min(groups, 65535), tiles of rows), no shared memory, no barrier.
// Traffic:   registers and inference: N C reads and N C writes of T; two_pass: 2 N C reads and N C writes. A residual
//            is read as often as y is written. Parameters and statistics: a few times C. The mask as often as x, a byte
//            a row; data of rows that it excludes are not read. All loads come before the first sum.
// Numerics:  In A. Distances from a thread's first value in plain sums, of at most 16 terms; then the squares about
//            their mean; the parts of the workers merge in plain sums too, about one of these values, and longer sums
//            in pairs (lib/reduce/parts.cuh). E[x^2] - E[x]^2 is not used. A constant channel gives exactly phi(beta).
//            A variance beyond the range of A counts as infinite: y = phi(beta). Sums that overflow although no value
//            does are formed anew, scaled. NaN and infinity stay in their channel. Deterministic: workers merge in
//            ascending order, more than 64 of them first 32 at a time.
// Reference: Ioffe and Szegedy, Batch Normalization, 2015, arXiv:1502.03167, algorithms 1 and 2; Ioffe, Batch
//            Renormalization, 2017, arXiv:1702.03275.
// Called by: bnkernels/ops/batch_norm/training.py
#include "lib/kernel.cuh"
#include "lib/numbers/activation.cuh"
#include "lib/numbers/half.cuh"
#include "lib/numbers/pair.cuh"
#include "lib/numbers/rsqrt.cuh"
#include "lib/reduce/normalisation.cuh"
#include "lib/reduce/options.cuh"
#include "lib/reduce/parts.cuh"
#include "lib/reduce/rows.cuh"

template <typename T, typename A>
struct BatchNormForward {
    const T* x;
    const T* residual;
    const char* mask;
    const void* gamma;
    const void* beta;
    T* y;
    A* statistics;
    A* moments;
    A* running_mean;
    A* running_var;
    long long groups, outer, channels, inner;
    long long x_group, x_outer, x_channel, x_inner;  // strides, in elements
    long long residual_group, residual_outer, residual_channel, residual_inner;
    long long mask_group, mask_outer, mask_inner;
    A rows, inverse_rows, inverse_divisor, correction, momentum, eps, alpha, r_max, d_max;
    int activation, given, width, workers, full, stage, statistic_rows, params_in_storage_type;
};

// The argument of one group.
template <typename T, typename A>
__device__ __forceinline__ BatchNormForward<T, A> of_group(BatchNormForward<T, A> a, long long group) {
    if (a.groups == 1) return a;
    move(a.x, group * a.x_group);
    move(a.residual, group * a.residual_group);
    move(a.mask, group * a.mask_group);
    move(a.y, group * a.outer * a.channels * a.inner);
    move(a.statistics, group * a.statistic_rows * a.channels);
    move(a.running_mean, group * a.channels);
    move(a.running_var, group * a.channels);
    return a;
}

// The running statistics before this mini-batch.
template <typename A>
struct Running {
    A mean, var;
};

// Only worker 0 updates them; all renormalise with them.
template <typename T, typename A, typename Index>
__device__ __forceinline__ Running<A> load_running(const BatchNormForward<T, A>& a, Index c) {
    Running<A> running = {A(0), A(0)};
    const bool used = threadIdx.y == 0 || a.statistic_rows == RENORMALISED;
    if ((a.given & RUNNING_MEAN) && used) running.mean = a.running_mean[c];
    if ((a.given & RUNNING_VAR) && used) running.var = a.running_var[c];
    return running;
}

// Values of a thread's next rows and those of the residual.
template <typename A, int VALUES>
struct Chunk : ChunkRows {
    A x[VALUES], residual[VALUES];

    // RESIDUAL_TOO: else only x, for the sums.
    template <bool RESIDUAL_TOO, typename T, bool MATRIX, typename Index>
    __device__ __forceinline__ void load(const BatchNormForward<T, A>& a, Index c, Rows<MATRIX, Index>& rows) {
        const T* const of_x = a.x + c * (Index)a.x_channel;
        const T* const of_residual = a.residual + c * (Index)a.residual_channel;
        masked = a.given & MASK;
        if (masked) take_valid<VALUES>(a.mask, (Index)a.mask_outer, (Index)a.mask_inner, rows);
        count = 0;
#pragma unroll
        for (int i = 0; i < VALUES; ++i)
            if (a.full || rows.inside()) {
                if (!masked || has(i)) {
                    x[i] = A(of_x[rows.at(a.x_outer, a.x_inner)]);
                    if (RESIDUAL_TOO && (a.given & RESIDUAL))
                        residual[i] = A(of_residual[rows.at(a.residual_outer, a.residual_inner)]);
                }
                ++count;
                rows.advance();
            }
    }
};

template <typename A>
__device__ __forceinline__ A clip(A value, A low, A high) {  // NaN stays
    return value < low ? low : value > high ? high : value;
}

// Concludes the map of a channel from its moments.
template <typename T, typename A>
__device__ __forceinline__ void normalise_with(const BatchNormForward<T, A>& a, const Part<A>& all,
                                               const Running<A>& running, Channel<A>& channel) {
    const bool masked = a.given & MASK, empty = masked && all.count == A(0);
    const A inverse_rows = masked ? A(1) / max(all.count, A(1)) : a.inverse_rows;
    channel.mean = {all.high, all.low};
    channel.rstd = empty ? A(0) : reciprocal_sqrt(fma(all.m2, inverse_rows, a.eps));
    if (a.statistic_rows == RENORMALISED && !empty) {
        const A of_running = reciprocal_sqrt(running.var + a.eps);
        channel.r = clip(of_running / channel.rstd, A(1) / a.r_max, a.r_max);
        channel.d = clip(((all.high - running.mean) + all.low) * of_running, -a.d_max, a.d_max);
    }
    channel.conclude(a);
}

template <typename T, typename A, typename Index>
__device__ __forceinline__ void write_statistics(const BatchNormForward<T, A>& a, Index c, const Part<A>& all,
                                                 const Channel<A>& channel, const Running<A>& running) {
    const Index channels = (Index)a.channels;
    a.statistics[c] = all.high;
    a.statistics[channels + c] = all.low;
    a.statistics[2 * channels + c] = channel.rstd;
    if (a.statistic_rows == RENORMALISED) {
        a.statistics[3 * channels + c] = channel.r;
        a.statistics[4 * channels + c] = channel.d;
    }
    const bool masked = a.given & MASK;
    const A divisor = all.count - a.correction, keep = A(1) - a.momentum;
    const A var = all.m2 * (masked ? A(1) / divisor : a.inverse_divisor);
    if ((a.given & RUNNING_MEAN) && (!masked || all.count > A(0)))
        a.running_mean[c] = fma(a.momentum, all.high, keep * running.mean);
    if ((a.given & RUNNING_VAR) && (!masked || divisor > A(0)))
        a.running_var[c] = fma(a.momentum, var, keep * running.var);
}

template <typename T, typename A, typename Index>
__device__ __forceinline__ void write_moments(const BatchNormForward<T, A>& a, Index c, const Part<A>& all) {
    const Index channels = (Index)a.channels;
    a.moments[c] = a.given & MASK ? all.count : a.rows;
    a.moments[channels + c] = all.high;
    a.moments[2 * channels + c] = all.low;
    a.moments[3 * channels + c] = all.m2;
}

// Normalises, activates and writes the rows of a chunk, the next ones; overwrites its values.
template <int VALUES, typename T, bool MATRIX, typename Index, typename A>
__device__ __forceinline__ void write_rows(const BatchNormForward<T, A>& a, Index c, Rows<MATRIX, Index>& rows,
                                           Chunk<A, VALUES>& chunk, const Channel<A>& channel) {
#pragma unroll
    for (int i = 0; i < VALUES; ++i) {
        chunk.x[i] = channel(chunk.x[i]);
        if (a.given & RESIDUAL) chunk.x[i] += chunk.residual[i];
    }
    if (a.activation == LINEAR) {
#pragma unroll
        for (int i = 0; i < VALUES; ++i)
            if (i < chunk.count) {
                const A y = linear(chunk.x[i], chunk.x[i], a.alpha);
                store(a.y[rows.at_output(a.channels, c)], chunk.has(i) ? y : A(0));
                rows.advance();
            }
        return;
    }
#pragma unroll 1
    for (int i = 0; i < chunk.count; ++i) {
        store(a.y[rows.at_output(a.channels, c)], chunk.has(i) ? curved(chunk.x[0], a.activation, a.alpha) : A(0));
        rotate(chunk.x);
        rows.advance();
    }
}

// One group: VALUES rows of a thread are in registers. If not HELD, the second pass reads all rows again.
template <int VALUES, bool HELD, bool MATRIX, typename T, typename A>
__device__ __forceinline__ void normalise_group(const BatchNormForward<T, A>& a, Part<A>* parts) {
    using Index = typename IndexOf<MATRIX>::Type;
    const Index c = (Index)blockIdx.x * a.width + threadIdx.x;
    const bool active = a.full || c < (Index)a.channels;  // no early return: every thread must reach the barriers
    Rows<MATRIX, Index> rows(a.outer, a.inner, threadIdx.y, a.workers);
    Channel<A> channel = {};
    Running<A> running = {};
    Chunk<A, VALUES> chunk;

    if (active) {
        channel.template load_parameters<T>(a, c);
        running = load_running(a, c);
        Rows<MATRIX, Index> ahead = rows;
        chunk.template load<HELD>(a, c, ahead);
        Part<A> own = part_of(chunk.x, chunk);
        if (!HELD) {
            PartSum<A> sum(own);
            while (ahead.inside()) {
                chunk.template load<HELD>(a, c, ahead);
                sum.add_part(part_of(chunk.x, chunk));
            }
            own = sum.part();
        }
        parts[place_of(threadIdx.y, a.workers)] = own;
    }
    const Part<A> all =
        merge_workers<TOGETHER<VALUES>>(parts, a.workers, active, a.rows, a.inverse_rows, a.given & MASK);
    if (!active) return;

    if (a.stage == COLLECT) {
        if (threadIdx.y == 0) write_moments(a, c, all);
        return;
    }
    normalise_with(a, all, running, channel);
    if (threadIdx.y == 0) write_statistics(a, c, all, channel, running);
    do {
        if (!HELD) {
            Rows<MATRIX, Index> ahead = rows;
            chunk.template load<true>(a, c, ahead);
        }
        write_rows(a, c, rows, chunk, channel);
    } while (!HELD && rows.inside());
}

template <typename T, typename A, int VALUES, bool HELD, bool MATRIX, bool OPTIONS>
__device__ __forceinline__ void batch_norm_forward(const BatchNormForward<T, A>& arguments) {
    const BatchNormForward<T, A> a = specialised<OPTIONS>(arguments, WHOLE);
    BNK_DYNAMIC_SHARED(Part<A>, parts);
#pragma unroll 1
    for (long long group = first_group(a); group < a.groups; group = next_group(a, group)) {
        normalise_group<VALUES, HELD, MATRIX>(of_group(a, group), parts);
        end_group(a);
    }
}

template <typename T, typename A, bool OPTIONS>
__device__ __forceinline__ void batch_norm_inference(const BatchNormForward<T, A>& arguments) {
    const BatchNormForward<T, A> all = specialised<OPTIONS>(arguments, FROZEN);
    const long long c = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= all.channels) return;
#pragma unroll 1
    for (long long group = first_group(all); group < all.groups; group = next_group(all, group)) {
        const BatchNormForward<T, A> a = of_group(all, group);
        Channel<A> channel;
        channel.template load_parameters<T>(a, c);
        channel.load_statistics(a, c);
        channel.conclude(a);
        Rows<false> rows(a.outer, a.inner, blockIdx.z * blockDim.y + threadIdx.y, gridDim.z * blockDim.y);
        while (rows.inside()) {
            Rows<false> ahead = rows;
            Chunk<A, 4> chunk;
            chunk.template load<true>(a, c, ahead);
            write_rows(a, c, rows, chunk, channel);
        }
    }
}

#define BATCH_NORM_FORWARD(variant, suffix, T, A, min_blocks, values, held, matrix, options)           \
    BNK_KERNEL(bnk_batch_norm_forward_##variant##_##suffix, (BatchNormForward<T, A>), 512, min_blocks, \
               (batch_norm_forward<T, A, values, held, matrix, options>))
#define BATCH_NORM_INFERENCE(variant, suffix, T, A, min_blocks, options)                       \
    BNK_KERNEL(bnk_batch_norm_##variant##_##suffix, (BatchNormForward<T, A>), 512, min_blocks, \
               (batch_norm_inference<T, A, options>))

BATCH_NORM_FORWARD(registers4, f32, float, float, 1, 4, true, true, false)
BATCH_NORM_FORWARD(registers16, f32, float, float, 1, 16, true, false, false)
BATCH_NORM_FORWARD(two_pass, f32, float, float, 1, 16, false, false, false)
BATCH_NORM_FORWARD(options_registers8, f32, float, float, 1, 8, true, false, true)
BATCH_NORM_FORWARD(options_two_pass, f32, float, float, 1, 8, false, false, true)
BATCH_NORM_INFERENCE(inference, f32, float, float, 0, false)
BATCH_NORM_INFERENCE(inference_options, f32, float, float, 0, true)
BATCH_NORM_FORWARD(registers4, f16, Float16, float, 1, 4, true, true, false)
BATCH_NORM_FORWARD(registers16, f16, Float16, float, 1, 16, true, false, false)
BATCH_NORM_FORWARD(two_pass, f16, Float16, float, 1, 16, false, false, false)
BATCH_NORM_FORWARD(options_registers8, f16, Float16, float, 1, 8, true, false, true)
BATCH_NORM_FORWARD(options_two_pass, f16, Float16, float, 1, 8, false, false, true)
BATCH_NORM_INFERENCE(inference, f16, Float16, float, 0, false)
BATCH_NORM_INFERENCE(inference_options, f16, Float16, float, 0, true)
BATCH_NORM_FORWARD(registers4, bf16, BFloat16, float, 1, 4, true, true, false)
BATCH_NORM_FORWARD(registers16, bf16, BFloat16, float, 1, 16, true, false, false)
BATCH_NORM_FORWARD(two_pass, bf16, BFloat16, float, 1, 16, false, false, false)
BATCH_NORM_FORWARD(options_registers8, bf16, BFloat16, float, 1, 8, true, false, true)
BATCH_NORM_FORWARD(options_two_pass, bf16, BFloat16, float, 1, 8, false, false, true)
BATCH_NORM_INFERENCE(inference, bf16, BFloat16, float, 0, false)
BATCH_NORM_INFERENCE(inference_options, bf16, BFloat16, float, 0, true)
BATCH_NORM_FORWARD(registers4, f64, double, double, 1, 4, true, true, false)
BATCH_NORM_FORWARD(registers8, f64, double, double, 1, 8, true, false, false)
BATCH_NORM_FORWARD(two_pass, f64, double, double, 1, 8, false, false, false)
BATCH_NORM_FORWARD(options_registers4, f64, double, double, 1, 4, true, false, true)
BATCH_NORM_FORWARD(options_two_pass, f64, double, double, 1, 4, false, false, true)
BATCH_NORM_INFERENCE(inference, f64, double, double, 0, false)
BATCH_NORM_INFERENCE(inference_options, f64, double, double, 1, true)
