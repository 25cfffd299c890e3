// Gradients of layer norm over a row, or over some of its columns: a row's sums, the terms of column sums, and dx. Rows
// that are not centred, those of RMS norm, have no mean to subtract, so none of h either, and no shift.
#pragma once

#include "lib/numbers/activation.cuh"
#include "lib/numbers/pair.cuh"
#include "lib/reduce/vector_rows.cuh"
#include "lib/sync/async_copy.cuh"

constexpr int ROWS_IN_REGISTERS = 16;  // whose terms a thread sums before they are added to others in a pair

template <typename A>
struct RowStatistics {
    Pair<A> mean;
    A rstd;
};

enum ColumnSum { DGAMMA = 0, DBETA = 1 };

// Sum of pairs over the lanes of a warp, in a fixed order. All lanes must call.
template <typename A>
__device__ __forceinline__ Pair<A> warp_sum(Pair<A> sum) {
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2)
        sum = add(sum, Pair<A>{__shfl_xor_sync(0xffffffffu, sum.high, offset),
                               __shfl_xor_sync(0xffffffffu, sum.low, offset)});
    return sum;
}

// The number of column sums.
template <typename Arguments>
__device__ __forceinline__ int quantities(const Arguments& a) {
    return a.centred ? 2 : 1;
}

// Stores the sum of a column, in the type of scale and shift.
template <typename T, typename Arguments, typename A>
__device__ __forceinline__ void store_sum(const Arguments& a, int quantity, long long column, A sum) {
    void* const to = quantity == DGAMMA ? a.dgamma : a.dbeta;
    if (sizeof(T) == 2 && (a.scaled == IN_STORAGE_TYPE || a.shifted == IN_STORAGE_TYPE))
        store(static_cast<T*>(to)[column], sum);
    else
        static_cast<A*>(to)[column] = sum;
}

// The rows of a block, or of the blocks that share rows: every `blocks`-th one of those of a group of channels. Of all
// rows, number i of these is i * groups + group.
struct GroupRows {
    unsigned groups, group, blocks, block;
    long long all;

    template <typename Arguments>
    __device__ __forceinline__ explicit GroupRows(const Arguments& a)
        : groups(a.channel_groups),
          group(blockIdx.x % groups),
          blocks(gridDim.x / groups),
          block(blockIdx.x / groups),
          all(a.rows / groups) {}

    __device__ __forceinline__ long long row(long long i) const { return i * groups + group; }
};

// The row's statistics; not asked for beyond the last row.
template <typename Arguments>
__device__ __forceinline__ auto statistics_of(const Arguments& a, long long n) {
    using A = decltype(a.alpha + a.alpha);
    if (n >= a.rows) return RowStatistics<A>{{A(0), A(0)}, A(0)};
    if (!a.centred) return RowStatistics<A>{{A(0), A(0)}, a.statistics[n]};
    return RowStatistics<A>{{a.statistics[n], a.statistics[a.rows + n]}, a.statistics[2 * a.rows + n]};
}

// The terms of a row in the column sums of a unit, summed over some rows.
template <typename T, typename A>
struct ColumnTerms {
    A dgamma[UNIT<T>], dbeta[UNIT<T>];
};

// The sums of h and h xhat over the threads of a row. Without a mean that of h is not needed. All threads must call.
template <typename A, typename Arguments>
__device__ __forceinline__ void sums_of_row(const Arguments& a, A (&sums)[2], int width, A* scratch) {
    if (a.centred) return row_sums(sums, width, scratch);
    A product[1] = {sums[1]};
    row_sums(product, width, scratch);
    sums[1] = product[0];
}

// Columns of a row of dy and x, of which a thread has up to HELD units. ROLLED: the loop of the copies, which saves
// registers.
template <bool CURVED, int HELD, typename Units, typename Arguments, bool ROLLED = false>
struct RowGradients {
    using T = typename Units::Type;
    using A = typename Packed<T>::Number;
    const Arguments& a;
    const Units units;
    const ThreadVectors stage;      // dy and x, alternating
    const long long column, place;  // of the first column: in the row, and in the matrix
    const ParameterPlace parameters;
    const bool is_there;
    const A rstd;
    const Pair<A> mean;

    // rstd is 0 for finite numbers only, whose distance from their mean may not be finite.
    __device__ __forceinline__ RowGradients(const Arguments& a, const Units& units, const ThreadVectors& stage,
                                            long long n, long long column, const RowStatistics<A>& statistics)
        : a(a),
          units(units),
          stage(stage),
          column(column),
          place(Units::place_of_row(a, n, column)),
          parameters(parameter_place(a, n, column)),
          is_there(n < a.rows),
          rstd(statistics.rstd),
          mean(statistics.rstd == A(0) ? Pair<A>{A(0), A(0)} : statistics.mean) {}

    __device__ __forceinline__ bool has_unit(int k) const { return is_there && k < a.held && units.has_unit(k); }

    // Begins to copy the columns to their stage.
    __device__ __forceinline__ void ask() const {
        constexpr int UNROLL = ROLLED ? 1 : HELD;
#pragma unroll UNROLL
        for (int k = 0; k < HELD; ++k) {
            if (!has_unit(k)) continue;
            units.copy(&stage[2 * k], a.dy + place, k);
            units.copy(&stage[2 * k + 1], a.x + place, k);
        }
        commit_copies();
    }

    // Calls work(k, has, g, xhat, gamma) for HELD units, whether the thread has them or not. The curved activations are
    // long: their loop stays rolled.
    template <typename Work>
    __device__ __forceinline__ void for_each_unit(const Work& work) const {
        constexpr int UNROLL = CURVED ? 1 : HELD;
#pragma unroll UNROLL
        for (int k = 0; k < HELD; ++k) {
            const bool has = has_unit(k);
            Unpacked<T> g, xhat, gamma;
            if (has) {
                unpack<T>(stage[2 * k], g);
                unpack<T>(stage[2 * k + 1], xhat);
                units.load_parameters(gamma, a.gamma, a.scaled, parameters, k, A(1));
#pragma unroll
                for (int i = 0; i < UNIT<T>; ++i)
                    xhat[i] = units.has(k, i) ? fma(xhat[i] - mean.high, rstd, -mean.low * rstd) : A(0);
                if (CURVED || a.alpha != A(1)) {
                    Unpacked<T> z;
                    units.load_parameters(z, a.beta, a.shifted, parameters, k, A(0));
#pragma unroll
                    for (int i = 0; i < UNIT<T>; ++i) z[i] = fma(gamma[i], xhat[i], z[i]);
                    activation_backward_all(g, z, CURVED ? a.activation : LINEAR, a.alpha);
                }
            }
            work(k, has, g, xhat, gamma);
        }
    }

    // Adds the thread's terms of the column sums, and of the sums of h and h xhat over the row, divided by 2 C.
    __device__ __forceinline__ void add(A (&sums)[2], ColumnTerms<T, A> (&terms)[HELD]) const {
        for_each_unit([&](int, bool has, const Unpacked<T>& g, const Unpacked<T>& xhat, const Unpacked<T>& gamma) {
            A sum = A(0), product = A(0);
#pragma unroll
            for (int i = 0; has && i < UNIT<T>; ++i) {
                const A h = gamma[i] * a.half_share * g[i];
                if (a.centred) sum += h;
                product = fma(h, xhat[i], product);
                terms[0].dgamma[i] = fma(g[i], xhat[i], terms[0].dgamma[i]);
                if (a.centred) terms[0].dbeta[i] += g[i];
            }
            sums[0] += sum;
            sums[1] += product;
            rotate(terms);  // registers cannot be indexed
        });
    }

    // Writes dx, from these sums over the whole row.
    __device__ __forceinline__ void write(const A (&sums)[2]) const {
        const bool flat = rstd == A(0);  // what multiplies rstd must be finite
        const A mean_h = flat ? A(0) : A(2) * sums[0], slope = flat ? A(0) : A(2) * sums[1];
        for_each_unit([&](int k, bool has, const Unpacked<T>& g, const Unpacked<T>& xhat, const Unpacked<T>& gamma) {
            if (!has) return;
            Unpacked<T> dx;
#pragma unroll
            for (int i = 0; i < UNIT<T>; ++i) dx[i] = rstd * fma(gamma[i], g[i], -fma(xhat[i], slope, mean_h));
            units.store(a.dx + place, k, dx);
        });
    }
};
