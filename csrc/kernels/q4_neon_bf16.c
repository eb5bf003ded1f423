/* q4_neon_bf16.c - the 4-bit family on NEON with the bf16 matrix product (Armv8.6-A, optional from
 * Armv8.2-A): Neoverse V1, N2 and later, Apple M2 and later.
 *
 * bfmmla makes four sums of 4 products each: four times the products of an fp32 multiply-add.
 * neon_pairs.h has the loops. The 16 values of a block are scaled and rounded to bf16 once, as two
 * tables of bytes: 16 weights are two look-ups and two zips, fewer than in fp32, so that one row of
 * x is multiplied this way too. High nibbles are the even elements, low ones the odd: x is split
 * the same way in each group of 32.
 *
 * The instruction rounds its sums to odd, not to nearest, and takes denormals for zeros. What is no
 * bf16 product is that of q4_neon.c.
 *
 * Source: Arm ARM (DDI 0487), chapter C7: BFMMLA, BFCVTN, TBL, LD4. History: checked under qemu,
 * never timed: no processor with it was at hand.
 */
#include "../kernels.h"

#include <arm_neon.h>
#include <assert.h>

#if !defined(__aarch64__) || !defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#error "compile with -march=armv8.2-a+bf16"
#endif

typedef float pair_result;
typedef float32x4_t pair_block;

static inline pair_block multiply_add(pair_block sums, int8x16_t x, int8x16_t w) {
    return vbfmmlaq_f32(sums, vreinterpretq_bf16_s8(x), vreinterpretq_bf16_s8(w));
}

#include "neon_pairs.h"

#define LENDER_Q4 bnbq_q4_neon
#include "borrow_q4.h"

enum {
    CODES = 32, /* decoded at once: 16 bytes */
    SIZE = 2,   /* of a bf16 */
};

/* ------------------------------------------------------------------ y = x . W^T in bf16 */

static size_t packed_bytes_q4_neon_bf16(int64_t m, int64_t k) {
    return pairs_bytes(m, k * SIZE);
}

/* The upper halves of x, exact: of each 32 the even elements, then the odd. */
static void pack_q4_neon_bf16(const float *x, int64_t i, int64_t m, int64_t k, void *packed) {
    assert(i >= 0 && i < m && m <= BNBQ_TILE_M && k % CODES == 0);
    int64_t step;
    int8_t *to = row_of_x(packed, i, m, k * SIZE, &step);
    for (int64_t c = 0; c < k; c += CODES, to += CODES * SIZE / DEPTH * step)
        for (int h = 0; h < 2; h++) {
            const uint16x8x4_t halves = vld4q_u16((const uint16_t *)(x + c + 16 * h));
            const int8x16_t even = vreinterpretq_s8_u16(halves.val[1]);
            const int8x16_t odd = vreinterpretq_s8_u16(halves.val[3]);
            vst1_s8(to + 2 * h * step, vget_low_s8(even));
            vst1_s8(to + (2 * h + 1) * step, vget_high_s8(even));
            vst1_s8(to + (2 * h + 4) * step, vget_low_s8(odd));
            vst1_s8(to + (2 * h + 5) * step, vget_high_s8(odd));
        }
}

static size_t scratch_bytes_q4_neon_bf16(int64_t m, int64_t k) {
    (void)m;
    (void)k;
    return BNBQ_TILE_N * CHUNK;
}

/* The lower and the upper bytes of the values of a block. */
static inline uint8x16x2_t table_of(const float *codebook, float absmax) {
    int8x16_t halves[2];
    for (int h = 0; h < 2; h++) {
        const float32x4_t low = vmulq_n_f32(vld1q_f32(codebook + 8 * h), absmax);
        const float32x4_t high = vmulq_n_f32(vld1q_f32(codebook + 8 * h + 4), absmax);
        halves[h] = vreinterpretq_s8_bf16(vcvtq_high_bf16_f32(vcvtq_low_bf16_f32(low), high));
    }
    return vuzpq_u8(vreinterpretq_u8_s8(halves[0]), vreinterpretq_u8_s8(halves[1]));
}

/* 32 weights: the even ones, then the odd. */
static inline void decode(const uint8_t *q, uint8x16x2_t table, int8x16_t out[4]) {
    const uint8x16_t bytes = vld1q_u8(q);
    const uint8x16_t codes[2] = {vshrq_n_u8(bytes, 4), vandq_u8(bytes, vdupq_n_u8(15))};
    for (int h = 0; h < 2; h++) {
        const uint8x16_t low = vqtbl1q_u8(table.val[0], codes[h]);
        const uint8x16_t high = vqtbl1q_u8(table.val[1], codes[h]);
        out[2 * h] = vreinterpretq_s8_u8(vzip1q_u8(low, high));
        out[2 * h + 1] = vreinterpretq_s8_u8(vzip2q_u8(low, high));
    }
}

static void decode_chunk(const void *of, int64_t rows, int64_t at, int64_t bytes, void *chunk) {
    const bnbq_q4_rows *w = of;
    const int64_t end = (at + bytes) / SIZE;
    for (int64_t r = 0; r < rows; r += 2) {
        const int64_t pair[2] = {r, least(r + 1, rows - 1)};
        int8_t *to = row_of_w(chunk, r);
        for (int64_t c = at / SIZE; c < end;) {
            const int64_t block = c / w->blocksize, blocks = w->k / w->blocksize;
            uint8x16x2_t table[2];
            for (int j = 0; j < 2; j++)
                table[j] = table_of(w->codebook, w->absmax[pair[j] * blocks + block]);
            for (; c < least(end, (block + 1) * w->blocksize); c += CODES) {
                int8x16_t weights[2][4];
                for (int j = 0; j < 2; j++)
                    decode(w->qweight + (pair[j] * w->k + c) / 2, table[j], weights[j]);
                for (int v = 0; v < 4; v++, to += 2 * GROUP * DEPTH)
                    store_pair(to, weights[0][v], weights[1][v]);
            }
        }
    }
}

static void linear_q4_neon_bf16(const void *packed, int64_t m, const bnbq_q4_rows *w, int64_t rows,
                                float *y, int64_t ldy, void *scratch) {
    assert(m >= 1 && m <= BNBQ_TILE_M && rows >= 1 && rows <= BNBQ_TILE_N && ldy >= rows);
    run_pairs(packed, m, w->k * SIZE, rows, y, ldy, scratch, decode_chunk, w);
}

const bnbq_q4_kernels bnbq_q4_neon_bf16 = {
    .isa = "neonbf16",
    .level = BNBQ_ISA_NEONBF16,
    .needs = BNBQ_CPU_OF_THIS_FILE,
    .quantize = borrowed_quantize_q4,
    .dequantize = borrowed_dequantize_q4,
    .linear = BORROWED_LINEAR_Q4,
    .bf16 = {{1,
              {packed_bytes_q4_neon_bf16, pack_q4_neon_bf16, scratch_bytes_q4_neon_bf16,
               linear_q4_neon_bf16}}},
    .backward = borrowed_backward_q4,
};
