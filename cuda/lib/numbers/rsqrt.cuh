// 1 / sqrt(value), by the approximation of the hardware and a Newton step.
#pragma once

#ifndef BNK_RSQRT  // the emulator defines it and this function
// Relative error at most 2^-22.9 (PTX ISA, rsqrt.approx).
__device__ __forceinline__ float bnk_rsqrt_approximation(float value) {
    float root;
    asm("rsqrt.approx.f32 %0, %1;" : "=f"(root) : "f"(value));
    return root;
}
#endif

// Within 1.5 units in the last place: the step squares the error of the approximation, and rounds. Zero gives infinity,
// infinity 0, a negative number and NaN give NaN, as 1 / sqrt does; the step would make NaN of the first two.
__device__ __forceinline__ float reciprocal_sqrt(float value) {
    const float root = bnk_rsqrt_approximation(value);
    const float refined = fma(0.5f * root, fma(-value * root, root, 1.0f), root);
    return value >= 1.17549435e-38f && value <= 3.40282347e38f ? refined : root;
}
__device__ __forceinline__ double reciprocal_sqrt(double value) { return 1.0 / sqrt(value); }
