// Gradients of batch normalisation in training by cooperative blocks on the whole device.
//
// Formulas:  as in batch_norm_backward.cu, for batch statistics, without renormalisation.
// Arrays:    dy, x, residual (groups, outer, C, inner), dx and dresidual in C order, of type T, all with strides and
//            addresses as in batch_norm_forward_cooperative.cu, and mask. The other arrays as in batch_norm_backward.cu
//            of the accumulator's type A. partial (2, columns, splits, 2, w) of A, and behind it (2, columns, 2, w) and
//            of groups (columns, 4, w); these only if splits > 1; then (columns, 2, w) if columns share the groups of a
//            slice; behind ten times (columns, w), if masked, (2, columns, splits) of unsigned. barrier_counter: three
//            counters for every column.
// Launch:    As batch_norm_forward_cooperative.cu, with the same constants; shared memory for 15 w, of groups 19 w, + 2
//            w workers numbers, and twice the rows: of x and dy.
// Traffic:   2 N C reads and N C writes of T as long as all rows are held. The other rows are read twice, the second
//            time in descending order. A residual is read once for rows that are held if g is a number of T, else
//            twice; its gradient is written once. The mask as in the forward. The last block of a column reads 8 splits
//            bytes a channel, the others 8.
// Numerics:  Sums over rows are of g and of g (x - mean.high); mean.low counts once a channel. Plain sums of whole
//            vectors that are held; other rows eight at a time, added up in pairs; workers eight at a time; blocks in
//            pairs. Where g is a number of T, as for a ReLU, it takes the place of dy in shared memory. All but a
//            thread's own are sums of g / 2^m, where 2^m is N or more: finite gradients have finite means. Sums over
//            groups in pairs. Deterministic: always in ascending order. A mask of all true changes no bit.
// Reference: Ioffe and Szegedy, Batch Normalization, 2015, arXiv:1502.03167, section 3.
// Called by: bnkernels/ops/batch_norm/training.py
#include "lib/kernel.cuh"
#include "lib/numbers/activation.cuh"
#include "lib/numbers/pair.cuh"
#include "lib/reduce/cooperative_slices.cuh"
#include "lib/reduce/normalisation.cuh"

constexpr int SUMMED = 8;  // rows that are summed before they are added to others in a pair

template <typename T, typename A = typename Packed<T>::Number>
struct BatchNormBackwardCooperative {
    const T* dy;
    const T* x;
    const T* residual;
    const char* mask;
    const A* gamma;
    const A* beta;
    const A* mean;
    const A* mean_low;
    const A* rstd;
    T* dx;
    A* dgamma;
    A* dbeta;
    T* dresidual;
    A* partial;
    unsigned* barrier_counter;
    long long groups, outer, channels, inner;
    long long dy_group, dy_outer, dy_channel;  // strides, in elements
    long long x_group, x_outer, x_channel;
    long long residual_group, residual_outer, residual_channel;
    long long mask_group, mask_outer;
    long long held, stages;  // rows of a thread that stay in shared memory, of each of one or two slices
    A alpha;
    int activation, masked;
};

template <typename L>
using Arguments = BatchNormBackwardCooperative<typename L::T>;

// The argument of one group.
template <typename L>
__device__ __forceinline__ Arguments<L> of_group(Arguments<L> a, long long group) {
    if (a.groups == 1) return a;
    const long long size = a.outer * a.channels * a.inner, statistics = group * 3 * a.channels;
    a.dy += group * a.dy_group;
    a.x += group * a.x_group;
    move(a.residual, group * a.residual_group);
    move(a.mask, group * a.mask_group);
    a.mean += statistics;
    a.mean_low += statistics;
    a.rstd += statistics;
    a.dx += group * size;
    move(a.dresidual, group * size);
    return a;
}

// Puts the map of every channel of a slice into shared memory, for all threads of the block.
template <typename L>
__device__ __forceinline__ void share_channels(const Arguments<L>& a, long long first,
                                               const SliceReduction<L>& reduction, typename L::A* maps) {
    using A = typename L::A;
    const long long c = first + reduction.channel;
    const int width = reduction.width;
    if (reduction.part != 0 || c >= a.channels) return;
    maps += reduction.channel;
    Affine<A> map = {
        {a.mean[c], a.mean_low[c]}, a.gamma ? a.gamma[c] * a.rstd[c] : a.rstd[c], a.beta ? a.beta[c] : A(0)};
    map.fold_low();
    maps[0] = map.mean.high;
    maps[width] = map.scale;
    maps[2 * width] = map.shift;
}

// A power of two, at most a positive number: half the one at or below it.
__device__ __forceinline__ float power_below(float value) {
    return bnk_float_of((bnk_bits_of(value) & 0x7f800000u) - 0x00800000u);
}
__device__ __forceinline__ double power_below(double value) {
    return bnk_double_of((bnk_high_bits_of(value) & 0x7ff00000u) - 0x00100000u, 0u);
}

// Whether g is a number of T, so that it can take the place of dy in shared memory: the activation is derived once.
template <typename L>
__device__ __forceinline__ bool keeps_g(const Arguments<L>& a) {
    const bool selects = a.activation == LINEAR && (a.alpha == typename L::A(0) || a.alpha == typename L::A(1));
    return selects || sizeof(typename L::T) == sizeof(typename L::A);
}

// Whether g is dy.
template <typename L>
__device__ __forceinline__ bool is_identity(const Arguments<L>& a) {
    return a.activation == LINEAR && a.alpha == typename L::A(1);
}

// x - mean.high and dy of a row, then g.
template <typename L>
struct RowGradient {
    using T = typename L::T;
    using A = typename L::A;
    using RowVector = typename L::RowVector;
    static constexpr int COUNT = L::COUNT;
    A centred[COUNT], g[COUNT];

    __device__ __forceinline__ RowGradient(const Affine<A> (&channels)[L::THREAD_CHANNELS], const RowVector& x,
                                           const RowVector& dy) {
        unpack<T>(x, centred);
        unpack<T>(dy, g);
#pragma unroll
        for (int i = 0; i < COUNT; ++i) centred[i] -= channels[L::THREAD_CHANNELS == 1 ? 0 : i].mean.high;
    }

    __device__ __forceinline__ void derive(const Arguments<L>& a, const Affine<A> (&channels)[L::THREAD_CHANNELS],
                                           const RowVector& of_residual) {
        A residual[COUNT], z[COUNT];
        if (a.residual) unpack<T>(of_residual, residual);
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            z[i] = channels[L::THREAD_CHANNELS == 1 ? 0 : i].of_centred(centred[i]);
            if (a.residual) z[i] += residual[i];
        }
        activation_backward_all(g, z, a.activation, a.alpha);
    }
};

// The inputs of a channel.
template <typename L>
struct Channel {
    using Rows = ThreadRows<L>;
    using Row = typename Rows::Row;
    using RowVector = typename L::RowVector;

    const Arguments<L>& a;
    const Rows& rows;
    long long c;

    __device__ __forceinline__ RowVector load_x(const Row& row) const {
        return load_words<sizeof(RowVector)>(rows.at(a.x + c * a.x_channel, a.x_outer, row));
    }
    __device__ __forceinline__ RowVector load_dy(const Row& row) const {
        return load_words<sizeof(RowVector)>(rows.at(a.dy + c * a.dy_channel, a.dy_outer, row));
    }
    __device__ __forceinline__ RowVector load_residual(const Row& row) const {
        if (!a.residual) return {};
        return load_words<sizeof(RowVector)>(rows.at(a.residual + c * a.residual_channel, a.residual_outer, row));
    }

    // Whether the mask leaves a row.
    __device__ __forceinline__ bool counts(const Row& row) const { return a.mask[row.outer * a.mask_outer] != 0; }
};

// Sums over rows of a thread: of g, and of g (x - mean.high). Along inner the elements of a row have sums apart.
template <typename L>
struct RowSums {
    static constexpr int COUNT = L::COUNT;
    typename L::A g[COUNT] = {}, g_centred[COUNT] = {};

    __device__ __forceinline__ void add(const RowGradient<L>& row) {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            g[i] += row.g[i];
            g_centred[i] = fma(row.g[i], row.centred[i], g_centred[i]);
        }
    }
};

// Sums the thread's rows of its channels c, c + 1, ... into its slot, times `weight`; leaves g in the place of dy.
// Whole vectors that are held are summed at once, all others SUMMED at a time.
template <typename L>
__device__ __forceinline__ void sum_rows(const Arguments<L>& a, const ThreadRows<L>& rows, long long c,
                                         const typename L::Kept& kept, const Valid& valid,
                                         const SliceReduction<L>& reduction, const typename L::A* maps,
                                         typename L::A weight) {
    using A = typename L::A;
    constexpr int THREAD_CHANNELS = L::THREAD_CHANNELS;
    const int held = min(valid.count, (int)a.held);
    Affine<A> channels[THREAD_CHANNELS];
    load_maps(channels, maps + L::own(), reduction.width);
    const Channel<L> inputs = {a, rows, c};
    auto row = rows.first;
    auto* x = kept.own;
    const int dy = (int)a.held * kept.threads;
    const auto sum_held = [&](int first, int last) {
        RowSums<L> sums;
#pragma unroll(THREAD_CHANNELS > 4 ? 1 : 2)
        for (int i = first; i < last; ++i, x += kept.threads) {
            if (a.masked && a.residual)
                while (!inputs.counts(row)) rows.advance(row);
            RowGradient<L> found(channels, x[0], x[dy]);
            found.derive(a, channels, inputs.load_residual(row));
            sums.add(found);
            if (keeps_g<L>(a) && !is_identity<L>(a)) x[dy] = pack<typename L::T>(found.g);
            if (a.residual) rows.advance(row);
        }
        return sums;
    };
    const int first_sum = sizeof(*x) < sizeof(Vector) ? min(held, SUMMED) : held;
    const RowSums<L> first_rows = sum_held(0, first_sum);
    A g[THREAD_CHANNELS], g_centred[THREAD_CHANNELS];
#pragma unroll
    for (int i = 0; i < THREAD_CHANNELS; ++i) {
        g[i] = of_channel<THREAD_CHANNELS>(first_rows.g, i);
        g_centred[i] = of_channel<THREAD_CHANNELS>(first_rows.g_centred, i);
    }
    if (first_sum < valid.count) {
        LongSums<A, THREAD_CHANNELS> all_g(g), all_centred(g_centred);
#pragma unroll 1
        for (int i = first_sum; i < held; i += SUMMED) {
            const RowSums<L> some = sum_held(i, min(i + SUMMED, held));
            all_g.add_rows(some.g);
            all_centred.add_rows(some.g_centred);
        }
        row = rows.row(valid.rest);
#pragma unroll 1
        for (int first = valid.rest; first < rows.count; first += SUMMED) {
            RowSums<L> some;
#pragma unroll 1
            for (int i = first; i < min(first + SUMMED, rows.count); ++i, rows.advance(row)) {
                if (a.masked && !inputs.counts(row)) continue;
                RowGradient<L> found(channels, inputs.load_x(row), inputs.load_dy(row));
                found.derive(a, channels, inputs.load_residual(row));
                some.add(found);
            }
            all_g.add_rows(some.g);
            all_centred.add_rows(some.g_centred);
        }
        all_g.store(g);
        all_centred.store(g_centred);
    }
    A* const slot = reduction.slot(L::own());
#pragma unroll
    for (int i = 0; i < THREAD_CHANNELS; ++i) {
        slot[i] = weight * g[i];
        slot[reduction.plane + i] = weight * g_centred[i];
    }
}

// Sums over the rows of a slice: of g, and of g (x - mean.high).
template <typename L>
struct PartialSums {
    using A = typename L::A;
    static constexpr int QUANTITIES = 2;

    const Arguments<L>& a;
    const ThreadRows<L>& rows;
    const SliceReduction<L>& reduction;
    const Turns& turns;
    int turn;
    long long first;  // channel
    bool odd;         // turn of the slice
    A weight;         // of the sums

    // A place behind the results of the blocks, which are not there if there is one block: the one with this index of
    // those that have [channel], behind `numbers` of every column.
    __device__ __forceinline__ A* behind_results(int numbers, int index) const {
        const int columns = gridDim.x, results = gridDim.y == 1 ? 0 : 2 * columns * (int)gridDim.y * QUANTITIES;
        return a.partial + (results + numbers * columns + index) * reduction.width;
    }

    // Place of the coefficients of dx = scale (g - mean_g - (x - mean.high) slope), [2][channel]: in shared memory if
    // there is one block.
    __device__ __forceinline__ A* means() const {
        if (gridDim.y == 1) return reduction.extra + (odd ? 13 : 11) * reduction.width;
        return behind_results(0, 2 * ((odd ? gridDim.x : 0) + blockIdx.x));
    }

    // Place of the sums over groups, pairs of dgamma and dbeta, [4][channel]; as above.
    __device__ __forceinline__ A* group_sums() const {
        return gridDim.y == 1 ? reduction.extra + 15 * reduction.width : behind_results(4, 4 * blockIdx.x);
    }

    // Place of dgamma and dbeta of a run, [2][channel].
    __device__ __forceinline__ A* run_sums(int run) const {
        return behind_results(8, 2 * (run * turns.columns + turns.column()));
    }

    // Numbers of rows that a mask leaves.
    __device__ __forceinline__ unsigned* counts() const { return reinterpret_cast<unsigned*>(behind_results(10, 0)); }

    __device__ __forceinline__ void of_block(int channel, A* to, int pitch) const {
        const A g = reduction.slots[channel], g_centred = reduction.slots[reduction.plane + channel];
        to[0] = g;
        to[pitch] = g_centred;
        if (a.masked) reduction.leave_valid(counts(), odd);
    }

    __device__ __forceinline__ void add_blocks(A* to, int to_pitch, const A* partials, int pitch, int first,
                                               int last) const {
        Pair<A> g = {A(0), A(0)}, g_centred = {A(0), A(0)};
#pragma unroll 4
        for (int block = first; block < last; ++block) {
            g = add(g, partials[block * QUANTITIES * pitch]);
            g_centred = add(g_centred, partials[(block * QUANTITIES + 1) * pitch]);
        }
        to[0] = value(g);
        to[to_pitch] = value(g_centred);
        if (a.masked) reduction.add_valid(counts(), odd, first, last);
    }

    // Writes the means of a channel, and the gradients of its parameters or what they have of this group.
    __device__ __forceinline__ void conclude(int channel, const A* merged, int pitch) const {
        const long long c = first + channel;
        if (c >= a.channels) return;
        const Arguments<L> of = of_group<L>(a, turns.group(turn));
        const A g = merged[0], rstd = of.rstd[c], low = of.mean_low[c], g_centred = fma(-low, g, merged[pitch]);
        const A count = a.masked ? max(rows.values_of(*reduction.valid(odd)), A(1)) : A(a.outer * a.inner);
        const A share = A(1) / (weight * count);
        const A slope = g_centred * rstd * rstd * share;
        A* const mean = means() + channel;
        mean[0] = fma(-low, slope, share * g);
        mean[reduction.width] = slope;
        const A dgamma = g_centred / weight * rstd, dbeta = g / weight;
        if (a.groups == 1)
            write_gradients(c, dgamma, dbeta);
        else
            add_group(channel, dgamma, dbeta);
    }

    __device__ __forceinline__ void write_gradients(long long c, A dgamma, A dbeta) const {
        if (a.dgamma) a.dgamma[c] = dgamma;
        if (a.dbeta) a.dbeta[c] = dbeta;
    }

    // The turns of a slice follow one another, and the block that concludes one has seen what the one before wrote.
    __device__ __forceinline__ void add_group(int channel, A dgamma, A dbeta) const {
        const int width = reduction.width, number = turn % turns.groups;
        A* const sums = group_sums() + channel;
        Pair<A> of_gamma = {A(0), A(0)}, of_beta = of_gamma;
        if (number > 0) {
            of_gamma = {sums[0], sums[width]};
            of_beta = {sums[2 * width], sums[3 * width]};
        }
        of_gamma = add(of_gamma, dgamma);
        of_beta = add(of_beta, dbeta);
        sums[0] = of_gamma.high, sums[width] = of_gamma.low;
        sums[2 * width] = of_beta.high, sums[3 * width] = of_beta.low;
        if (number < turns.groups - 1) return;
        if (turns.runs == 1) {
            write_gradients(first + channel, value(of_gamma), value(of_beta));
        } else {
            A* const run = run_sums(turns.run) + channel;
            run[0] = value(of_gamma);
            run[width] = value(of_beta);
        }
    }

    // Adds up the runs that share the groups of a slice, in order: the last of them to be done. All threads of one
    // block of every column must call.
    __device__ __forceinline__ void add_runs() const {
        unsigned token, *const counter = a.barrier_counter + turns.column() * BARRIER_PITCH + 2;
        if (!arrive_last(counter, turns.runs, token, reduction.flag + 1)) return;
        const long long c = first + reduction.channel;
        if (reduction.part == 0 && c < a.channels) {
            Pair<A> dgamma = {A(0), A(0)}, dbeta = dgamma;
            for (int run = 0; run < turns.runs; ++run) {
                const A* const sums = run_sums(run) + reduction.channel;
                dgamma = add(dgamma, sums[0]);
                dbeta = add(dbeta, sums[reduction.width]);
            }
            write_gradients(c, value(dgamma), value(dbeta));
        }
        open(counter, turns.runs);
    }
};

// Descending order: the rows that are read again were read last.
template <typename L>
__device__ __forceinline__ void write_rows(const Arguments<L>& a, const ThreadRows<L>& rows, long long c,
                                           const typename L::Kept& kept, int valid, const typename L::A* maps,
                                           const typename L::A* means, int width) {
    using T = typename L::T;
    using A = typename L::A;
    using RowVector = typename L::RowVector;
    constexpr int COUNT = L::COUNT, THREAD_CHANNELS = L::THREAD_CHANNELS, BYTES = sizeof(RowVector);
    Affine<A> channels[THREAD_CHANNELS];
    A mean_g[THREAD_CHANNELS], slope[THREAD_CHANNELS];
    load_maps(channels, maps + L::own(), width);
#pragma unroll
    for (int i = 0; i < THREAD_CHANNELS; ++i) {
        mean_g[i] = means[L::own() + i];
        slope[i] = means[width + L::own() + i];
    }
    int i = rows.count;
    const Channel<L> inputs = {a, rows, c};
    const long long output = c * (L::CHANNELS_LAST ? 1 : a.inner);
    auto row = rows.last_row();
    const auto write = [&](RowVector x, RowVector dy, bool derived) {
        RowGradient<L> found(channels, x, dy);
        if (!derived) found.derive(a, channels, inputs.load_residual(row));
        if (a.residual && a.dresidual)
            store_words<BYTES>(rows.at(a.dresidual + output, a.channels * a.inner, row), pack<T>(found.g));
#pragma unroll
        for (int j = 0; j < COUNT; ++j) {
            const int own = THREAD_CHANNELS == 1 ? 0 : j;
            found.g[j] = channels[own].scale * (found.g[j] - fma(found.centred[j], slope[own], mean_g[own]));
        }
        store_words<BYTES>(rows.at(a.dx + output, a.channels * a.inner, row), pack<T>(found.g));
        rows.retreat(row);
    };
    const int dy = (int)a.held * kept.threads;
    if (a.masked) {
        rows.descend(Mask{a.mask, a.mask_outer}, row, valid, [&](int number) {
            if (number >= 0) {
                if (number >= a.held)
                    write(inputs.load_x(row), inputs.load_dy(row), false);
                else
                    write(kept[number], (&kept[number])[dy], keeps_g<L>(a));
            } else {
                if (a.residual && a.dresidual)
                    store_words<BYTES>(rows.at(a.dresidual + output, a.channels * a.inner, row), RowVector{});
                store_words<BYTES>(rows.at(a.dx + output, a.channels * a.inner, row), RowVector{});
                rows.retreat(row);
            }
        });
        return;
    }
#pragma unroll 1
    for (; i > a.held; --i) write(inputs.load_x(row), inputs.load_dy(row), false);
#pragma unroll 1
    for (const RowVector* x = &kept[i - 1]; i > 0; --i, x -= kept.threads) write(x[0], x[dy], keeps_g<L>(a));
}

template <typename L>
__device__ __forceinline__ void batch_norm_backward_cooperative(const Arguments<L>& arguments) {
    using A = typename L::A;
    Arguments<L> a = arguments;
    take_constants(a);
    BNK_DYNAMIC_SHARED(A, shared);
    const ThreadRows<L> rows(a.outer, a.inner);
    const int width = L::width(), held = min(rows.count, (int)a.held), lag = (int)a.stages - 1;
    const SliceReduction<L> reduction(shared, a.groups == 1 ? 15 : 19);
    A* const written_means = reduction.extra + 9 * width;
    const A weight = power_below(A(1) / A(a.outer * a.inner));
    const Turns turns(a.channels, width, a.groups);
    const auto first_channel = [&](int turn) { return turns.slice(turn) * width; };
    const auto own_channel = [&](int turn) { return first_channel(turn) + L::own(); };
    const auto group_of = [&](int turn) { return of_group<L>(a, turns.group(turn)); };
    // A slice needs its maps until it is written: while some threads do that, others share those of two turns later.
    const auto maps = [&](int turn) { return reduction.extra + turn % 3 * (3 * width); };
    const auto kept = [&](int turn) {
        return L::places(reduction.end()).from(turn % 2 == 1 && lag ? 2 * (int)a.held : 0);
    };
    const auto slice = [&](int turn) {
        return PartialSums<L>{a, rows, reduction, turns, turn, first_channel(turn), turn % 2 == 1, weight};
    };
    const auto ask = [&](int turn) {
        const long long c = own_channel(turn);
        Valid valid = {rows.count, held};
        if (turn < turns.count && c < a.channels) {
            const Arguments<L> group = group_of(turn);
            const auto *const x = group.x + c * a.x_channel, *const dy = group.dy + c * a.dy_channel;
            if (a.masked)
                valid = copy_valid_rows<L, 2>(rows, kept(turn), (int)a.held, {group.mask, a.mask_outer}, x, a.x_outer,
                                              dy, a.dy_outer, (int)a.held);
            else
                copy_rows<L, 2>(rows, kept(turn), held, x, a.x_outer, dy, a.dy_outer, (int)a.held);
        }
        commit_copies();
        return valid;
    };
    // No early return: every thread must reach the barriers. Channels beyond the last have no rows.
    unsigned token = 0;
    if (a.masked && L::thread() == 0 && threadIdx.y == 0) *reduction.valid(false) = 0;
    Valid valid = ask(0);
    int valid_before = 0;
#pragma unroll 1
    for (int turn = 0; turn < turns.count + lag; ++turn) {
        token >>= 1;  // the phase of the turn before stays, a bit below that of this one
        if (turn < turns.count) {
            const long long c = own_channel(turn);
            share_channels<L>(group_of(turn), first_channel(turn), reduction, maps(turn));
            wait_for_copies();
            __syncthreads();
            if (a.masked) reduction.count_valid(turn % 2 == 1, valid.count);
            if (c < a.channels) sum_rows<L>(group_of(turn), rows, c, kept(turn), valid, reduction, maps(turn), weight);
            reduction.sum_block();
            token = (token & BARRIER_PHASE >> 1) |
                    (reduction.merge(a.partial, a.barrier_counter, slice(turn)) & BARRIER_PHASE);
        }
        const int written = turn - lag;
        if (written >= 0) {
            reduction.wait(a.barrier_counter, written % 2 == 1, lag ? token << 1 : token);
            if (reduction.part < 2) {
                const int mean = reduction.part * width + reduction.channel;
                written_means[mean] = slice(written).means()[mean];
            }
            __syncthreads();
            const long long c = own_channel(written);
            if (c < a.channels)
                write_rows<L>(group_of(written), rows, c, kept(written), lag ? valid_before : valid.count,
                              maps(written), written_means, width);
        }
        valid_before = valid.count;
        valid = ask(turn + 1);
    }
    if (turns.runs > 1 && blockIdx.y == 0) slice(turns.count - 1).add_runs();
}

// count: elements of a row, channels or positions along inner.
#define BATCH_NORM_BACKWARD_COOPERATIVE(variant, suffix, T, count, channels_last, threads)                  \
    BNK_KERNEL(bnk_batch_norm_backward_##variant##_##suffix, (BatchNormBackwardCooperative<T>), threads, 2, \
               (batch_norm_backward_cooperative<Layout<T, count, channels_last>>))

// With eight channels a thread, two blocks of 256 threads would not have enough registers.
BATCH_NORM_BACKWARD_COOPERATIVE(cooperative, f32, float, 4, true, 256)
BATCH_NORM_BACKWARD_COOPERATIVE(cooperative_inner, f32, float, 4, false, 256)
BATCH_NORM_BACKWARD_COOPERATIVE(cooperative_single, f32, float, 1, true, 256)
BATCH_NORM_BACKWARD_COOPERATIVE(cooperative_inner_single, f32, float, 1, false, 256)
BATCH_NORM_BACKWARD_COOPERATIVE(cooperative, f16, Float16, 8, true, 192)
BATCH_NORM_BACKWARD_COOPERATIVE(cooperative_inner, f16, Float16, 8, false, 256)
BATCH_NORM_BACKWARD_COOPERATIVE(cooperative_pair, f16, Float16, 2, true, 256)
BATCH_NORM_BACKWARD_COOPERATIVE(cooperative_inner_pair, f16, Float16, 2, false, 256)
BATCH_NORM_BACKWARD_COOPERATIVE(cooperative_single, f16, Float16, 1, true, 256)
BATCH_NORM_BACKWARD_COOPERATIVE(cooperative_inner_single, f16, Float16, 1, false, 256)
BATCH_NORM_BACKWARD_COOPERATIVE(cooperative, bf16, BFloat16, 8, true, 192)
BATCH_NORM_BACKWARD_COOPERATIVE(cooperative_inner, bf16, BFloat16, 8, false, 256)
BATCH_NORM_BACKWARD_COOPERATIVE(cooperative_pair, bf16, BFloat16, 2, true, 256)
BATCH_NORM_BACKWARD_COOPERATIVE(cooperative_inner_pair, bf16, BFloat16, 2, false, 256)
BATCH_NORM_BACKWARD_COOPERATIVE(cooperative_single, bf16, BFloat16, 1, true, 256)
BATCH_NORM_BACKWARD_COOPERATIVE(cooperative_inner_single, bf16, BFloat16, 1, false, 256)
BATCH_NORM_BACKWARD_COOPERATIVE(cooperative_single, f64, double, 1, true, 256)
BATCH_NORM_BACKWARD_COOPERATIVE(cooperative_inner_single, f64, double, 1, false, 256)
