// Layer norm, RMS norm or group norm of long rows, each shared by several blocks, in one launch.
//
// Formulas:  as in layer_norm_forward.cu.
// Arrays:    x, y, gamma, beta, statistics as in layer_norm_forward.cu. exchange (2, groups, splits, 3) of A: the
//            moments that blocks find, unused by a single one. barrier_counter: one for every group, see
//            lib/sync/grid_barrier.cuh.
// Launch:    Block (threads, 1, 1), threads a multiple of 128. Grid (groups, splits, 1), see
//            lib/reduce/shared_rows.cuh; cooperative if splits > 1. Every block has columns: `part` of them, a whole
//            number of vectors, or what is left of the row. Dynamic shared memory: 3 numbers of type A for every warp;
//            for every thread, `held` vectors of a row and with two stages of the next one, on its way. One stage if a
//            span is not all. Variants: as in layer_norm_forward.cu.
// Traffic:   x read once and y written once as long as all columns are held; the others are read twice. gamma and beta
//            from the cache. Every warp reads 12 splits bytes of moments a row, of float64 24.
// Numerics:  In A. The sums of a span are those of lib/reduce/row_moments.cuh, four vectors of a thread at a time.
//            Spans of a block in their order and then blocks in a tree are merged as moments, with the mean as a pair:
//            deterministic. Alignment changes no bit. A variance out of range counts as infinite. RMS norm: one plain
//            sum of a span, of the squares; the mean of a part is 0.
// Reference: Chan, Golub and LeVeque, Algorithms for computing the sample variance, 1983.
// Called by: bnkernels/ops/layer_norm/op.py
#include "lib/kernel.cuh"
#include "lib/numbers/rsqrt.cuh"
#include "lib/reduce/row_moments.cuh"
#include "lib/reduce/shared_rows.cuh"

// scaled: by gamma, shifted: by beta, as ParameterKind. centred: 0 for RMS norm. channel_groups, inner: G and I.
// adjacent: D if channels come last, else 0.
template <typename T, typename A>
struct LayerNormForwardCooperative {
    const T* x;
    const void* gamma;
    const void* beta;
    T* y;
    A* statistics;
    A* exchange;
    unsigned* barrier_counter;
    long long rows, columns, part;
    A eps, alpha;
    int activation, shape, scaled, shifted, centred, channel_groups, inner, held, stages, adjacent;
};

// A block's share of the rows.
template <typename Units, typename T, typename A>
struct RowShare {
    const LayerNormForwardCooperative<T, A>& a;
    const BlockColumns<T> own;

    __device__ __forceinline__ explicit RowShare(const LayerNormForwardCooperative<T, A>& a)
        : a(a), own(a.columns, a.part, a.held, a.shape) {}

    // The places of a turn: of the block's first thread, and of the thread.
    __device__ __forceinline__ Vector* stage(int turn) const {
        BNK_DYNAMIC_SHARED(A, shared);
        Vector* const places = reinterpret_cast<Vector*>(shared + 3 * blockDim.x / WARP);
        return places + (a.stages == 2 && turn % 2 ? a.held * (int)blockDim.x : 0);
    }
    __device__ __forceinline__ ThreadVectors of_thread(int turn) const { return ThreadVectors(stage(turn)); }

    // Begins to copy a span of row n, if there is that row.
    __device__ __forceinline__ void ask(long long n, int span, int turn) const {
        const Units units = Units::of_span(a, own, span);
        const ThreadVectors held = of_thread(turn);
        const T* const row = a.x + Units::place_of_row(a, n, own.first(span));
        if (n < a.rows) {
#pragma unroll 4
            for (int k = 0; k < a.held; ++k)
                if (units.has_unit(k)) units.copy(&held[k], row, k);
        }
        commit_copies();
    }

    // The moments of a span whose copies have arrived. All threads must call.
    __device__ __forceinline__ RowMoments<A> moments(int span, int turn) const {
        const RowUnits<T> units = own.units(span);
        const ThreadVectors held = of_thread(turn);
        const auto from_held = [&](int k) { return held[k]; };
        const A count = A(own.count(span)), half_share = A(0.5) / count;
        BNK_DYNAMIC_SHARED(A, scratch);
        __syncthreads();
        if (!a.centred) {
            A squares[1] = {A(0)};
            for_each_unit<CHUNK, T>(units, a.held, from_held,
                                    [&](int, const Unpacked<T>& x) { add_squares<T>(squares[0], x); });
            row_sums(squares, blockDim.x, scratch);
            return {count, {A(0), A(0)}, squares[0]};
        }
        const A first = Packed<T>::get(*stage(turn), 0), half_first = A(0.5) * first;
        A near[1] = {A(0)};
        for_each_unit<CHUNK, T>(units, a.held, from_held, [&](int k, const Unpacked<T>& x) {
            near[0] += near_terms<T>(units, k, x, half_first, half_share);
        });
        row_sums(near, blockDim.x, scratch);
        const A centre = fma(A(4), near[0], first);
        A sums[2] = {A(0), A(0)};
        for_each_unit<CHUNK, T>(units, a.held, from_held,
                                [&](int k, const Unpacked<T>& x) { add_distances<T>(sums, units, k, x, centre); });
        row_sums(sums, blockDim.x, scratch + blockDim.x / WARP);
        return moments_about(centre, sums, count, A(2) * half_share);
    }

    // Those of the whole row. All threads must call.
    __device__ __forceinline__ RowMoments<A> of_all_blocks(const RowMoments<A>& moments, int turn) const {
        if (gridDim.y == 1) return moments;
        const GroupExchange<A> group = {a.exchange, a.barrier_counter, 3};
        if (threadIdx.x == 0) {
            A* const to = group.own(turn);
            to[0] = moments.mean.high;
            to[1] = moments.mean.low;
            to[2] = moments.m2;
        }
        group.wait();
        const A* const all = group.shown(turn);
        RowMoments<A> merged = {};
#pragma unroll 1
        for (int split = threadIdx.x % WARP; split < gridDim.y; split += WARP) {
            const A* const from = all + split * 3;
            const A count = A(min(a.part, a.columns - split * a.part));
            merged = merge(merged, RowMoments<A>{count, {from[0], from[1]}, from[2]});
        }
        return merge_warp(merged, gridDim.y);
    }

    // Writes the row's y, the held span first.
    template <int UNROLL>
    __device__ __forceinline__ void normalise(long long n, int turn, Pair<A> mean, A rstd) const {
        const ThreadVectors held = of_thread(turn);
        const int last = own.spans - 1;
#pragma unroll 1
        for (int span = last; span >= 0; --span) {
            const Units units = Units::of_span(a, own, span);
            const long long column = own.first(span), place = Units::place_of_row(a, n, column);
            const ParameterPlace parameters = parameter_place(a, n, column);
            const auto load = [&](int k) { return span == last ? held[k] : units.load(a.x + place, k); };
            for_each_unit<UNROLL, T>(units, a.held, load, [&](int k, const Unpacked<T>& x) {
                write_normalised(a, units, a.y + place, parameters, k, x, mean, rstd);
            });
        }
    }
};

template <typename Units, typename T, typename A>
__device__ __forceinline__ void layer_norm_forward_cooperative(const LayerNormForwardCooperative<T, A>& arguments) {
    LayerNormForwardCooperative<T, A> a = arguments;
    take_constants(a);
    const RowShare<Units, T, A> share(a);
    if (a.stages == 2) share.ask(blockIdx.x, 0, 0);
    int turn = 0;
#pragma unroll 1
    for (long long n = blockIdx.x; n < a.rows; n += gridDim.x, ++turn) {  // the same in all blocks of a group
        RowMoments<A> moments = {};
#pragma unroll 1
        for (int span = 0; span < share.own.spans; ++span) {
            if (a.stages == 2) {
                share.ask(n + gridDim.x, 0, turn + 1);
                wait_for_copies<1>();
            } else {
                share.ask(n, span, turn);
                wait_for_copies<0>();
            }
            moments = merge(moments, share.moments(span, turn));
        }
        moments = share.of_all_blocks(moments, turn);
        Pair<A> mean = moments.mean;
        const A rstd = reciprocal_sqrt(moments.m2 / A(a.columns) + a.eps);
        if (threadIdx.x == 0 && blockIdx.y == 0) store_statistics(a, n, mean, rstd);
        if (rstd == A(0)) mean = {A(0), A(0)};
        if (a.activation == LINEAR)
            share.template normalise<CHUNK>(n, turn, mean, rstd);
        else
            share.template normalise<1>(n, turn, mean, rstd);
    }
    wait_for_copies<0>();
}

#define LAYER_NORM_FORWARD_COOPERATIVE(suffix, T, A)                                                     \
    BNK_KERNEL(bnk_layer_norm_forward_cooperative_##suffix, (LayerNormForwardCooperative<T, A>), 256, 2, \
               (layer_norm_forward_cooperative<RowUnits<T>, T, A>))

LAYER_NORM_FORWARD_COOPERATIVE(f32, float, float)
LAYER_NORM_FORWARD_COOPERATIVE(f16, Float16, float)
LAYER_NORM_FORWARD_COOPERATIVE(bf16, BFloat16, float)
LAYER_NORM_FORWARD_COOPERATIVE(f64, double, double)

#define LAYER_NORM_FORWARD_COOPERATIVE_LAST(suffix, T, A)                                                     \
    BNK_KERNEL(bnk_layer_norm_forward_cooperative_last_##suffix, (LayerNormForwardCooperative<T, A>), 256, 2, \
               (layer_norm_forward_cooperative<LastUnits<T>, T, A>))

LAYER_NORM_FORWARD_COOPERATIVE_LAST(f32, float, float)
LAYER_NORM_FORWARD_COOPERATIVE_LAST(f16, Float16, float)
LAYER_NORM_FORWARD_COOPERATIVE_LAST(bf16, BFloat16, float)
LAYER_NORM_FORWARD_COOPERATIVE_LAST(f64, double, double)
