// Reductions over the 32 lanes of a warp by butterfly shuffles, in a fixed order. All lanes must call.
#pragma once

constexpr int WARP = 32;

template <typename A>
__device__ __forceinline__ A warp_sum(A value) {
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
    return value;
}

template <typename A>
__device__ __forceinline__ A warp_max(A value) {
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2) {
        const A other = __shfl_xor_sync(0xffffffffu, value, offset);
        value = other > value ? other : value;
    }
    return value;
}
