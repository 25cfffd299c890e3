// Rows of a matrix, each shared by the threads of a block with the same threadIdx.y: access and row-wise sums.
//
// blockDim.x, the width, is a power of two. A unit is a vector of 16 bytes of a row. A thread takes every width-th
// unit, always the same ones: no other thread reads what it keeps of them, so that needs no barrier.
#pragma once

#include "lib/numbers/vector.cuh"
#include "lib/reduce/warp.cuh"
#include "lib/sync/async_copy.cuh"

template <typename T>
constexpr int UNIT = Packed<T>::COUNT;

// ALIGNED: a row is a whole number of units and begins at a multiple of 16 bytes. FULL: and all threads have as many.
enum RowShape { ANY = 0, ALIGNED = 1, FULL = 2 };

// Scale and shift: not given, of the accumulator's type or of the data's, if that has 16 bits.
enum ParameterKind { NOT_GIVEN = 0, IN_ACCUMULATOR_TYPE = 1, IN_STORAGE_TYPE = 2 };

// Where the parameters of a part of a row are: that of its column j is number first + (column + j) / inner.
struct ParameterPlace {
    long long first, column;
    int inner;
};

// The place for the columns of row n from `column` on. Rows are those of the groups of channels in turn, and `inner`
// columns share a channel.
template <typename Arguments>
__device__ __forceinline__ ParameterPlace parameter_place(const Arguments& a, long long n, long long column) {
    const long long first = a.channel_groups == 1 ? 0 : n % a.channel_groups * (a.columns / a.inner);
    return {first, column, a.inner};
}

// The units of a thread in a row, or in a part of one, of `columns`: the first in `column`, the others `step` columns
// apart.
template <typename T>
struct RowUnits {
    using Type = T;
    int column, left, step;  // left: columns from `column` to the end; not positive if the thread has no unit
    RowShape shape;

    __device__ __forceinline__ RowUnits(int columns, int width, int shape)
        : column((int)threadIdx.x * UNIT<T>), left(columns - column), step(width * UNIT<T>), shape((RowShape)shape) {}

    // Those of a row that a block has, and of a span of one that it shares.
    template <typename Arguments>
    static __device__ __forceinline__ RowUnits of_row(const Arguments& a) {
        return {(int)a.columns, a.width, a.shape};
    }
    template <typename Arguments, typename Columns>
    static __device__ __forceinline__ RowUnits of_span(const Arguments&, const Columns& own, int span) {
        return own.units(span);
    }
    // Place of a part of row n that begins with `column`.
    template <typename Arguments>
    static __device__ __forceinline__ long long place_of_row(const Arguments& a, long long n, long long column) {
        return n * a.columns + column;
    }
    // Column i of a channel of a row.
    template <typename Index>
    static __device__ __forceinline__ Index column_of(Index channel, int i, int inner, Index) {
        return channel * inner + i;
    }

    __device__ __forceinline__ bool has_unit(int k) const { return shape == FULL || k * step < left; }
    // Whether element i of a unit that is there is within the row.
    __device__ __forceinline__ bool has(int k, int i) const { return shape != ANY || k * step + i < left; }

    // Loads unit k; elements beyond the end of the row are 0.
    __device__ __forceinline__ Vector load(const T* row, int k) const {
        if (shape != ANY) return bnk_load_vector(row + column + k * step);
        Vector vector = {};
#pragma unroll
        for (int i = 0; i < UNIT<T>; ++i)
            if (has(k, i)) Packed<T>::set(vector, i, typename Packed<T>::Number(row[column + k * step + i]));
        return vector;
    }

    // Copies unit k to shared memory; see async_copy.cuh. What is not a vector is copied at once.
    __device__ __forceinline__ void copy(Vector* shared, const T* row, int k) const {
        if (shape != ANY)
            copy_async<16>(shared, row + column + k * step);
        else
            *shared = load(row, k);
    }

    __device__ __forceinline__ void store(T* row, int k, const Unpacked<T>& values) const {
        if (shape != ANY) {
            bnk_store_vector(row + column + k * step, pack<T>(values));
            return;
        }
#pragma unroll
        for (int i = 0; i < UNIT<T>; ++i)
            if (has(k, i)) row[column + k * step + i] = T(values[i]);
    }

    // Loads the parameters of the columns of unit k of a part of a row; those that are not given are `missing`. Beyond
    // the end of the row they are finite.
    template <typename A>
    __device__ __forceinline__ void load_parameters(Unpacked<T>& values, const void* parameters, int kind,
                                                    const ParameterPlace& place, int k, A missing) const {
        if (place.inner > 1) return load_of_channels(values, parameters, kind, place, k, missing);
        const long long first = place.first + place.column;
        if (sizeof(T) == 2 && kind == IN_STORAGE_TYPE) return unpack<T>(load((const T*)parameters + first, k), values);
#pragma unroll
        for (int i = 0; i < UNIT<T>; ++i) values[i] = missing;
        if (!kind) return;
        const A* const own = (const A*)parameters + first + column + k * step;
#pragma unroll
        for (int i = 0; i < UNIT<T>; i += UNIT<A>) {
            if (shape != ANY) {
                const Vector four = bnk_load_vector(own + i);
#pragma unroll
                for (int j = 0; j < UNIT<A>; ++j) values[i + j] = Packed<A>::get(four, j);
            } else {
#pragma unroll
                for (int j = 0; j < UNIT<A>; ++j)
                    if (has(k, i + j)) values[i + j] = own[i + j];
            }
        }
    }

    // The same where several columns share a channel: one number for a unit that is within one, else one by one.
    template <typename A>
    __device__ __forceinline__ void load_of_channels(Unpacked<T>& values, const void* parameters, int kind,
                                                     const ParameterPlace& place, int k, A missing) const {
        const long long own = place.column + column + k * step;
        const bool within = place.inner % UNIT<T> == 0;
        A one = missing;
#pragma unroll
        for (int i = 0; i < UNIT<T>; ++i) {
            if (kind && (within ? i == 0 : has(k, i))) {
                const long long channel = place.first + (own + i) / place.inner;
                one = kind == IN_STORAGE_TYPE ? A(static_cast<const T*>(parameters)[channel])
                                              : static_cast<const A*>(parameters)[channel];
            }
            values[i] = one;
        }
    }
};

// The same for group norm of channels that come last: `adjacent` columns of a row, its channels in a position, are
// neighbours, and the next position is `pitch` numbers further. The first column of the part is number `begin` of the
// row's, and the part's place is that of the row.
template <typename T>
struct LastUnits : RowUnits<T> {
    using Base = RowUnits<T>;
    using Base::column, Base::has, Base::shape, Base::step;
    unsigned adjacent, pitch, begin;

    template <typename Arguments>
    __device__ __forceinline__ LastUnits(const Arguments& a, int columns, int width, long long begin)
        : Base(columns, width, a.shape),
          adjacent(a.adjacent),
          pitch(adjacent * a.channel_groups),
          begin((unsigned)begin) {}

    template <typename Arguments>
    static __device__ __forceinline__ LastUnits of_row(const Arguments& a) {
        return {a, (int)a.columns, a.width, 0};
    }
    template <typename Arguments, typename Columns>
    static __device__ __forceinline__ LastUnits of_span(const Arguments& a, const Columns& own, int span) {
        return {a, own.count(span), (int)blockDim.x, own.first(span)};
    }
    template <typename Arguments>
    static __device__ __forceinline__ long long place_of_row(const Arguments& a, long long n, long long) {
        const long long group = n % a.channel_groups;
        return (n - group) * a.columns + group * a.adjacent;
    }
    template <typename Index>
    static __device__ __forceinline__ Index column_of(Index channel, int i, int, Index channels) {
        return channel + i * channels;
    }

    // The channel with which unit k begins, and where that is.
    __device__ __forceinline__ unsigned channel(int k) const { return (begin + column + k * step) % adjacent; }
    template <typename Element>
    __device__ __forceinline__ Element* at(Element* row, int k) const {
        return row + (long long)((begin + column + k * step) / adjacent) * pitch + channel(k);
    }

    // Calls work(i, where it is) for the elements of unit k within the row.
    template <typename Element, typename Work>
    __device__ __forceinline__ void for_each_element(Element* row, int k, const Work& work) const {
        Element* own = at(row, k);
        unsigned channel = this->channel(k);
#pragma unroll
        for (int i = 0; i < UNIT<T>; ++i, ++own, ++channel) {
            if (channel == adjacent) {  // the unit goes on in the next position
                channel = 0;
                own += pitch - adjacent;
            }
            if (has(k, i)) work(i, own);
        }
    }

    __device__ __forceinline__ Vector load(const T* row, int k) const {
        if (shape != ANY) return bnk_load_vector(at(row, k));
        Vector vector = {};
        for_each_element(row, k,
                         [&](int i, const T* own) { Packed<T>::set(vector, i, typename Packed<T>::Number(*own)); });
        return vector;
    }

    __device__ __forceinline__ void copy(Vector* shared, const T* row, int k) const {
        if (shape != ANY)
            copy_async<16>(shared, at(row, k));
        else
            *shared = load(row, k);
    }

    __device__ __forceinline__ void store(T* row, int k, const Unpacked<T>& values) const {
        if (shape != ANY)
            bnk_store_vector(at(row, k), pack<T>(values));
        else
            for_each_element(row, k, [&](int i, T* own) { *own = T(values[i]); });
    }

    // Loads the parameters of unit k, which are neighbours unless it goes on in the next position.
    template <typename A>
    __device__ __forceinline__ void load_parameters(Unpacked<T>& values, const void* parameters, int kind,
                                                    const ParameterPlace& place, int k, A missing) const {
        unsigned channel = this->channel(k);
        if (kind && shape != ANY) return load_vectors<A>(values, parameters, kind, place.first + channel);
#pragma unroll
        for (int i = 0; i < UNIT<T>; ++i, ++channel) {
            if (channel == adjacent) channel = 0;
            const long long own = place.first + channel;
            const bool given = kind && has(k, i);
            if (given && kind == IN_STORAGE_TYPE)
                values[i] = A(static_cast<const T*>(parameters)[own]);
            else
                values[i] = given ? static_cast<const A*>(parameters)[own] : missing;
        }
    }

    // Loads the parameters of a unit, number `first` and its neighbours, as vectors.
    template <typename A>
    static __device__ __forceinline__ void load_vectors(Unpacked<T>& values, const void* parameters, int kind,
                                                        long long first) {
        if (sizeof(T) == 2 && kind == IN_STORAGE_TYPE)
            return unpack<T>(bnk_load_vector(static_cast<const T*>(parameters) + first), values);
#pragma unroll
        for (int i = 0; i < UNIT<T>; i += UNIT<A>) {
            const Vector vector = bnk_load_vector(static_cast<const A*>(parameters) + first + i);
#pragma unroll
            for (int j = 0; j < UNIT<A>; ++j) values[i + j] = Packed<A>::get(vector, j);
        }
    }
};

// Sums of COUNT numbers over the threads of a row, identical in all of them: a balanced tree. `scratch` holds COUNT
// numbers for every warp of the block, and may be used anew behind the next barrier. All threads must call.
template <int COUNT, typename A>
__device__ __forceinline__ void row_sums(A (&sums)[COUNT], int width, A* scratch) {
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2)
        if (offset < width) {
#pragma unroll
            for (int i = 0; i < COUNT; ++i) sums[i] += __shfl_xor_sync(0xffffffffu, sums[i], offset);
        }
    if (width <= WARP) return;
    const int warps = width / WARP, lane = threadIdx.x % WARP;
    A* const own = scratch + threadIdx.y * warps * COUNT;
    if (lane == 0) {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) own[i * warps + threadIdx.x / WARP] = sums[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < COUNT; ++i) sums[i] = own[i * warps + lane % warps];
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2)
        if (offset < warps) {
#pragma unroll
            for (int i = 0; i < COUNT; ++i) sums[i] += __shfl_xor_sync(0xffffffffu, sums[i], offset);
        }
}
