// Reductions over the 32 lanes of a warp by butterfly shuffles, in a fixed order. All lanes must call.
#pragma once

constexpr int WARP = 32;

template <typename A>
__device__ __forceinline__ A warp_sum(A value) {
#pragma unroll
    for (int apart = WARP / 2; apart > 0; apart /= 2) value += __shfl_xor_sync(0xffffffffu, value, apart);
    return value;
}

template <typename A>
__device__ __forceinline__ A warp_max(A value) {
#pragma unroll
    for (int apart = WARP / 2; apart > 0; apart /= 2) {
        const A other = __shfl_xor_sync(0xffffffffu, value, apart);
        value = other > value ? other : value;
    }
    return value;
}
