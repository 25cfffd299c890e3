// Activations h = phi(z) and their first two derivatives. All of them propagate NaN.
//
// The codes are those of bnkernels/ops/activations.py, which also passes `alpha`: the slope below zero of the piecewise
// linear activations (1 for identity, 0 for relu), and the factor of elu. The other, curved activations are long.
// Kernels, which unroll over the values of a thread, call them in a rolled loop.
#pragma once

enum Activation { LINEAR = 0, SIGMOID = 1, TANH = 2, ELU = 3, SILU = 4, GELU_TANH = 5, GELU = 6 };

// The factors of the curved activations: `gate` is sigmoid(z), tanh(z), exp(z) - 1 or, for h = z gate, the gate;
// `density` is the derivative of the gate. For infinite z they are the limit of the gate and 0.
template <typename A>
struct Gate {
    A gate, density;
};

// exp(x^2) (1 + 2x) erfc(x) for x >= 0 as a polynomial in (x - 3.75) / (x + 3.75), exact to 2e-16, after Shepherd and
// Laframboise (1981) with coefficients fitted anew. CUDA's erfc for double is a function call, which makes kernels
// spill registers.
__device__ __forceinline__ double erfc_inline(double z) {
    constexpr double c[] = {
        1.2375126308378275,     -0.14024059858554697,   0.0035854154854790257,   0.0822767384901452,
        -0.10880393014244462,   0.09230432116037748,    -0.05869339857664934,    0.028362277418956406,
        -0.009746579683265262,  0.0017556258528952954,  0.000293714378044958,    -0.0002901540805408417,
        5.164652974177416e-05,  2.238423915508223e-05,  -1.1438048033346894e-05, -9.73559896736775e-07,
        1.7419821586224816e-06, -5.721823060322409e-08, -2.4857126248016745e-07, 2.3263508708859127e-08,
        3.197926671666804e-08,  -3.744210080962021e-09, -2.6231073471334755e-09, 3.1114333809799285e-10};
    constexpr int degree = sizeof(c) / sizeof(c[0]) - 1;
    const double x = fabs(z), t = (x - 3.75) / (x + 3.75), square = x * x;
    double sum = c[degree];
#pragma unroll
    for (int i = degree - 1; i >= 0; --i) sum = fma(sum, t, c[i]);
    const double tail = sum / fma(2.0, x, 1.0) * exp(-square) * (1.0 - fma(x, x, -square));
    const double above = square < 750.0 ? tail : (z == z ? 0.0 : z);
    return z < 0.0 ? 2.0 - above : above;
}
__device__ __forceinline__ float erfc_inline(float z) { return erfc(z); }

// The normal distribution and its density, for gelu. erfc keeps the digits that 1 + erf would lose below zero.
template <typename A>
__device__ __forceinline__ Gate<A> normal_gate(A z) {
    return {A(0.5) * erfc_inline(z * A(-0.70710678118654752440)), A(0.39894228040143267794) * exp(A(-0.5) * z * z)};
}

template <typename A>
__device__ __forceinline__ Gate<A> gate_of(A z, int activation) {
    if (activation == GELU) return normal_gate(z);
    if (activation <= ELU && activation >= TANH) {
        // tanh(-|z|) from expm1(-2 |z|): neither cancellation nor overflow.
        const A e = expm1(activation == TANH ? A(-2) * fabs(z) : z);
        if (activation == ELU) return {e, e + A(1)};
        const A h = copysign(e / (e + A(2)), z);
        return {h, fma(-h, h, A(1))};
    }
    // gelu_tanh: (1 + tanh(u)) / 2 = sigmoid(2u), where 2u = z (a + b z^2).
    const A a = A(1.5957691216057308), b = A(0.07135481627260025);
    const A inner = activation == GELU_TANH ? z * fma(b, z * z, a) : z;
    // exp(-|u|) gives the sigmoid of either sign without losing digits of the derivative where the sigmoid is nearly 0
    // or 1.
    const A decay = exp(-fabs(inner)), above = A(1) / (A(1) + decay), slope = decay * above * above;
    const bool flat = slope == A(0);  // the inner derivative may be infinite there
    return {inner < A(0) ? decay * above : above,
            activation == GELU_TANH && !flat ? slope * fma(A(3) * b, z * z, a) : slope};
}

// The piecewise linear activations: z or the gradient times the slope at z. For alpha = 0, minus infinity gives 0, not
// NaN.
template <typename A>
__device__ __forceinline__ A linear(A value, A z, A alpha) {
    return z <= A(0) ? (alpha == A(0) ? A(0) : alpha * value) : value;
}

template <typename A>
__device__ __forceinline__ A curved(A z, int activation, A alpha) {
    if (activation == ELU && !(z <= A(0))) return z;
    const A gate = gate_of(z, activation).gate;
    if (activation == ELU) return alpha * gate;
    if (activation < ELU) return gate;
    return gate == A(0) ? A(0) : z * gate;  // 0, not NaN, for minus infinity
}

template <typename A>
__device__ __forceinline__ A curved_derivative(A z, int activation, A alpha) {
    if (activation == ELU && !(z <= A(0))) return A(1);
    const Gate<A> gate = gate_of(z, activation);
    if (activation == ELU) return alpha * gate.density;
    if (activation < ELU) return gate.density;
    return gate.density == A(0) ? gate.gate : gate.gate + z * gate.density;
}

template <typename A>
__device__ __forceinline__ A activate(A z, int activation, A alpha) {
    return activation == LINEAR ? linear(z, z, alpha) : curved(z, activation, alpha);
}

// dy phi'(z)
template <typename A>
__device__ __forceinline__ A activation_backward(A dy, A z, int activation, A alpha) {
    return activation == LINEAR ? linear(dy, z, alpha) : dy * curved_derivative(z, activation, alpha);
}

template <typename A>
struct Derivatives {
    A first, second;
};

// phi' and phi'' of the curved activations, 0 at infinity. For h = z gate, phi'' = 2 gate' + z gate''.
template <typename A>
__device__ __forceinline__ Derivatives<A> curved_derivatives(A z, int activation, A alpha) {
    if (activation == ELU && !(z <= A(0))) return {A(1), z == z ? A(0) : z};
    const Gate<A> gate = gate_of(z, activation);
    const A density = gate.density, fall = fma(A(-2), gate.gate, A(1));  // a sigmoid s has s'' = s' (1 - 2 s)
    if (activation == ELU) return {alpha * density, alpha * density};
    if (activation == TANH) return {density, A(-2) * gate.gate * density};
    if (activation == SIGMOID) return {density, fall * density};
    if (density == A(0)) return {gate.gate, A(0)};
    A bend = activation == GELU ? -z : fall;  // gate'' / gate'
    if (activation == GELU_TANH) {
        const A a = A(1.5957691216057308), b = A(0.07135481627260025), slope = fma(z * z, A(3) * b, a);
        bend = fma(fall, slope, A(6) * b * z / slope);
    }
    return {gate.gate + z * density, density * fma(z, bend, A(2))};
}

// Rotates the values by one place, so that a rolled loop reaches all of them through values[0]: registers cannot be
// indexed. The code of the curved activations is then emitted once.
template <int N, typename A>
__device__ __forceinline__ void rotate(A (&values)[N]) {
    const A first = values[0];
#pragma unroll
    for (int i = 0; i + 1 < N; ++i) values[i] = values[i + 1];
    values[N - 1] = first;
}

// z = phi(z)
template <int N, typename A>
__device__ __forceinline__ void activate_all(A (&z)[N], int activation, A alpha) {
    if (activation == LINEAR) {
#pragma unroll
        for (int i = 0; i < N; ++i) z[i] = linear(z[i], z[i], alpha);
        return;
    }
#pragma unroll 1
    for (int i = 0; i < N; ++i) {
        z[0] = curved(z[0], activation, alpha);
        rotate(z);
    }
}

// dy = dy phi'(z)
template <int N, typename A>
__device__ __forceinline__ void activation_backward_all(A (&dy)[N], A (&z)[N], int activation, A alpha) {
    if (activation == LINEAR) {
#pragma unroll
        for (int i = 0; i < N; ++i) dy[i] = linear(dy[i], z[i], alpha);
        return;
    }
#pragma unroll 1
    for (int i = 0; i < N; ++i) {
        dy[0] *= curved_derivative(z[0], activation, alpha);
        rotate(dy);
        rotate(z);
    }
}
