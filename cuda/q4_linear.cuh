/* q4_linear.cuh - what the parts of bnbq_cuda_linear_4bit share.
 *
 *   q4_linear.cu  the front: tensors, and which kernel for which problem
 *   q4_mma.cuh    16-bit activations on tensor cores, whole blocks in each row; one .cu file for
 *                 bf16 and one for fp16
 *   q4_wgmma.cu   the same for many rows with the warpgroup products of 9.0
 *   q4_fma.cu     everything else: fp32, blocks that cross rows, rows that start in the middle of a
 *                 byte, processors before 8.0
 */
#ifndef BNBQ_Q4_LINEAR_CUH
#define BNBQ_Q4_LINEAR_CUH

#include "absmax.cuh"

/* y = x . W^T + bias with x[m, k] in the compute dtype. */
struct q4_operands {
    matrix x, y;
    const uint8_t *qweight;
    bnbq_absmax absmax;
    int64_t m, n, k;
    int blocksize_log2;
    const void *bias; /* [n] with a stride, or NULL */
    bnbq_dtype bias_dtype;
    int64_t bias_stride;
};

struct q4_codebook {
    float values[16];
};

/* Which kernel: q4_fma.cu's, or "tokens x tiles" of q4_mma.cuh, where a block takes `tokens` rows
 * of x and each of its warps `tiles` tiles of 16 rows of W. HALVES: for blocks of 32. */
enum q4_shape_id {
    Q4_FMA,
    Q4_8x1,
    Q4_8x2,
    Q4_16x1,
    Q4_16x2,
    Q4_32x1,
    Q4_64x2,
    Q4_HALVES_16x1,
    Q4_HALVES_64x1,
    Q4_WGMMA,
};

bnbq_status q4_mma_bf16(bnbq_cuda_call *call, const q4_operands *op, const bnbq_format *format,
                        q4_shape_id shape);
bnbq_status q4_mma_f16(bnbq_cuda_call *call, const q4_operands *op, const bnbq_format *format,
                       q4_shape_id shape);
/* The dtype of op->x. */
bnbq_status q4_wgmma(bnbq_cuda_call *call, const q4_operands *op, const bnbq_format *format);
/* batch_invariant: the same order of additions for every m. */
bnbq_status q4_fma(bnbq_cuda_call *call, const q4_operands *op, const bnbq_format *format,
                   bool batch_invariant);

/* Blocks of rows of W along x, tiles of tokens along y and, where those are too many, z. */
static inline dim3 q4_grid(const q4_operands *op, int64_t rows, int64_t tokens) {
    const int64_t most = 65535, tiles = ceil_div(op->m, tokens);
    return dim3((unsigned)ceil_div(op->n, rows), (unsigned)(tiles < most ? tiles : most),
                (unsigned)ceil_div(tiles, most));
}
/* This block's tile of tokens; it may lie behind the last one. */
DEVICE int64_t q4_tile() {
    return (int64_t)blockIdx.z * gridDim.y + blockIdx.y;
}

template <bool DOUBLE> struct q4_scales;
template <> struct q4_scales<false> {};
template <> struct q4_scales<true> { dynamic_map map; };

/* A scale as it was loaded. */
template <bool DOUBLE> struct raw_scale;
template <> struct raw_scale<false> { float value; };
template <> struct raw_scale<true> {
    uint32_t code;
    float absmax2;
};

DEVICE void load_scale(const bnbq_absmax &absmax, uint32_t block, raw_scale<false> *scale) {
    scale->value = absmax.absmax[block];
}
DEVICE void load_scale(const bnbq_absmax &absmax, uint32_t block, raw_scale<true> *scale) {
    scale->code = absmax.codes[block];
    scale->absmax2 = absmax.absmax2[block / BNBQ_ABSMAX_BLOCK];
}
DEVICE float decode_scale(raw_scale<false> scale, const float *, float) {
    return scale.value;
}
DEVICE float decode_scale(raw_scale<true> scale, const float *map, float offset) {
    return decode_absmax(map[scale.code], scale.absmax2, offset);
}

template <bool DOUBLE> q4_scales<DOUBLE> q4_get_scales() {
    q4_scales<DOUBLE> scales;
    if constexpr (DOUBLE)
        scales.map = get_dynamic_map();
    return scales;
}

/* The result of one element of y: its sum gets the bias and goes to its place. */
DEVICE void q4_store(const q4_operands &op, int64_t token, int64_t row, float sum) {
    if (op.bias)
        sum = add_rn(sum, load_float(op.bias, op.bias_dtype, row * op.bias_stride));
    store_float(op.y.data, op.y.dtype, token * op.y.ld + row, sum);
}

#endif
