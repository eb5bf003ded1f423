/* s8_neon_i8mm.c - the int8 family on NEON with the int8 matrix product (Armv8.6-A, optional from
 * Armv8.2-A): Neoverse V1, N2 and later, Apple M2 and later.
 *
 * smmla makes four sums of 8 products each: twice the products of sdot. neon_pairs.h has the loops.
 *
 * One or two rows of x leave half of a pair idle or wait for W: they, and what is no product, are
 * those of s8_neon.c.
 *
 * Source: Arm ARM (DDI 0487), chapter C7: SMMLA, ZIP1, ZIP2. History: checked bit by bit under
 * qemu, never timed: no processor with it was at hand.
 */
#include "../kernels.h"
#include "s8_epilogue.h"

#include <arm_neon.h>
#include <assert.h>

#if !defined(__aarch64__) || !defined(__ARM_FEATURE_DOTPROD) || !defined(__ARM_FEATURE_MATMUL_INT8)
#error "compile with -march=armv8.2-a+dotprod+i8mm"
#endif

typedef int32_t pair_result;
typedef int32x4_t pair_block;

static inline pair_block multiply_add(pair_block sums, int8x16_t x, int8x16_t w) {
    return vmmlaq_s32(sums, x, w);
}

#include "neon_pairs.h"

#define LENDER_S8 bnbq_s8_neon
#include "borrow_s8.h"

enum {
    FEW = 2,   /* rows of x that are left to s8_neon.c, at most */
    STEP = 16, /* columns that x and W are padded to */
};

/* ------------------------------------------------------------------ y = x . W^T */

static int64_t padded(int64_t k) {
    return (k + STEP - 1) / STEP * STEP;
}

/* The columns of x past k meet zeros of W: they are left as they are. */
static size_t packed_bytes_s8_neon_i8mm(int64_t m, int64_t k) {
    return m <= FEW ? bnbq_s8_neon.packed_bytes(m, k) : pairs_bytes(m, padded(k));
}

static void pack_s8_neon_i8mm(const int8_t *x, int64_t i, int64_t m, int64_t k, void *packed) {
    assert(i >= 0 && i < m && m <= BNBQ_TILE_M && k >= 1 && k <= BNBQ_MAX_K_S8);
    if (m <= FEW) {
        bnbq_s8_neon.pack(x, i, m, k, packed);
        return;
    }
    int64_t step, c = 0;
    int8_t *to = row_of_x(packed, i, m, padded(k), &step);
    for (; c + DEPTH <= k; c += DEPTH, to += step)
        memcpy(to, x + c, DEPTH);
    if (c < k)
        memcpy(to, x + c, (size_t)(k - c));
}

static size_t scratch_bytes_s8_neon_i8mm(int64_t m, int64_t k) {
    return m <= FEW ? bnbq_s8_neon.scratch_bytes(m, k) : BNBQ_TILE_N * CHUNK;
}

typedef struct weight {
    const int8_t *w;
    int64_t ldw, k;
} weight;

static void interleave(const void *of, int64_t rows, int64_t at, int64_t bytes, void *chunk) {
    const weight *weight = of;
    int8_t rest[2][STEP] = {{0}};
    for (int64_t r = 0; r < rows; r += 2) {
        const int8_t *even = weight->w + r * weight->ldw + at;
        const int8_t *odd = r + 1 < rows ? even + weight->ldw : even;
        int8_t *to = row_of_w(chunk, r);
        for (int64_t c = 0; c < bytes; c += STEP, to += GROUP * STEP) {
            const int8_t *from[2] = {even + c, odd + c};
            if (weight->k - at - c < STEP)
                for (int i = 0; i < 2; i++)
                    from[i] = memcpy(rest[i], from[i], (size_t)(weight->k - at - c));
            store_pair(to, vld1q_s8(from[0]), vld1q_s8(from[1]));
        }
    }
}

static void linear_s8_neon_i8mm(const void *packed, int64_t m, const int8_t *w, int64_t ldw,
                                int64_t rows, int64_t k, int32_t *y, int64_t ldy, void *scratch) {
    assert(m >= 1 && m <= BNBQ_TILE_M && rows >= 1 && rows <= BNBQ_TILE_N);
    assert(k >= 1 && k <= BNBQ_MAX_K_S8 && ldw >= k && ldy >= rows);
    if (m <= FEW) {
        bnbq_s8_neon.run(packed, m, w, ldw, rows, k, y, ldy, scratch);
        return;
    }
    const weight weight = {w, ldw, k};
    run_pairs(packed, m, padded(k), rows, y, ldy, scratch, interleave, &weight);
}

const bnbq_s8_kernels bnbq_s8_neon_i8mm = {
    .isa = "i8mm",
    .level = BNBQ_ISA_I8MM,
    .needs = BNBQ_CPU_OF_THIS_FILE,
    .quantize = borrowed_quantize_s8,
    .dequantize = borrowed_dequantize_s8,
    .packed_bytes = packed_bytes_s8_neon_i8mm,
    .pack = pack_s8_neon_i8mm,
    .scratch_bytes = scratch_bytes_s8_neon_i8mm,
    .run = linear_s8_neon_i8mm,
    .scale = scale_s8,
    .decode_columns = decode_columns_s8,
    .add_outliers = add_outliers_s8,
    .backward = borrowed_backward_s8,
};
