// Batch normalisation in training, then an activation, by cooperative blocks on the whole device.
//
// Formulas:  as in batch_norm_forward.cu, for every group, without renormalisation.
// Arrays:    x, residual (groups, outer, C, inner), y in C order, of type T. A row is COUNT elements that one access
//            moves: 16 bytes, or two elements, or one; all addresses are multiples of its size. CHANNELS_LAST: inner =
//            1; C and the other strides are multiples of COUNT, and channels are contiguous. Otherwise inner and the
//            other strides are such multiples, and the inner axis is contiguous. A group has fewer than 2^31 rows. mask
//            (groups, outer) of bytes, any strides, if `masked`. The other arrays as in batch_norm_forward.cu, of the
//            accumulator's type A. partial (2, columns, splits, 3, w) of A, and behind it, if masked, (2, columns,
//            splits) of unsigned; barrier_counter: two counters for every column, see lib/sync/grid_barrier.cuh.
//            divisor: N - correction, without a mask.
// Launch:    Block (w / COUNT, workers, 1) with CHANNELS_LAST, else (1, workers, 1) and w = 1. Grid (columns, splits,
//            1), cooperative if splits > 1; with groups at most one column a slice, or as many for each, see
//            lib/reduce/cooperative_slices.cuh. Every worker has a row. A block keeps `held` rows a thread and stage in
//            shared memory, which has 16 bytes, (2 w rounded up to a multiple of 4) + 2 w workers numbers of A, and
//            `stages` times `held` rows for every thread. Neighbouring threads access neighbouring rows. activation,
//            masked, groups if there is one, residual if there is none, and alpha where it is 0 or 1 are constants of
//            the launch.
// Traffic:   N C reads and N C writes of T as long as all rows are held. The other rows are read twice, the second time
//            in descending order, which is likely to hit the L2 cache. A residual adds N C reads. Of rows that the mask
//            excludes only y is written; a slice reads the mask twice, once more for rows that are not held. The last
//            block of a column reads 12 splits bytes a channel, the others the statistics.
// Numerics:  A thread's whole vectors that are held in plain sums, other rows 16 at a time, added up in pairs; about a
//            median of rows, with fewer valid rows than workers about a mean. Means are merged as differences from one
//            of them. Sums beyond the range are formed again in smaller units, so that finite values never give NaN.
//            Deterministic: rows, then workers 8 at a time, then splits 8 at a time, always in ascending order. A mask
//            of all true changes no bit.
// Reference: Ioffe and Szegedy, Batch Normalization, 2015, arXiv:1502.03167, algorithm 1.
// Called by: bnkernels/ops/batch_norm/training.py
#include "lib/kernel.cuh"
#include "lib/numbers/activation.cuh"
#include "lib/numbers/pair.cuh"
#include "lib/numbers/rsqrt.cuh"
#include "lib/reduce/cooperative_slices.cuh"
#include "lib/reduce/normalisation.cuh"

constexpr int CHUNK = 4;    // rows not held that a thread has in flight
constexpr int SUMMED = 16;  // rows that are summed before they are merged, but for whole vectors that are held

// LARGEST: finite number. SMALL_UNIT: a unit in which no sum of squared differences of numbers overflows.
template <typename A>
struct Range;
template <>
struct Range<float> {
    static constexpr float LARGEST = 3.40282347e38f, SMALL_UNIT = 7.88860905e-31f;  // 2^-100
};
template <>
struct Range<double> {
    static constexpr double LARGEST = 1.7976931348623157e308, SMALL_UNIT = 2.409919865102884e-181;  // 2^-600
};

template <typename T, typename A = typename Packed<T>::Number>
struct BatchNormForwardCooperative {
    const T* x;
    const T* residual;
    const char* mask;
    const A* gamma;
    const A* beta;
    T* y;
    A* statistics;
    A* running_mean;
    A* running_var;
    A* partial;
    unsigned* barrier_counter;
    long long groups, outer, channels, inner;
    long long x_group, x_outer, x_channel;  // strides, in elements
    long long residual_group, residual_outer, residual_channel;
    long long mask_group, mask_outer;
    long long held, stages;  // rows of a thread that stay in shared memory, of each of one or two slices
    A momentum, divisor, correction, eps, alpha;
    int activation, masked;
};

template <typename L>
using Arguments = BatchNormForwardCooperative<typename L::T>;

// The argument of one group.
template <typename L>
__device__ __forceinline__ Arguments<L> of_group(Arguments<L> a, long long group) {
    if (a.groups == 1) return a;
    a.x += group * a.x_group;
    move(a.residual, group * a.residual_group);
    move(a.mask, group * a.mask_group);
    a.y += group * a.outer * a.channels * a.inner;
    a.statistics += group * 3 * a.channels;
    move(a.running_mean, group * a.channels);
    move(a.running_var, group * a.channels);
    return a;
}

// Sums of a thread's rows, about a shift for each of its channels. Along inner the elements of a row have sums apart.
template <typename L>
struct RowSums {
    using A = typename L::A;
    static constexpr int COUNT = L::COUNT;
    A sum[COUNT] = {}, squares[COUNT] = {};

    __device__ __forceinline__ void add(typename L::RowVector row, const A (&shift)[L::THREAD_CHANNELS], A unit) {
        A values[COUNT];
        unpack<typename L::T>(row, values);
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const A distance = fma(values[i], unit, -shift[L::THREAD_CHANNELS == 1 ? 0 : i]);
            sum[i] += distance;
            squares[i] = fma(distance, distance, squares[i]);
        }
    }
};

// Number of valid rows that workers hold, in the place of their sums, for `choose_shift`.
template <typename L>
__device__ __forceinline__ int* held_of_workers(const SliceReduction<L>& reduction) {
    return reinterpret_cast<int*>(reduction.slots);
}

// Mean of channel threadIdx.y of the thread's vector over the first rows of all workers that hold any; 0 if none does.
template <typename L>
__device__ __forceinline__ typename L::A mean_of_first_rows(const typename L::Kept& kept, const int* held_of) {
    using A = typename L::A;
    A sum = A(0), workers = A(0);
#pragma unroll 1
    for (int worker = 0; worker < blockDim.y; ++worker) {
        if (held_of[worker] == 0) continue;
        const auto& row = kept.own[(worker - (int)threadIdx.y) * L::threads()];
        sum += Packed<typename L::T>::get(row, threadIdx.y) / A(blockDim.y);  // cannot overflow
        workers += A(1);
    }
    return workers == A(0) ? A(0) : sum * (A(blockDim.y) / workers);
}

// A number within the spread of channel threadIdx.y of the thread's vector, about which the block sums: the median of
// three workers' medians of three rows, which no few outliers draw away. It takes only rows that every worker holds,
// all of which have arrived; with a mask that leaves as many rows as workers, those of workers that hold any.
template <typename L>
__device__ __forceinline__ typename L::A choose_shift(const Arguments<L>& a, const ThreadRows<L>& rows,
                                                      const typename L::Kept& kept,
                                                      const SliceReduction<L>& reduction) {
    const int* const held_of = held_of_workers(reduction);
    typename L::A medians[3], numbers[3];
#pragma unroll
    for (int i = 0; i < 3; ++i) {
        int worker = i * (blockDim.y - 1) / 2, held = min((int)a.held, rows.rounds);
        if (a.masked) {
#pragma unroll 1
            for (int tried = 0; tried < blockDim.y && held_of[worker] == 0; ++tried)
                worker = worker + 1 < blockDim.y ? worker + 1 : 0;
            held = min(held, held_of[worker]);
        }
        const int last_row = held - 1, rows_between[3] = {0, last_row / 2, last_row};
        const typename L::RowVector* const of_worker = kept.own + (worker - (int)threadIdx.y) * L::threads();
#pragma unroll
        for (int j = 0; j < 3; ++j)
            numbers[j] = Packed<typename L::T>::get(of_worker[rows_between[j] * kept.threads], threadIdx.y);
        medians[i] = median_of_three(numbers[0], numbers[1], numbers[2]);
    }
    return median_of_three(medians[0], medians[1], medians[2]);
}

// Adds the thread's rows that are not held.
template <typename L>
__device__ __forceinline__ void add_other_rows(LongSums<typename L::A, L::THREAD_CHANNELS>& sum,
                                               LongSums<typename L::A, L::THREAD_CHANNELS>& squares,
                                               const Arguments<L>& a, const ThreadRows<L>& rows, int rest, long long c,
                                               const typename L::A (&shift)[L::THREAD_CHANNELS], typename L::A unit) {
    using RowVector = typename L::RowVector;
    const auto* const channel = a.x + c * a.x_channel;
    auto row = rows.row(rest);
#pragma unroll 1
    for (int first = rest; first < rows.count; first += SUMMED) {
        const int last = min(first + SUMMED, rows.count);
        RowSums<L> some;
#pragma unroll 1
        for (int i = first; i < last; i += CHUNK) {
            RowVector chunk[CHUNK];
            unsigned bits = 0xffffffffu;
            if (a.masked)
                bits = rows.template valid<CHUNK, false>(Mask{a.mask, a.mask_outer}, row, min(CHUNK, last - i));
            const auto counts = [&](int j) { return i + j < last && (bits >> j & 1u) != 0; };
#pragma unroll
            for (int j = 0; j < CHUNK; ++j)
                if (i + j < last) {
                    if (counts(j)) chunk[j] = load_words<sizeof(RowVector)>(rows.at(channel, a.x_outer, row));
                    rows.advance(row);
                }
#pragma unroll
            for (int j = 0; j < CHUNK; ++j)
                if (counts(j)) some.add(chunk[j], shift, unit);
        }
        sum.add_rows(some.sum);
        squares.add_rows(some.squares);
    }
}

// Sums the thread's rows of its channels c, c + 1, ... into its slot. In a smaller unit only those channels that need
// it: the sum of the others, in the slot of worker 0, stays.
template <typename L>
__device__ __forceinline__ void sum_rows(const Arguments<L>& a, const ThreadRows<L>& rows, long long c,
                                         const typename L::Kept& kept, const Valid& valid,
                                         const SliceReduction<L>& reduction, typename L::A unit) {
    using A = typename L::A;
    constexpr int THREAD_CHANNELS = L::THREAD_CHANNELS;
    const int held = min(valid.count, (int)a.held);
    const A *const shifts = reduction.extra + L::own(), *const units = shifts + reduction.width;
    A* const slot = reduction.slot(L::own());
    A shift[THREAD_CHANNELS], sum[THREAD_CHANNELS], squares[THREAD_CHANNELS];
#pragma unroll
    for (int i = 0; i < THREAD_CHANNELS; ++i) shift[i] = unit * shifts[i];
    const auto* row = kept.own;
    const auto sum_held = [&](int first, int last) {
        RowSums<L> sums;
#pragma unroll(THREAD_CHANNELS > 4 ? 2 : 4)
        for (int i = first; i < last; ++i, row += kept.threads) sums.add(*row, shift, unit);
        return sums;
    };
    const int first_sum = sizeof(*row) < sizeof(Vector) ? min(held, SUMMED) : held;
    const RowSums<L> first_rows = sum_held(0, first_sum);
#pragma unroll
    for (int i = 0; i < THREAD_CHANNELS; ++i) {
        sum[i] = of_channel<THREAD_CHANNELS>(first_rows.sum, i);
        squares[i] = of_channel<THREAD_CHANNELS>(first_rows.squares, i);
    }
    if (first_sum < valid.count) {
        LongSums<A, THREAD_CHANNELS> all(sum), all_squares(squares);
#pragma unroll 1
        for (int i = first_sum; i < held; i += SUMMED) {
            const RowSums<L> some = sum_held(i, min(i + SUMMED, held));
            all.add_rows(some.sum);
            all_squares.add_rows(some.squares);
        }
        if (held < valid.count) add_other_rows<L>(all, all_squares, a, rows, valid.rest, c, shift, unit);
        all.store(sum);
        all_squares.store(squares);
    }
    if (unit < A(1)) {
#pragma unroll
        for (int i = 0; i < THREAD_CHANNELS; ++i) {
            if (units[i] < A(1)) continue;
            sum[i] = threadIdx.y == 0 ? slot[i] : A(0);
            squares[i] = threadIdx.y == 0 ? slot[reduction.plane + i] : A(0);
        }
    }
#pragma unroll
    for (int i = 0; i < THREAD_CHANNELS; ++i) {
        slot[i] = sum[i];
        slot[reduction.plane + i] = squares[i];
    }
}

// The block's sums about a shift, in a small unit where they would not be finite. All threads must call.
template <typename L>
__device__ __forceinline__ void sum_slice(const Arguments<L>& a, const ThreadRows<L>& rows, long long c,
                                          const typename L::Kept& kept, const Valid& valid, bool odd,
                                          const SliceReduction<L>& reduction) {
    using A = typename L::A;
    constexpr int THREAD_CHANNELS = L::THREAD_CHANNELS;
    const int own = L::own();
    const long long channels_left = a.channels - c + own;
    A *const shifts = reduction.extra, *const units = shifts + reduction.width;
    wait_for_copies();
    __syncthreads();  // behind which nobody reads the flag of the slice before
    if (L::thread() == 0 && threadIdx.y == 0) *reduction.flag = 0;
    if (a.masked) {
        reduction.count_valid(odd, valid.count);
        if (L::thread() == 0) held_of_workers(reduction)[threadIdx.y] = min(valid.count, (int)a.held);
        __syncthreads();
    }
    if (threadIdx.y < THREAD_CHANNELS && c < a.channels)
        shifts[own + threadIdx.y] = a.masked && *reduction.valid(odd) < blockDim.y
                                        ? mean_of_first_rows<L>(kept, held_of_workers(reduction))
                                        : choose_shift<L>(a, rows, kept, reduction);  // a median of few may be far off
    __syncthreads();
    A unit = A(1);
#pragma unroll 1
    while (true) {
        if (c < a.channels) sum_rows<L>(a, rows, c, kept, valid, reduction, unit);
        reduction.sum_block();
        if (unit < A(1)) return;
        if (reduction.part == 0) {
            const bool finite = fabs(reduction.slots[reduction.channel]) <= Range<A>::LARGEST;
            units[reduction.channel] = finite ? A(1) : Range<A>::SMALL_UNIT;
            if (!finite && reduction.channel < channels_left) atomicAdd(reduction.flag, 1u);
        }
        __syncthreads();
        if (*reduction.flag == 0) return;
        unit = Range<A>::SMALL_UNIT;
    }
}

// Moments of the channels of a slice. Those of a block are mean, mean_low and M2; as differences from those of a block
// with values they become plain sums.
template <typename L>
struct PartialMoments {
    using A = typename L::A;
    static constexpr int QUANTITIES = 3;

    const Arguments<L>& a;
    const ThreadRows<L>& rows;
    const SliceReduction<L>& reduction;
    long long group, first;  // channel
    bool odd;                // turn of the slice

    // Numbers of rows that a mask leaves, behind the results of the blocks.
    __device__ __forceinline__ unsigned* counts() const {
        return reinterpret_cast<unsigned*>(a.partial + 2 * gridDim.x * gridDim.y * QUANTITIES * reduction.width);
    }

    __device__ __forceinline__ void of_block(int channel, A* to, int pitch) const {
        const A sum = reduction.slots[channel], squares = reduction.slots[reduction.plane + channel];
        const A unit = reduction.extra[reduction.width + channel], scale = A(1) / unit;
        A count = rows.values(blockIdx.y);
        if (a.masked) {
            count = max(rows.values_of(*reduction.valid(odd)), A(1));  // without a row the sum is 0
            reduction.leave_valid(counts(), odd);
        }
        const A mean = sum / count;
        const Pair<A> shifted = two_sum(unit * reduction.extra[channel], mean);
        to[0] = scale * shifted.high;
        to[pitch] = scale * shifted.low;
        to[2 * pitch] = scale * (scale * about_mean(sum, mean, squares));
    }

    // Sum of squares about the mean, from that about a shift. Infinite squares stay so.
    static __device__ __forceinline__ A about_mean(A sum, A mean, A squares) {
        if (!(squares <= Range<A>::LARGEST)) return squares;
        return max(fma(-sum, mean, squares), A(0));
    }

    // The first block that has values, or the last.
    __device__ __forceinline__ int reference() const {
        int block = 0;
        if (a.masked)
            while (block < gridDim.y - 1 && reduction.of_column(counts(), odd)[block] == 0) ++block;
        return block;
    }

    // Half the distances of the means, which are always finite; weighted, the sum is that of the whole mean, but for
    // the values that a mask excludes.
    __device__ __forceinline__ void add_blocks(A* to, int to_pitch, const A* partials, int pitch, int first,
                                               int last) const {
        const A* const about = partials + reference() * QUANTITIES * pitch;
        const A half = A(0.5) * about[0], low = about[pitch], share = A(1) / values();
        A sum = A(0), squares = A(0), m2 = A(0);
#pragma unroll 4
        for (int block = first; block < last; ++block) {
            const A* const from = partials + block * QUANTITIES * pitch;
            A count = rows.values(block);
            if (a.masked) count = rows.values_of(reduction.of_column(counts(), odd)[block]);
            const A distance = fma(A(0.5), from[0], -half) + A(0.5) * (from[pitch] - low);
            sum = fma(share * count, distance, sum);
            squares = fma(A(4) * count * distance, distance, squares);
            m2 += from[2 * pitch];
        }
        if (a.masked) reduction.add_valid(counts(), odd, first, last);
        to[0] = sum;
        to[to_pitch] = squares;
        to[2 * to_pitch] = m2;
    }

    // Number of values of a channel, with those that a mask excludes.
    __device__ __forceinline__ A values() const { return A(a.outer * a.inner); }

    // Writes the statistics of a channel.
    __device__ __forceinline__ void conclude(int channel, const A* merged, int pitch) const {
        const long long c = first + channel;
        if (c >= a.channels) return;
        const A count = a.masked ? rows.values_of(*reduction.valid(odd)) : values();
        const bool empty = a.masked && count == A(0);
        Pair<A> mean = {merged[0], merged[pitch]};
        A m2 = merged[2 * pitch];
        if (gridDim.y > 1 && !empty) {
            const A half = a.masked ? merged[0] * (values() / count) : merged[0];
            const A* const about = reduction.template partials<PartialMoments>(a.partial, odd) + channel +
                                   reference() * QUANTITIES * reduction.width;
            const Pair<A> from = {about[0], about[reduction.width]};
            mean.high = fma(A(2), half, from.high);
            mean.low = fma(A(2), fma(A(0.5), from.high, -A(0.5) * mean.high) + half, from.low);
            m2 += about_mean(A(4) * count * half, half, merged[pitch]);
        }
        const Arguments<L> of = of_group<L>(a, group);
        of.statistics[c] = empty ? A(0) : mean.high;
        of.statistics[a.channels + c] = empty ? A(0) : mean.low;
        of.statistics[2 * a.channels + c] = empty ? A(0) : reciprocal_sqrt(m2 / count + a.eps);
        const A keep = A(1) - a.momentum, divisor = a.masked ? count - a.correction : a.divisor;
        if (a.running_mean && !empty) of.running_mean[c] = fma(a.momentum, mean.high, keep * of.running_mean[c]);
        if (a.running_var && (!a.masked || divisor > A(0)))
            of.running_var[c] = fma(a.momentum, m2 / divisor, keep * of.running_var[c]);
    }
};

// Puts the map of every channel of a slice into shared memory, [mean.high, scale, shift][channel], for all threads of
// the block. With an infinite variance a channel of finite numbers is beta, though x - mean may be beyond the range.
template <typename L>
__device__ __forceinline__ void share_channels(const Arguments<L>& a, long long first,
                                               const SliceReduction<L>& reduction) {
    using A = typename L::A;
    const long long c = first + reduction.channel;
    const int width = reduction.width;
    if (reduction.part == 0 && c < a.channels) {
        const A *const statistics = a.statistics + c, mean = statistics[0], rstd = statistics[2 * a.channels];
        const bool infinite = rstd == A(0) && fabs(mean) <= Range<A>::LARGEST;
        Affine<A> map = {{infinite ? A(0) : mean, infinite ? A(0) : statistics[a.channels]},
                         a.gamma ? a.gamma[c] * rstd : rstd,
                         a.beta ? a.beta[c] : A(0)};
        map.fold_low();
        A* const maps = reduction.slots + reduction.channel;
        maps[0] = map.mean.high;
        maps[width] = map.scale;
        maps[2 * width] = map.shift;
    }
    __syncthreads();
}

template <typename L>
__device__ __forceinline__ typename L::RowVector normalise(const Arguments<L>& a,
                                                           const Affine<typename L::A> (&channels)[L::THREAD_CHANNELS],
                                                           const typename L::RowVector& x,
                                                           const typename L::RowVector& residual) {
    using T = typename L::T;
    typename L::A z[L::COUNT], added[L::COUNT];
    unpack<T>(x, z);
    if (a.residual) unpack<T>(residual, added);
#pragma unroll
    for (int i = 0; i < L::COUNT; ++i) {
        z[i] = channels[L::THREAD_CHANNELS == 1 ? 0 : i](z[i]);
        if (a.residual) z[i] += added[i];
    }
    activate_all(z, a.activation, a.alpha);
    return pack<T>(z);
}

// Descending order: the rows that are read again were read last.
template <typename L>
__device__ __forceinline__ void write_rows(const Arguments<L>& a, const ThreadRows<L>& rows, long long c,
                                           const typename L::Kept& kept, int valid,
                                           const Affine<typename L::A> (&channels)[L::THREAD_CHANNELS]) {
    using T = typename L::T;
    using RowVector = typename L::RowVector;
    constexpr int BYTES = sizeof(RowVector);
    const T *const x = a.x + c * a.x_channel, *const residual = a.residual + c * a.residual_channel;
    T* const y = a.y + c * (L::CHANNELS_LAST ? 1 : a.inner);
    int i = rows.count;
    auto row = rows.last_row();
    const auto write = [&](RowVector values) {
        RowVector added = {};
        if (a.residual) added = load_words<BYTES>(rows.at(residual, a.residual_outer, row));
        store_words<BYTES>(rows.at(y, a.channels * a.inner, row), normalise<L>(a, channels, values, added));
        rows.retreat(row);
    };
    if (a.masked) {
        rows.descend(Mask{a.mask, a.mask_outer}, row, valid, [&](int number) {
            if (number < 0) {
                store_words<BYTES>(rows.at(y, a.channels * a.inner, row), RowVector{});
                rows.retreat(row);
            } else {
                write(number < a.held ? kept[number] : load_words<BYTES>(rows.at(x, a.x_outer, row)));
            }
        });
        return;
    }
#pragma unroll 1
    for (; i > a.held; --i) write(load_words<BYTES>(rows.at(x, a.x_outer, row)));
#pragma unroll 1
    for (int at = (i - 1) * kept.threads; at >= 0; at -= kept.threads) write(kept.own[at]);
}

template <typename L>
__device__ __forceinline__ void batch_norm_forward_cooperative(const Arguments<L>& arguments) {
    using A = typename L::A;
    Arguments<L> a = arguments;
    take_constants(a);
    BNK_DYNAMIC_SHARED(A, shared);
    constexpr int THREAD_CHANNELS = L::THREAD_CHANNELS;
    const ThreadRows<L> rows(a.outer, a.inner);
    const int width = L::width(), held = min(rows.count, (int)a.held), lag = (int)a.stages - 1;
    const SliceReduction<L> reduction(shared, 2);  // a shift and a unit for each channel
    const Turns turns(a.channels, width, a.groups);
    const auto first_channel = [&](int turn) { return turns.slice(turn) * width; };
    const auto own_channel = [&](int turn) { return first_channel(turn) + L::own(); };
    const auto group_of = [&](int turn) { return of_group<L>(a, turns.group(turn)); };
    const auto kept = [&](int turn) { return L::places(reduction.end()).from(turn % 2 == 1 && lag ? (int)a.held : 0); };
    const auto ask = [&](int turn) {
        const long long c = own_channel(turn);
        Valid valid = {rows.count, held};
        if (turn < turns.count && c < a.channels) {
            const Arguments<L> group = group_of(turn);
            const auto* const x = group.x + c * a.x_channel;
            if (a.masked)
                valid = copy_valid_rows<L>(rows, kept(turn), (int)a.held, {group.mask, a.mask_outer}, x, a.x_outer);
            else
                copy_rows<L>(rows, kept(turn), held, x, a.x_outer);
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
            const bool odd = turn % 2 == 1;
            sum_slice<L>(group_of(turn), rows, own_channel(turn), kept(turn), valid, odd, reduction);
            const PartialMoments<L> slice = {a, rows, reduction, turns.group(turn), first_channel(turn), odd};
            token =
                (token & BARRIER_PHASE >> 1) | (reduction.merge(a.partial, a.barrier_counter, slice) & BARRIER_PHASE);
        }
        const int written = turn - lag;
        if (written >= 0) {
            const Arguments<L> group = group_of(written);
            reduction.wait(a.barrier_counter, written % 2 == 1, lag ? token << 1 : token);
            share_channels<L>(group, first_channel(written), reduction);
            if (own_channel(written) < a.channels) {
                Affine<A> channels[THREAD_CHANNELS];
                load_maps(channels, reduction.slots + L::own(), width);
                write_rows<L>(group, rows, own_channel(written), kept(written), lag ? valid_before : valid.count,
                              channels);
            }
        }
        valid_before = valid.count;
        valid = ask(turn + 1);
    }
}

// count: elements of a row, channels or positions along inner.
#define BATCH_NORM_FORWARD_COOPERATIVE(variant, suffix, T, count, channels_last)                      \
    BNK_KERNEL(bnk_batch_norm_forward_##variant##_##suffix, (BatchNormForwardCooperative<T>), 256, 2, \
               (batch_norm_forward_cooperative<Layout<T, count, channels_last>>))

BATCH_NORM_FORWARD_COOPERATIVE(cooperative, f32, float, 4, true)
BATCH_NORM_FORWARD_COOPERATIVE(cooperative_inner, f32, float, 4, false)
BATCH_NORM_FORWARD_COOPERATIVE(cooperative_single, f32, float, 1, true)
BATCH_NORM_FORWARD_COOPERATIVE(cooperative_inner_single, f32, float, 1, false)
BATCH_NORM_FORWARD_COOPERATIVE(cooperative, f16, Float16, 8, true)
BATCH_NORM_FORWARD_COOPERATIVE(cooperative_inner, f16, Float16, 8, false)
BATCH_NORM_FORWARD_COOPERATIVE(cooperative_pair, f16, Float16, 2, true)
BATCH_NORM_FORWARD_COOPERATIVE(cooperative_inner_pair, f16, Float16, 2, false)
BATCH_NORM_FORWARD_COOPERATIVE(cooperative_single, f16, Float16, 1, true)
BATCH_NORM_FORWARD_COOPERATIVE(cooperative_inner_single, f16, Float16, 1, false)
BATCH_NORM_FORWARD_COOPERATIVE(cooperative, bf16, BFloat16, 8, true)
BATCH_NORM_FORWARD_COOPERATIVE(cooperative_inner, bf16, BFloat16, 8, false)
BATCH_NORM_FORWARD_COOPERATIVE(cooperative_pair, bf16, BFloat16, 2, true)
BATCH_NORM_FORWARD_COOPERATIVE(cooperative_inner_pair, bf16, BFloat16, 2, false)
BATCH_NORM_FORWARD_COOPERATIVE(cooperative_single, bf16, BFloat16, 1, true)
BATCH_NORM_FORWARD_COOPERATIVE(cooperative_inner_single, bf16, BFloat16, 1, false)
BATCH_NORM_FORWARD_COOPERATIVE(cooperative_single, f64, double, 1, true)
BATCH_NORM_FORWARD_COOPERATIVE(cooperative_inner_single, f64, double, 1, false)
