/* s8_rows.cu - rows of x to int8, and which of their columns stay float.
 *
 * flag_columns: one block per word of flags, that is per 32 columns, over all rows of the batch.
 * So there is nothing to clear and nothing atomic; 64 bytes of a bf16 row are two whole sectors.
 * quantize_rows: one block per row. For up to ALL_ROWS_MOST (s8_linear.cu) rows each block looks
 * for the outlier columns of the whole batch itself, from L2: that saves a launch, which would take
 * longer. The least number of blocks in the launch bounds is not for occupancy: with it the
 * compiler keeps 8 loads under way, without it two.
 */
#include "s8.cuh"

enum { FLAG_THREADS = 512, ROW_THREADS = 256, LANES_PER_ROW = CHUNK / 8 };

template <bnbq_dtype X>
__global__ void __launch_bounds__(FLAG_THREADS, 1)
    flag_columns_kernel(const __grid_constant__ s8_linear op) {
    uint32_t *scratch = (uint32_t *)shared_memory();
    int thread = (int)threadIdx.x, shift = thread % LANES_PER_ROW * 8;
    int64_t c = (int64_t)blockIdx.x * CHUNK + shift;
    uint32_t word = find_in_rows<X>(op, thread / LANES_PER_ROW, FLAG_THREADS / LANES_PER_ROW, c)
                    << shift;
#pragma unroll
    for (int mask = 1; mask < WARP; mask *= 2)
        word |= shuffle_xor(word, mask);
    if (thread % WARP == 0)
        scratch[thread / WARP] = word;
    sync_threads();
    if (thread == 0) {
        for (int i = 1; i < FLAG_THREADS / WARP; i++)
            word |= scratch[i];
        ((uint32_t *)op.flags)[blockIdx.x] = word;
    }
}

template <bnbq_dtype X>
__global__ void __launch_bounds__(ROW_THREADS, 4)
    quantize_rows_kernel(const __grid_constant__ s8_linear op) {
    int64_t row = blockIdx.x;
    uint2 result =
        quantize_row<X, ROW_THREADS>(op, row, op.q + row * op.padded,
                                     op.flags + row * op.flags_stride, (uint32_t *)shared_memory());
    if (threadIdx.x == 0)
        op.rows[row] = result;
}

template <bnbq_dtype X> static bnbq_status run_rows(bnbq_cuda_call *call, const s8_linear &op) {
    if (op.rule == FLAGGED)
        TRY(launch<flag_columns_kernel<X>>(call, dim3((unsigned)(op.padded / CHUNK)), FLAG_THREADS,
                                           FLAG_THREADS / WARP * sizeof(uint32_t), op));
    return launch<quantize_rows_kernel<X>>(call, dim3((unsigned)op.m), ROW_THREADS,
                                           2 * ROW_THREADS / WARP * sizeof(uint32_t), op);
}

bnbq_status run_s8_rows(bnbq_cuda_call *call, const s8_linear &op) {
    return op.x.dtype == BNBQ_F32    ? run_rows<BNBQ_F32>(call, op)
           : op.x.dtype == BNBQ_BF16 ? run_rows<BNBQ_BF16>(call, op)
                                     : run_rows<BNBQ_F16>(call, op);
}
