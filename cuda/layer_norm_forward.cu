// Layer norm, RMS norm or group norm of every example over its features, scale, shift and activation, in one launch.
//
// Formulas:  Over the C values of a row:
//            mean[n], m2[n] = sum (x - mean)^2, var = m2 / C, rstd = 1 / sqrt(var + eps)
//            y = phi(gamma[c] rstd (x - mean) + beta[c])
//            RMS norm, where rows are not centred: mean = 0, so rstd = 1 / sqrt(sum x^2 / C + eps); no beta.
//            Group norm, of G groups of D channels with I positions: the rows of an example are its groups, C = D I,
//            and gamma and beta are those of channel (n mod G) D + c / I. Layer norm: G = I = 1. If channels come
//            last, column c is channel (n mod G) D + c mod D of position c / D.
// Arrays:    x, y (N, C) of type T, C order, or if channels come last (N / G, I, G D); y may alias x. gamma, beta
//            (G D,) of the accumulator's type A or of T, may be null (1, 0). statistics (3, N): mean, mean_low, rstd,
//            of type A; of RMS norm (1, N): rstd.
// Launch:    Block (width, r, 1), width a power of two and width r a multiple of 32, grid (ceil(N / r), 1, 1): the
//            threads with the same threadIdx.y share a row. A thread holds `held` vectors of 16 bytes, 1 to MOST_HELD;
//            longer rows are for layer_norm_forward_cooperative.cu. Dynamic shared memory: 3 numbers of type A for
//            every warp. Variants: last, where channels come last; the others do not look at `adjacent`.
// Traffic:   x read once, y written once, gamma and beta from the cache.
// Numerics:  In A. The two plain sums of lib/reduce/row_moments.cuh, in a fixed order: deterministic. Alignment changes
//            no bit. A variance out of range counts as infinite. RMS norm: one plain sum, of the squares.
// Reference: Ba, Kiros and Hinton, Layer Normalization, 2016, arXiv:1607.06450; Zhang and Sennrich, Root Mean Square
//            Layer Normalization, 2019, arXiv:1910.07467.
// Called by: bnkernels/ops/layer_norm/op.py
#include "lib/kernel.cuh"
#include "lib/numbers/rsqrt.cuh"
#include "lib/reduce/row_moments.cuh"
#include "lib/reduce/vector_rows.cuh"

template <typename T>
constexpr int MOST_HELD = sizeof(T) == 2 ? 4 : 8;

// scaled: by gamma, shifted: by beta, as ParameterKind. centred: 0 for RMS norm. channel_groups, inner: G and I.
// adjacent: D if channels come last, else 0. half_share: 1 / (2 C).
template <typename T, typename A>
struct LayerNormForward {
    const T* x;
    const void* gamma;
    const void* beta;
    T* y;
    A* statistics;
    long long rows, columns;
    A eps, alpha, half_share;
    int activation, shape, scaled, shifted, centred, channel_groups, inner, width, held, adjacent;
};

// A row of x in registers.
template <typename Units, typename T, typename A>
struct InputRow {
    const LayerNormForward<T, A>& a;
    const long long offset;
    const bool is_there;
    const Units units;
    Vector values[MOST_HELD<T>];

    __device__ __forceinline__ InputRow(const LayerNormForward<T, A>& a, long long n)
        : a(a), offset(Units::place_of_row(a, n, 0)), is_there(n < a.rows), units(Units::of_row(a)) {
        if (!is_there) return;
#pragma unroll
        for (int k = 0; k < MOST_HELD<T>; ++k)
            if (k < a.held && units.has_unit(k)) values[k] = units.load(a.x + offset, k);
    }

    // One thread of every warp loads it, at the same time as the units.
    __device__ __forceinline__ A first_number() const {
        const int width = min(a.width, WARP);
        const A own = is_there && threadIdx.x % width == 0 ? A(a.x[offset]) : A(0);
        return __shfl_sync(0xffffffffu, own, 0, width);
    }

    // Calls work(k, values of unit k) for the thread's units. UNROLL is MOST_HELD, or 1 for long work.
    template <int UNROLL = MOST_HELD<T>, typename Work>
    __device__ __forceinline__ void for_each_unit(const Work& work) {
        if (!is_there) return;
#pragma unroll UNROLL
        for (int k = 0; k < MOST_HELD<T>; ++k) {
            if (k < a.held && units.has_unit(k)) {
                Unpacked<T> unpacked;
                unpack<T>(values[0], unpacked);
                work(k, unpacked);
            }
            rotate(values);  // registers cannot be indexed
        }
    }
};

// The moments of the row. All threads must call.
template <typename Units, typename T, typename A>
__device__ __forceinline__ RowMoments<A> moments_of(const LayerNormForward<T, A>& a, InputRow<Units, T, A>& row,
                                                    A* scratch) {
    if (!a.centred) {
        A squares[1] = {A(0)};
        row.for_each_unit([&](int, const Unpacked<T>& x) { add_squares<T>(squares[0], x); });
        row_sums(squares, a.width, scratch);
        return {A(a.columns), {A(0), A(0)}, squares[0]};
    }
    const A first = row.first_number(), half_first = A(0.5) * first;
    A near[1] = {A(0)};
    row.for_each_unit(
        [&](int k, const Unpacked<T>& x) { near[0] += near_terms<T>(row.units, k, x, half_first, a.half_share); });
    row_sums(near, a.width, scratch);
    const A centre = fma(A(4), near[0], first);
    A sums[2] = {A(0), A(0)};
    row.for_each_unit([&](int k, const Unpacked<T>& x) { add_distances<T>(sums, row.units, k, x, centre); });
    row_sums(sums, a.width, scratch + blockDim.x * blockDim.y / WARP);
    return moments_about(centre, sums, A(a.columns), A(2) * a.half_share);
}

// Writes the row's y.
template <int UNROLL, typename Units, typename T, typename A>
__device__ __forceinline__ void normalise(InputRow<Units, T, A>& row, long long n, Pair<A> mean, A rstd) {
    const ParameterPlace place = parameter_place(row.a, n, 0);
    row.template for_each_unit<UNROLL>([&](int k, const Unpacked<T>& x) {
        write_normalised(row.a, row.units, row.a.y + row.offset, place, k, x, mean, rstd);
    });
}

template <typename Units, typename T, typename A>
__device__ __forceinline__ void layer_norm_forward(const LayerNormForward<T, A>& arguments) {
    BNK_DYNAMIC_SHARED(A, scratch);
    LayerNormForward<T, A> a = arguments;
    take_constants(a);
    const long long n = (long long)blockIdx.x * blockDim.y + threadIdx.y;
    InputRow<Units, T, A> row(a, n);
    const RowMoments<A> moments = moments_of(a, row, scratch);
    Pair<A> mean = moments.mean;
    const A share = A(2) * a.half_share, rstd = reciprocal_sqrt(moments.m2 * share + a.eps);
    if (threadIdx.x == 0 && row.is_there) store_statistics(a, n, mean, rstd);
    if (rstd == A(0)) mean = {A(0), A(0)};
    if (a.activation == LINEAR)
        normalise<MOST_HELD<T>>(row, n, mean, rstd);
    else
        normalise<1>(row, n, mean, rstd);
}

#define LAYER_NORM_FORWARD(suffix, T, A)                                          \
    BNK_KERNEL(bnk_layer_norm_forward_##suffix, (LayerNormForward<T, A>), 512, 1, \
               (layer_norm_forward<RowUnits<T>, T, A>))

LAYER_NORM_FORWARD(f32, float, float)
LAYER_NORM_FORWARD(f16, Float16, float)
LAYER_NORM_FORWARD(bf16, BFloat16, float)
LAYER_NORM_FORWARD(f64, double, double)

#define LAYER_NORM_FORWARD_LAST(suffix, T, A)                                          \
    BNK_KERNEL(bnk_layer_norm_forward_last_##suffix, (LayerNormForward<T, A>), 512, 1, \
               (layer_norm_forward<LastUnits<T>, T, A>))

LAYER_NORM_FORWARD_LAST(f32, float, float)
LAYER_NORM_FORWARD_LAST(f16, Float16, float)
LAYER_NORM_FORWARD_LAST(bf16, BFloat16, float)
LAYER_NORM_FORWARD_LAST(f64, double, double)
