// Gradients of layer norm, RMS norm or group norm of long rows, each shared by several blocks, in one launch.
//
// Formulas:  as in layer_norm_backward.cu.
// Arrays:    dy, x, dx, gamma, beta, statistics, dgamma, dbeta as in layer_norm_backward.cu. partial (groups, 2, 2, C)
//            of A: the sums of dgamma and dbeta of every group, high and low parts of pairs. exchange (2, groups,
//            splits, at_once, 2) of A: the sums that blocks find in rows, unused by a single one. barrier_counter: one
//            for every group and one for every split, see lib/sync/grid_barrier.cuh.
// Launch:    Block (threads, 1, 1), threads a multiple of 128. Grid (groups, splits, 1), see
//            lib/reduce/shared_rows.cuh. `groups` is a multiple of G: group b takes rows of group b mod G of the
//            channels; cooperative if these have more than one block. Every block has columns: `part` of them, a whole
//            number of vectors, or what is left of the row. Blocks wait for one another once for `at_once` rows.
//            Dynamic shared memory: 4 numbers of type A for every warp; for every thread, `held` vectors of dy and of
//            x, 1 to MOST_HELD, of each of these rows, and with two stages of the next ones, on their way. One stage
//            and one row at once if a span is not all. Variants: as in layer_norm_backward.cu; of channels that come
//            last one block is resident on a multiprocessor, of others two.
// Traffic:   dy and x read once and dx written once as long as all columns are held; the others are read twice. gamma
//            and beta from the cache. Partial sums: 4 C words of every group, written once and read once, and again for
//            every ROWS_IN_REGISTERS rows behind the first ones, or for every row if not all columns are held. Every
//            warp reads 8 splits bytes of sums a row, of float64 16.
// Numerics:  In A, as in layer_norm_backward.cu; partial sums are pairs. The sums of a row are added by span, warp and
//            block, groups in ascending order: deterministic.
// Reference: Ba, Kiros and Hinton, Layer Normalization, 2016, arXiv:1607.06450; Zhang and Sennrich, Root Mean Square
//            Layer Normalization, 2019, arXiv:1910.07467.
// Called by: bnkernels/ops/layer_norm/op.py
#include "lib/kernel.cuh"
#include "lib/numbers/pair.cuh"
#include "lib/reduce/row_gradients.cuh"
#include "lib/reduce/shared_rows.cuh"
#include "lib/reduce/warp.cuh"

template <typename T>
constexpr int MOST_HELD = sizeof(T) == 2   ? 2
                          : sizeof(T) == 4 ? 3
                                           : 4;

// scaled: by gamma, shifted: by beta, as ParameterKind. centred: 0 for RMS norm. channel_groups, inner: G and I.
// adjacent: D if channels come last, else 0. half_share: 1 / (2 C).
template <typename T, typename A>
struct LayerNormBackwardCooperative {
    const T* dy;
    const T* x;
    const void* gamma;
    const void* beta;
    const A* statistics;
    T* dx;
    void* dgamma;
    void* dbeta;
    A* partial;
    A* exchange;
    unsigned* barrier_counter;
    long long rows, columns, part;
    A alpha, half_share;
    int activation, shape, scaled, shifted, centred, channel_groups, inner, held, stages, at_once, adjacent;
};

// Adds the terms of all units, and clears them. A rare path: rolled, so that it takes no registers of the others.
template <typename T, typename A, int HELD>
__device__ __forceinline__ void add_terms(const GroupSums<A>& sums, const RowUnits<T>& units, long long column,
                                          ColumnTerms<T, A> (&terms)[HELD], bool first, int quantities) {
#pragma unroll 1
    for (int k = 0; k < HELD; ++k) {
        const long long own = column + units.column + k * units.step;
#pragma unroll 1
        for (int i = 0; i < UNIT<T>; ++i) {
            if (units.has_unit(k) && units.has(k, i)) {
                sums.add_term(DGAMMA, own + i, terms[0].dgamma[0], first);
                if (quantities == 2) sums.add_term(DBETA, own + i, terms[0].dbeta[0], first);
            }
            rotate(terms[0].dgamma);
            rotate(terms[0].dbeta);
        }
        terms[0] = {};
        rotate(terms);
    }
}

// A block's share of the rows.
template <bool CURVED, typename Units, typename T, typename A>
struct RowShare {
    using Arguments = LayerNormBackwardCooperative<T, A>;
    using Row = RowGradients<CURVED, MOST_HELD<T>, Units, Arguments, true>;
    const Arguments& a;
    const BlockColumns<T> own;
    const ThreadVectors places;
    const GroupSums<A> sums;

    __device__ __forceinline__ RowShare(const Arguments& a, A* shared)
        : a(a),
          own(a.columns, a.part, a.held, a.shape),
          places(shared + 4 * blockDim.x / WARP),
          sums{a.partial, a.columns} {}

    // Not a member: registers are few.
    __device__ __forceinline__ GroupRows rows() const { return GroupRows(a); }

    // A span of row n of the group's, which is number `i` of its turn.
    __device__ __forceinline__ Row row(long long n, int i, int span, int turn,
                                       const RowStatistics<A>& statistics) const {
        const int stage = (a.stages == 2 && turn % 2 ? a.at_once : 0) + i;
        return Row(a, Units::of_span(a, own, span), places.from(2 * stage * a.held), rows().row(n), own.first(span),
                   statistics);
    }

    // First row of a turn of the group.
    __device__ __forceinline__ long long first_row(int turn) const {
        return ((long long)turn * rows().blocks + rows().block) * a.at_once;
    }

    // Begins to copy the rows of a turn, which are held as a whole.
    __device__ __forceinline__ void ask(int turn) const {
#pragma unroll 1
        for (int i = 0; i < a.at_once; ++i) row(first_row(turn) + i, i, 0, turn, {}).ask();
    }

    // Sums of a row of a turn over the thread's columns, which add their terms. All threads must call.
    __device__ __forceinline__ void add_row(A (&of_row)[2], ColumnTerms<T, A> (&terms)[MOST_HELD<T>], int i,
                                            int turn) const {
        const int spans = own.spans, summed = turn * a.at_once + i + 1;
        const long long n = first_row(turn) + i;
        const bool last = i + 1 == a.at_once && first_row(turn + 1) >= rows().all;
        const RowStatistics<A> statistics = statistics_of(a, rows().row(n));
        of_row[0] = of_row[1] = A(0);
#pragma unroll 1
        for (int span = 0; span < spans; ++span) {
            const Row part = row(n, i, span, turn, statistics);
            if (a.stages == 1) {
                part.ask();
                wait_for_copies<0>();
            }
            part.add(of_row, terms);
            if (spans > 1 || last || summed % ROWS_IN_REGISTERS == 0)
                add_terms(sums, part.units, part.column, terms, summed <= (spans > 1 ? 1 : ROWS_IN_REGISTERS),
                          quantities(a));
        }
        // Another thread may still read the scratch of the row before.
        BNK_DYNAMIC_SHARED(A, scratch);
        sums_of_row(a, of_row, blockDim.x, scratch + summed % 2 * 2 * blockDim.x / WARP);
    }

    // Sums of row `i` of a turn over the blocks that show them.
    __device__ __forceinline__ void add_blocks(A (&of_row)[2], const A* shown, int i) const {
        of_row[0] = of_row[1] = A(0);
#pragma unroll 1
        for (int split = threadIdx.x % WARP; split < gridDim.y; split += WARP) {
            const A* const from = shown + (split * a.at_once + i) * 2;
            of_row[0] += from[0];
            of_row[1] += from[1];
        }
        of_row[0] = warp_sum(of_row[0]);
        of_row[1] = warp_sum(of_row[1]);
    }

    // The column sums of the group's rows, and their dx.
    __device__ __forceinline__ void differentiate() const {
        const GroupExchange<A> group = {a.exchange, a.barrier_counter, 2 * a.at_once};
        const int spans = own.spans;
        ColumnTerms<T, A> terms[MOST_HELD<T>] = {};
        if (a.stages == 2) ask(0);
        A of_row[2];
#pragma unroll 1
        for (int turn = 0; first_row(turn) < rows().all; ++turn) {  // the same in all blocks of a group
            if (a.stages == 2) {
                ask(turn + 1);
                wait_for_copies<1>();
            }
#pragma unroll 1
            for (int i = 0; i < a.at_once; ++i) {
                add_row(of_row, terms, i, turn);
                if (gridDim.y > 1 && threadIdx.x == 0) {
                    group.own(turn)[2 * i] = of_row[0];
                    group.own(turn)[2 * i + 1] = of_row[1];
                }
            }
            if (gridDim.y > 1) group.wait();
#pragma unroll 1
            for (int i = 0; i < a.at_once; ++i) {
                const long long n = first_row(turn) + i;
                const RowStatistics<A> statistics = statistics_of(a, rows().row(n));
                if (gridDim.y > 1) add_blocks(of_row, group.shown(turn), i);
#pragma unroll 1
                for (int span = spans - 1; span >= 0; --span) {
                    const Row part = row(n, i, span, turn, statistics);
                    if (span < spans - 1) {
                        part.ask();
                        wait_for_copies<0>();
                    }
                    part.write(of_row);
                }
            }
        }
        wait_for_copies<0>();
    }

    // Merges the column sums of the groups with the same channels; each column by one block of its split.
    __device__ __forceinline__ void merge_groups() const {
        if (a.inner > 1) return merge_channels();
        if (rows().blocks > 1)
            grid_barrier(a.barrier_counter + blockIdx.y * BARRIER_PITCH + 1, gridDim.x, blockIdx.x);
        else
            __syncthreads();
        const long long first = own.begin + rows().block * blockDim.x + threadIdx.x, place = rows().group * a.columns;
#pragma unroll 1
        for (long long column = first; column < own.first(own.spans); column += rows().blocks * blockDim.x) {
            store_sum<T>(a, DGAMMA, place + column, value(of_all_groups(DGAMMA, column)));
            if (quantities(a) == 2) store_sum<T>(a, DBETA, place + column, value(of_all_groups(DBETA, column)));
        }
    }

    __device__ __forceinline__ Pair<A> of_all_groups(int quantity, long long column) const {
        return sums.of_all_groups(quantity, column, rows().group, rows().groups);
    }

    // The same for channels of several columns, which may be those of two splits: each channel by one block.
    __device__ __forceinline__ void merge_channels() const {
        BNK_DYNAMIC_SHARED(A, scratch);
        const int sharers = rows().blocks * gridDim.y, warp = threadIdx.x / WARP;
        if (sharers > 1)
            grid_barrier(a.barrier_counter + 1, gridDim.x * gridDim.y, blockIdx.y * gridDim.x + blockIdx.x);
        else
            __syncthreads();
        const long long channels = a.columns / a.inner;
#pragma unroll 1
        for (long long item = rows().block * gridDim.y + blockIdx.y; item < channels * quantities(a); item += sharers) {
            const long long channel = item % channels;
            const int quantity = (int)(item / channels);
            Pair<A> sum = {A(0), A(0)};
#pragma unroll 4
            for (int i = threadIdx.x; i < a.inner; i += blockDim.x)
                sum = add(sum, of_all_groups(quantity, Units::column_of(channel, i, a.inner, channels)));
            sum = warp_sum(sum);
            if (threadIdx.x % WARP == 0) {
                scratch[2 * warp] = sum.high;
                scratch[2 * warp + 1] = sum.low;
            }
            __syncthreads();
            if (threadIdx.x == 0) {
                for (int i = 1; i < blockDim.x / WARP; ++i) sum = add(sum, Pair<A>{scratch[2 * i], scratch[2 * i + 1]});
                store_sum<T>(a, quantity, rows().group * channels + channel, value(sum));
            }
            __syncthreads();
        }
    }
};

template <bool CURVED, typename Units, typename T, typename A>
__device__ __forceinline__ void layer_norm_backward_cooperative(const LayerNormBackwardCooperative<T, A>& arguments) {
    BNK_DYNAMIC_SHARED(A, shared);
    LayerNormBackwardCooperative<T, A> a = arguments;
    take_constants(a);
    const RowShare<CURVED, Units, T, A> share(a, shared);
    share.differentiate();
    share.merge_groups();
}

#define LAYER_NORM_BACKWARD_COOPERATIVE(variant, suffix, curved, T, A)                                                 \
    BNK_KERNEL(bnk_layer_norm_backward_cooperative_##variant##_##suffix, (LayerNormBackwardCooperative<T, A>), 256, 2, \
               (layer_norm_backward_cooperative<curved, RowUnits<T>, T, A>))

LAYER_NORM_BACKWARD_COOPERATIVE(linear, f32, false, float, float)
LAYER_NORM_BACKWARD_COOPERATIVE(linear, f16, false, Float16, float)
LAYER_NORM_BACKWARD_COOPERATIVE(linear, bf16, false, BFloat16, float)
LAYER_NORM_BACKWARD_COOPERATIVE(linear, f64, false, double, double)
LAYER_NORM_BACKWARD_COOPERATIVE(curved, f32, true, float, float)
LAYER_NORM_BACKWARD_COOPERATIVE(curved, f16, true, Float16, float)
LAYER_NORM_BACKWARD_COOPERATIVE(curved, bf16, true, BFloat16, float)
LAYER_NORM_BACKWARD_COOPERATIVE(curved, f64, true, double, double)

#define LAYER_NORM_BACKWARD_COOPERATIVE_LAST(variant, suffix, curved, T, A)                                         \
    BNK_KERNEL(bnk_layer_norm_backward_cooperative_##variant##_last_##suffix, (LayerNormBackwardCooperative<T, A>), \
               256, 1, (layer_norm_backward_cooperative<curved, LastUnits<T>, T, A>))

LAYER_NORM_BACKWARD_COOPERATIVE_LAST(linear, f32, false, float, float)
LAYER_NORM_BACKWARD_COOPERATIVE_LAST(linear, f16, false, Float16, float)
LAYER_NORM_BACKWARD_COOPERATIVE_LAST(linear, bf16, false, BFloat16, float)
LAYER_NORM_BACKWARD_COOPERATIVE_LAST(linear, f64, false, double, double)
LAYER_NORM_BACKWARD_COOPERATIVE_LAST(curved, f32, true, float, float)
LAYER_NORM_BACKWARD_COOPERATIVE_LAST(curved, f16, true, Float16, float)
LAYER_NORM_BACKWARD_COOPERATIVE_LAST(curved, bf16, true, BFloat16, float)
LAYER_NORM_BACKWARD_COOPERATIVE_LAST(curved, f64, true, double, double)
