// The weights that a block updates, and their state in the optimiser: kept in its shared memory for all steps of a
// launch, or in global memory where there is no room for them.
//
// The first a.kept of the arrays `parameters`, `first` and `second` are kept: the tiles of all layers that a block may
// own, each (inputs, width), with rows of 0 up to a whole vector of terms. So a tile lies there as stages of a product
// have it. Global memory has what it had when the launch began until copy() writes back, and beside that the weights
// that every step publishes for other blocks.
#pragma once

#include "lib/gemm/matrix.cuh"
#include "lib/train/network.cuh"

struct Element {
    int row, column;
};

// Weights of a tile, or their state: `pitch` numbers from a row to the next. `data` may be null if nothing is read.
template <typename T>
struct WeightTile {
    T* data;
    int first, pitch;

    __device__ __forceinline__ T& operator[](const Element& e) const { return data[first + e.row * pitch + e.column]; }
};

// Weights of a layer, (inputs, outputs), as the right factor of a product; if they are kept, those of one tile.
template <typename T>
struct WeightFactor : Matrix<T, true> {
    bool kept;
    const T* tile;
    int width;

    __device__ __forceinline__ bool is_copied() const { return !kept; }
    __device__ __forceinline__ const T* stage(const T* copied, int first) const {
        return kept ? tile + first * width : copied;
    }
};

template <typename T, typename Arguments>
struct OwnWeights {
    const Arguments& a;
    T* const kept;   // (a.kept, size)
    const int size;  // of a kept array

    __device__ __forceinline__ OwnWeights(const Arguments& a, T* shared)
        : a(a), kept(shared), size(a.kept ? begin((int)a.depth) : 0) {}
    __device__ __forceinline__ T* end() const { return kept + a.kept * size; }

    __device__ __forceinline__ int field(int layer, Layer which) const { return field_of(a, layer, which); }
    __device__ __forceinline__ int tile_size(int layer) const {
        return (field(layer, INPUTS) + COLUMNS<T> - 1) / COLUMNS<T> * COLUMNS<T> * (int)a.width;
    }
    // Where the tiles of a layer begin in a kept array, and the one from `column` on.
    __device__ __forceinline__ int begin(int layer) const {
        const int of_blocks = (int)(a.blocks * a.width);
        int before = 0;
#pragma unroll LAYERS_WRITTEN_OUT
        for (int i = 0; i < layer; ++i) before += (field(i, OUTPUTS) + of_blocks - 1) / of_blocks * tile_size(i);
        return before;
    }
    __device__ __forceinline__ int begin(int layer, int column) const {
        return a.kept ? begin(layer) + column / (int)(a.blocks * a.width) * tile_size(layer) : 0;
    }

    // The tile of an array, of the weights, their first or their second state: in global memory, and where it is up to
    // date.
    __device__ __forceinline__ WeightTile<T> stored(int array, int layer, int column) const {
        T* const data = array == 0 ? a.parameters : array == 1 ? a.first : a.second;
        return {data, field(layer, WEIGHT) + column, field(layer, OUTPUTS)};
    }
    __device__ __forceinline__ WeightTile<T> tile(int array, int layer, int column, int kept_begin) const {
        if (array >= a.kept) return stored(array, layer, column);
        return {kept, array * size + kept_begin, (int)a.width};
    }

    __device__ __forceinline__ WeightFactor<T> factor(int layer, int column) const {
        const int inputs = field(layer, INPUTS), outputs = field(layer, OUTPUTS), width = (int)a.width;
        const T* const weight = a.parameters + field(layer, WEIGHT);
        return {{weight, inputs, outputs, outputs}, a.kept > 0, kept + begin(layer, column), width};
    }

    // Weights of a tile and their state.
    struct Tiles {
        WeightTile<T> weight, first, second;
    };
    __device__ __forceinline__ Tiles tiles(int layer, int column) const {
        const int at = begin(layer, column);
        return {tile(0, layer, column, at), tile(1, layer, column, at), tile(2, layer, column, at)};
    }

    // Copies a tile of every kept array from global memory, or back; by all threads of the block.
    __device__ __forceinline__ void copy(int layer, int column, bool back) const {
        const int bits = __popc((int)a.width - 1), count = tile_size(layer), at = begin(layer, column);
#pragma unroll 1
        for (int array = 0; array < a.kept; ++array) {
            const WeightTile<T> global = stored(array, layer, column), own = tile(array, layer, column, at);
#pragma unroll 1
            for (int i = threadIdx.x; i < count; i += PRODUCT_THREADS) {
                const Element e = {i >> bits, i & ((int)a.width - 1)};
                const bool exists = e.row < field(layer, INPUTS) && column + e.column < global.pitch;
                if (!back) own[e] = exists ? global[e] : T(0);
                if (back && exists) global[e] = own[e];
            }
        }
    }
};
