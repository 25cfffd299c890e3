// How fast memory is: copies in 16-byte words, as they lie, and in slices of the rows of a matrix.
// Called by: ../facts.py

extern "C" __global__ void __launch_bounds__(512) bnk_copy_words(const uint4* source, uint4* target, long long words) {
    const long long step = gridDim.x * (long long)blockDim.x;
    for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < words; i += step) target[i] = source[i];
}

// A block owns a slice of every row, `blockDim.x` words wide, and goes through the rows `blockDim.y` at a time, eight
// of them in flight per thread: the way of a batch norm whose blocks own channels. rows: a multiple of 8 blockDim.y.
extern "C" __global__ void __launch_bounds__(256)
    bnk_copy_slices(const uint4* source, uint4* target, long long rows, long long words_of_a_row) {
    const long long column = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    for (long long row = threadIdx.y; row < rows; row += 8 * blockDim.y) {
        uint4 held[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) held[i] = source[(row + i * blockDim.y) * words_of_a_row + column];
#pragma unroll
        for (int i = 0; i < 8; ++i) target[(row + i * blockDim.y) * words_of_a_row + column] = held[i];
    }
}
