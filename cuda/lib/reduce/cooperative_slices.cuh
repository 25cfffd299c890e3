// Slices of channels whose rows several blocks share: ownership of rows, and reduction over threads and blocks.
//
// The grid is (columns, splits). The blocks of a column, `splits` of them, share the rows of a slice of channels in a
// group; the columns take slices and groups in turn. With more than one split the launch is cooperative, so that all
// blocks are resident and may wait for each other. A row is what a thread accesses at once: COUNT neighbouring channels
// of an example (CHANNELS_LAST), or COUNT neighbouring positions of one channel. Worker y of split g, the threads with
// threadIdx.y = y, is worker g * blockDim.y + y of the slice; the workers take the rows in turn, as in rows.cuh.
//
// A pipeline of one or two stages: a thread copies the rows of a slice into its own places in shared memory, sums them
// and has the sums merged; then it waits for the result and writes the rows. With two stages it sums the next slice
// before that wait, and the rows of that one were on their way while it wrote the slice before.
#pragma once

#include "lib/numbers/pair.cuh"
#include "lib/numbers/range.cuh"
#include "lib/numbers/vector.cuh"
#include "lib/reduce/warp.cuh"
#include "lib/sync/async_copy.cuh"
#include "lib/sync/grid_barrier.cuh"

constexpr int COOPERATIVE_FAN_IN = 8;  // partial results that one thread merges

// Elements of a row, and where they lie.
template <typename T_, int COUNT_, bool CHANNELS_LAST_>
struct Layout {
    using T = T_;
    using A = typename Packed<T>::Number;  // accumulator
    static constexpr int COUNT = COUNT_;
    static constexpr bool CHANNELS_LAST = CHANNELS_LAST_;
    static constexpr int THREAD_CHANNELS = CHANNELS_LAST ? COUNT : 1;  // channels of a thread
    using RowVector = Words<COUNT*(int)sizeof(T)>;
    using Kept = ThreadPlaces<RowVector>;

    // Threads that share a row of all channels of a slice, and which of them this is.
    static __device__ __forceinline__ int threads() { return CHANNELS_LAST ? blockDim.x : 1; }
    static __device__ __forceinline__ int thread() { return CHANNELS_LAST ? threadIdx.x : 0; }
    // Channels of a slice, and the thread's first among them.
    static __device__ __forceinline__ int width() { return threads() * THREAD_CHANNELS; }
    static __device__ __forceinline__ int own() { return thread() * THREAD_CHANNELS; }

    static __device__ __forceinline__ Kept places(void* shared) {
        return {static_cast<RowVector*>(shared) + threadIdx.y * threads() + thread(), threads() * (int)blockDim.y};
    }
};

// The turns of a column: all groups of a slice, in ascending order, then those of its next slice. Where there are more
// columns than slices, `runs` of them share the groups of a slice: each takes every runs-th, and has that slice alone.
struct Turns {
    int columns, runs, run;  // columns: for the slices of one run
    int groups, count;       // groups: of the run

    __device__ __forceinline__ Turns(long long channels, int width, long long all_groups) {
        const int slices = (int)((channels + width - 1) / width);
        runs = all_groups > 1 ? max((int)gridDim.x / slices, 1) : 1;
        columns = gridDim.x / runs;
        run = runs == 1 ? 0 : (int)blockIdx.x / columns;
        groups = all_groups > 1 ? (int)((all_groups - run - 1) / runs) + 1 : 1;
        count = ((slices - column() - 1) / columns + 1) * groups;
    }

    // The block's column of its run.
    __device__ __forceinline__ int column() const { return blockIdx.x - run * columns; }

    __device__ __forceinline__ long long slice(int turn) const {
        return column() + (long long)(turn / groups) * columns;
    }
    __device__ __forceinline__ long long group(int turn) const { return run + (long long)(turn % groups) * runs; }
};

// Moves an array, which may be null, from the first group to another.
template <typename T>
__device__ __forceinline__ void move(T*& array, long long distance) {
    if (array) array += distance;
}

constexpr int MASK_ROWS = 16;  // rows whose bytes of a mask a thread has in flight

// A mask of a group: a byte for each index of the outer axis.
struct Mask {
    const char* bytes;
    long long outer_stride;
};

// Rows of a thread that count: all, or those that a mask leaves. The first of them are kept on the chip, as many as it
// holds, and the others are among the thread's rows from number `rest` on.
struct Valid {
    int count, rest;
};

// The rows of a thread, and their places in the tensor: fewer than 2^31 rows, outer strides of less than 2^32 bytes.
template <typename L>
struct ThreadRows {
    using A = typename L::A;
    static constexpr int COUNT = L::COUNT;
    static constexpr bool CHANNELS_LAST = L::CHANNELS_LAST;

    // A row by its outer index and its inner one, which counts vectors.
    struct Row {
        int outer, index;
    };

    int inner, rounds, longer;   // inner axis in vectors; all workers have `rounds` rows, the first `longer` one more
    int worker, workers, count;  // count: the thread's rows, at least one
    Row first, last, step;       // the thread's first row, its last, and from each to the next

    __device__ __forceinline__ ThreadRows(long long outer, long long inner_length)
        : inner(CHANNELS_LAST ? 1 : (int)(inner_length / COUNT)),
          worker(blockIdx.y * blockDim.y + threadIdx.y),
          workers(gridDim.y * blockDim.y) {
        const int rows = (int)outer * inner;
        rounds = rows / workers;
        longer = rows - rounds * workers;
        count = rounds + (worker < longer);
        first = row(0);
        last = row(count - 1);
        step = split(workers);
    }

    __device__ __forceinline__ Row split(int row) const {
        if (CHANNELS_LAST) return {row, 0};
        return {row / inner, row % inner};
    }

    // The thread's last row: not kept where it is found at once.
    __device__ __forceinline__ Row last_row() const {
        return CHANNELS_LAST ? Row{worker + (count - 1) * workers, 0} : last;
    }

    // The thread's row i.
    __device__ __forceinline__ Row row(int i) const { return split(worker + i * workers); }

    // Bits of `number` rows, at most MOST, that the mask does not exclude, from `row` on or, with BACK, from it back.
    template <int MOST, bool BACK>
    __device__ __forceinline__ unsigned valid(const Mask& mask, Row row, int number) const {
        char bytes[MOST] = {};
#pragma unroll
        for (int i = 0; i < MOST; ++i)
            if (i < number) {
                bytes[i] = mask.bytes[row.outer * mask.outer_stride];
                BACK ? retreat(row) : advance(row);
            }
        unsigned bits = 0;
#pragma unroll
        for (int i = 0; i < MOST; ++i) bits |= (bytes[i] != 0 ? 1u : 0u) << i;
        return bits;
    }

    // Goes to the thread's next row, or back.
    __device__ __forceinline__ void advance(Row& row) const {
        row.outer += step.outer;
        if (CHANNELS_LAST) return;
        ++row.outer;
        row.index += step.index - inner;
        if (row.index < 0) {
            row.index += inner;
            --row.outer;
        }
    }
    __device__ __forceinline__ void retreat(Row& row) const {
        row.outer -= step.outer;
        if (CHANNELS_LAST) return;
        row.index -= step.index;
        if (row.index < 0) {
            row.index += inner;
            --row.outer;
        }
    }

    // The place of a row in an array that begins at the slice's first channel; the inner stride is 1.
    template <typename Element>
    __device__ __forceinline__ Element* at(Element* channel, long long outer_stride, const Row& row) const {
        unsigned stride = (unsigned)outer_stride * (unsigned)sizeof(Element);
        asm volatile("" : "+r"(stride));  // else the compiler widens it before the loop, and multiplies 64 bits
        const unsigned long long offset = (unsigned long long)(unsigned)row.outer * stride;
        const unsigned index = CHANNELS_LAST ? 0u : (unsigned)row.index;
        return reinterpret_cast<Element*>((unsigned long long)channel + offset +
                                          index * (unsigned long long)sizeof(typename L::RowVector));
    }

    // Calls work(number) for the thread's rows from the last, `row`, on, back to its first, with the number of each
    // among those that the mask leaves, or -1; these are `count`. The work goes back a row.
    template <typename Work>
    __device__ __forceinline__ void descend(const Mask& mask, Row& row, int valid_count, const Work& work) const {
        int left = valid_count;
#pragma unroll 1
        for (int rows_left = count; rows_left > 0; rows_left -= MASK_ROWS) {
            const int number = min(MASK_ROWS, rows_left);
            const unsigned bits = valid<MASK_ROWS, true>(mask, row, number);
#pragma unroll 1
            for (int i = 0; i < number; ++i) work((bits >> i & 1u) != 0 ? --left : -1);
        }
    }

    // Number of values of a channel in a block.
    __device__ __forceinline__ A values(int block) const {
        const int own = blockDim.y, more = min(max(longer - block * own, 0), own);
        return A(CHANNELS_LAST ? 1 : COUNT) * fma(A(rounds), A(own), A(more));
    }
    // The same in so many rows.
    __device__ __forceinline__ A values_of(unsigned rows) const { return A(CHANNELS_LAST ? 1 : COUNT) * A(rows); }
};

// Asks for the thread's first rows of one array or two, without waiting, into its places in shared memory: those of the
// second array lie `apart` behind those of the first.
template <typename L, int ARRAYS = 1>
__device__ __forceinline__ void copy_rows(const ThreadRows<L>& rows, const typename L::Kept& kept, int count,
                                          const typename L::T* channel, long long outer_stride,
                                          const typename L::T* second = nullptr, long long second_stride = 0,
                                          int apart = 0) {
    constexpr int BYTES = sizeof(typename L::RowVector);
    auto row = rows.first;
    auto* to = kept.own;
#pragma unroll 4
    for (int i = 0; i < count; ++i, to += kept.threads, rows.advance(row)) {
        copy_async<BYTES>(to, rows.at(channel, outer_stride, row));
        if (ARRAYS == 2) copy_async<BYTES>(to + apart * kept.threads, rows.at(second, second_stride, row));
    }
}

// The same for the rows that a mask leaves, whose places are side by side too: at most `most` of them.
template <typename L, int ARRAYS = 1>
__device__ __forceinline__ Valid copy_valid_rows(const ThreadRows<L>& rows, const typename L::Kept& kept, int most,
                                                 const Mask& mask, const typename L::T* channel, long long outer_stride,
                                                 const typename L::T* second = nullptr, long long second_stride = 0,
                                                 int apart = 0) {
    constexpr int BYTES = sizeof(typename L::RowVector);
    auto row = rows.first;
    Valid valid = {0, rows.count};
    int held = 0;
#pragma unroll 1
    for (int first = 0; first < rows.count; first += MASK_ROWS) {
        const int number = min(MASK_ROWS, rows.count - first);
        const unsigned bits = rows.template valid<MASK_ROWS, false>(mask, row, number);
        valid.count += __popc(bits);
#pragma unroll 1
        for (int i = 0; i < number; ++i, rows.advance(row)) {
            if ((bits >> i & 1u) == 0 || held == most) continue;
            auto* const to = &kept[held];
            copy_async<BYTES>(to, rows.at(channel, outer_stride, row));
            if (ARRAYS == 2) copy_async<BYTES>(to + apart * kept.threads, rows.at(second, second_stride, row));
            if (++held == most) valid.rest = first + i + 1;
        }
    }
    return valid;
}

// Sum of what the elements of rows have summed apart for the thread's channel i: one of them, or all along inner.
template <int THREAD_CHANNELS, int COUNT, typename A>
__device__ __forceinline__ A of_channel(const A (&elements)[COUNT], int i) {
    A sum = elements[i];
#pragma unroll
    for (int j = 1; j < COUNT / THREAD_CHANNELS; ++j) sum += elements[j];
    return sum;
}

// Sums of many rows for the thread's channels: as of a few rows they grow in pairs.
template <typename A, int THREAD_CHANNELS>
struct LongSums {
    Pair<A> sums[THREAD_CHANNELS];

    __device__ __forceinline__ explicit LongSums(const A (&first)[THREAD_CHANNELS]) {
#pragma unroll
        for (int i = 0; i < THREAD_CHANNELS; ++i) sums[i] = {first[i], A(0)};
    }
    // Adds what the elements of some rows have summed apart.
    template <int COUNT>
    __device__ __forceinline__ void add_rows(const A (&elements)[COUNT]) {
#pragma unroll
        for (int i = 0; i < THREAD_CHANNELS; ++i) sums[i] = add(sums[i], of_channel<THREAD_CHANNELS>(elements, i));
    }
    __device__ __forceinline__ void store(A (&to)[THREAD_CHANNELS]) const {
#pragma unroll
        for (int i = 0; i < THREAD_CHANNELS; ++i) to[i] = value(sums[i]);
    }
};

// Reduction of a slice's sums over workers and splits. All threads must call.
//
// A block's result has Partial::QUANTITIES numbers a channel. Partial knows whether the turn is odd, and has three
// functions. of_block(channel, to, pitch) writes the numbers of a channel from the block's sums in slot 0, `pitch`
// apart. add_blocks(to, to_pitch, partials, pitch, first, last) sums what the blocks first ... last - 1 have written,
// each Partial::QUANTITIES `pitch` behind the one before. conclude(channel, merged, pitch) gets the sums over all
// blocks, or of_block's numbers if there is one block.
template <typename L>
struct SliceReduction {
    using A = typename L::A;
    static constexpr int SUMMING = 32;  // threads, at most, that sum the results of the blocks, for each channel

    // The first of four words; the second says whether the block was the last to arrive, the last two count rows that
    // a mask leaves.
    unsigned* flag;
    A* extra;  // numbers of the kernel's own
    A* slots;  // [2][worker][channel of the slice]
    int width, plane;
    int channel, part;  // in the reduction a thread has one channel of the slice, of which it is a part

    // `extra_numbers` for each channel.
    __device__ __forceinline__ SliceReduction(A* shared, int extra_numbers)
        : flag(reinterpret_cast<unsigned*>(shared)),
          extra(shared + 16 / sizeof(A)),
          slots(extra + (extra_numbers * L::width() + 3) / 4 * 4),
          width(L::width()),
          plane(width * blockDim.y),
          channel(threadIdx.y % L::THREAD_CHANNELS * L::threads() + L::thread()),
          part(threadIdx.y / L::THREAD_CHANNELS) {}

    // Threads that share a channel in the reduction.
    __device__ __forceinline__ int parts() const { return blockDim.y / L::THREAD_CHANNELS; }

    // Shared memory behind the slots.
    __device__ __forceinline__ A* end() const { return slots + 2 * plane; }

    // Place of the thread's sums, for channel `own` of the slice.
    __device__ __forceinline__ A* slot(int own) const { return slots + threadIdx.y * width + own; }

    // Number of rows that a mask leaves, in turns of one parity: of the block, in the last block then of all.
    __device__ __forceinline__ unsigned* valid(bool odd) const { return flag + 2 + odd; }

    // Counts those of the block, of a worker `own`; between barriers. Nobody needs those of the turn before any more.
    __device__ __forceinline__ void count_valid(bool odd, int own) const {
        if (L::thread() == 0) atomicAdd(valid(odd), (unsigned)own);
        if (L::thread() == 0 && threadIdx.y == 0) *valid(!odd) = 0;
    }

    // Where the blocks of the column leave their numbers of such rows, in `counts` [2][column][split].
    __device__ __forceinline__ static unsigned* of_column(unsigned* counts, bool odd) {
        return counts + ((odd ? gridDim.x : 0) + blockIdx.x) * gridDim.y;
    }

    // Leaves that of the block, and adds what other blocks of some have left; integers, so that any order will do.
    __device__ __forceinline__ void leave_valid(unsigned* counts, bool odd) const {
        if (channel == 0 && gridDim.y > 1) of_column(counts, odd)[blockIdx.y] = *valid(odd);
    }
    __device__ __forceinline__ void add_valid(unsigned* counts, bool odd, int first, int last) const {
        if (channel > 0) return;
        unsigned sum = 0;
        for (int block = first; block < last; ++block)
            if (block != blockIdx.y) sum += of_column(counts, odd)[block];
        atomicAdd(valid(odd), sum);
    }

    // Sum over slots [quantity][slot][channel] into slot 0, the quantities `pitch` apart. COMPENSATED: of the first
    // quantity, of either sign, a merge keeps what its additions lose.
    template <int QUANTITIES, bool COMPENSATED>
    __device__ __forceinline__ void sum(int count, int pitch) const {
#pragma unroll 1
        for (int step = 1; step < count; step *= COOPERATIVE_FAN_IN) {
            __syncthreads();
            if (part >= parts()) continue;
#pragma unroll 1
            for (int slot = part * step * COOPERATIVE_FAN_IN; slot < count;
                 slot += parts() * step * COOPERATIVE_FAN_IN) {
                A* const to = slots + slot * width + channel;
                const A* from = to;
                A sums[QUANTITIES] = {}, lost = A(0);
                const auto add = [&] {
                    const Pair<A> first = two_sum(sums[0], from[0]);
                    sums[0] = first.high;
                    if (COMPENSATED) lost += first.low;
#pragma unroll
                    for (int i = 1; i < QUANTITIES; ++i) sums[i] += from[i * pitch];
                    from += step * width;
                };
                if (slot + (COOPERATIVE_FAN_IN - 1) * step < count) {
#pragma unroll
                    for (int i = 0; i < COOPERATIVE_FAN_IN; ++i) add();
                } else {
#pragma unroll 1
                    for (int i = slot; i < count; i += step) add();
                }
                to[0] = value(Pair<A>{sums[0], lost});
#pragma unroll
                for (int i = 1; i < QUANTITIES; ++i) to[i * pitch] = sums[i];
            }
        }
        __syncthreads();
    }

    // Sums two numbers of every worker into slot 0. A few hundred numbers of 16 bits each lose next to nothing.
    __device__ __forceinline__ void sum_block() const {
        if constexpr (L::CHANNELS_LAST)
            sum<2, (L::COUNT < 8)>(blockDim.y, plane);
        else
            sum_warps();
    }

    // The same along inner, where neighbouring threads are workers: the sum of a warp is in the slot of its first.
    __device__ __forceinline__ void sum_warps() const {
        const int lane = threadIdx.y % WARP, warps = blockDim.y / WARP;
        A *const first = slots + threadIdx.y, *const second = first + plane;
        A sums[2] = {warp_sum(*first), warp_sum(*second)};
        if (lane == 0) *first = sums[0], *second = sums[1];
        __syncthreads();
        if (threadIdx.y < WARP) {
#pragma unroll
            for (int i = 0; i < 2; ++i) sums[i] = warp_sum(lane < warps ? slots[i * plane + lane * WARP] : A(0));
            if (lane == 0) *first = sums[0], *second = sums[1];
        }
        __syncthreads();
    }

    // Where the blocks of the column leave their results, in the workspace of 1 MiB: `partial` is
    // [2][column][split][quantity][channel], used alternately, as the two counters of a barrier are: with two stages a
    // block may be a slice ahead of another.
    template <typename Partial>
    __device__ __forceinline__ A* partials(A* partial, bool odd) const {
        return partial + ((odd ? gridDim.x : 0) + blockIdx.x) * gridDim.y * Partial::QUANTITIES * width;
    }

    // Merges over the splits: the last block of the column to come here does it. Returns the token that `wait` takes.
    template <typename Partial>
    __device__ __forceinline__ unsigned merge(A* partial, unsigned* barrier_counter, const Partial& slice) const {
        constexpr int QUANTITIES = Partial::QUANTITIES;
        const int blocks = gridDim.y;
        A* const partials = this->template partials<Partial>(partial, slice.odd);
        A* const own = blocks > 1 ? partials + blockIdx.y * QUANTITIES * width : slots;
        if (part == 0) slice.of_block(channel, own + channel, width);
        unsigned* const counter = counter_of(barrier_counter, slice.odd);
        unsigned token = 0;
        int pitch = width;
        if (blocks > 1) {
            if (!arrive_last(counter, blocks, token, flag + 1)) return token;
            const int room = 2 * (int)blockDim.y / QUANTITIES;  // the rows that follow are still to be written
            const int summing = min(min(min(parts(), SUMMING), room), blocks);
            const int share = (blocks + summing - 1) / summing;
            pitch = width * summing;
            if (part < summing)
                slice.add_blocks(slots + part * width + channel, pitch, partials + channel, width, part * share,
                                 min((part + 1) * share, blocks));
            sum<QUANTITIES, true>(summing, pitch);
        }
        if (part == 0) slice.conclude(channel, slots + channel, pitch);
        if (blocks > 1) open(counter, blocks);
        return token;
    }

    // Waits until what the last block concluded can be read, and all threads have done with the slots.
    __device__ __forceinline__ void wait(unsigned* barrier_counter, bool odd, unsigned token) const {
        if (gridDim.y > 1)
            ::wait(counter_of(barrier_counter, odd), token);
        else
            __syncthreads();
    }

    __device__ __forceinline__ static unsigned* counter_of(unsigned* barrier_counter, bool odd) {
        return barrier_counter + blockIdx.x * BARRIER_PITCH + odd;
    }
};
