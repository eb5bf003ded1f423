/* s8_neon_i8mm.c - the int8 family on NEON with the int8 matrix product (Armv8.6-A, optional from
 * Armv8.2-A): Neoverse V1, N2 and later, Apple M2 and later.
 *
 * smmla multiplies two rows of 8 int8 by two other rows of 8 and adds the four sums to a 2 x 2
 * block of int32: twice the products of sdot. It wants pairs of rows side by side, 8 columns of
 * each. x is packed that way; a chunk of W is brought into that order once, for all rows of x, and
 * stays in L1 while they pass over it. 8 rows of x times 8 rows of W stay in registers: 16 sums, 16
 * instructions for every 8 loads.
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

enum {
    FEW = 2,   /* rows of x that are left to s8_neon.c, at most */
    STEP = 16, /* columns that x and W are padded to */
    DEPTH = 8, /* columns of one instruction */
    GROUP = 8, /* rows of x, and of W, in registers */
    PAIRS = GROUP / 2,
    CHUNK = 256, /* columns of W in L1: 16 KB of BNBQ_TILE_N rows */
};

/* ------------------------------------------------------------------ borrowed from dot product */

static int64_t quantize_s8_neon_i8mm(const float *x, int64_t count, float threshold, int8_t *q,
                                     float *absmax) {
    return bnbq_s8_neon.quantize(x, count, threshold, q, absmax);
}

static void dequantize_s8_neon_i8mm(const int8_t *q, int64_t count, float absmax, float *w) {
    bnbq_s8_neon.dequantize(q, count, absmax, w);
}

static void backward_s8_neon_i8mm(const float *gy, int64_t ldg, int64_t m, const int8_t *w,
                                  int64_t ldw, int64_t n, int64_t cols, float *gx, int64_t ldgx,
                                  void *scratch) {
    bnbq_s8_neon.backward(gy, ldg, m, w, ldw, n, cols, gx, ldgx, scratch);
}

/* ------------------------------------------------------------------ y = x . W^T */

static int64_t padded(int64_t k) {
    return (k + STEP - 1) / STEP * STEP;
}

static int64_t least(int64_t a, int64_t b) {
    return a < b ? a : b;
}

/* Of the group of x that begins with row i. */
static int64_t pairs_from(int64_t i, int64_t m) {
    return (least(m - i, GROUP) + 1) / 2;
}

/* Packed form: [group][k / DEPTH][pair][2][DEPTH]. Columns past k meet zeros of W, and what a row
 * past m gives is dropped: both are left as they are. */
static size_t packed_bytes_s8_neon_i8mm(int64_t m, int64_t k) {
    return m <= FEW ? bnbq_s8_neon.packed_bytes(m, k) : (size_t)((m + 1) / 2 * 2 * padded(k));
}

static void pack_s8_neon_i8mm(const int8_t *x, int64_t i, int64_t m, int64_t k, void *packed) {
    assert(i >= 0 && i < m && m <= BNBQ_TILE_M && k >= 1 && k <= BNBQ_MAX_K_S8);
    if (m <= FEW) {
        bnbq_s8_neon.pack(x, i, m, k, packed);
        return;
    }
    const int64_t first = i / GROUP * GROUP, step = pairs_from(first, m) * 2 * DEPTH;
    int8_t *to = (int8_t *)packed + first * padded(k) + (i - first) * DEPTH;
    int64_t c = 0;
    for (; c + DEPTH <= k; c += DEPTH, to += step)
        memcpy(to, x + c, DEPTH);
    if (c < k)
        memcpy(to, x + c, (size_t)(k - c));
}

static size_t scratch_bytes_s8_neon_i8mm(int64_t m, int64_t k) {
    return m <= FEW ? bnbq_s8_neon.scratch_bytes(m, k) : BNBQ_TILE_N * CHUNK;
}

/* A chunk of W as [group][CHUNK / DEPTH][pair][2][DEPTH], with zeros up to STEP columns. Pairs that
 * do not exist are left as they are, as in x. */
static void interleave(const int8_t *w, int64_t ldw, int64_t rows, int64_t cols, int8_t *out) {
    int8_t rest[2][STEP] = {{0}};
    for (int64_t r = 0; r < rows; r += 2) {
        const int8_t *even = w + r * ldw, *odd = r + 1 < rows ? even + ldw : even;
        int8_t *to = out + r / GROUP * GROUP * CHUNK + r % GROUP * DEPTH;
        for (int64_t c = 0; c < cols; c += STEP, to += GROUP * STEP) {
            const int8_t *from[2] = {even + c, odd + c};
            if (cols - c < STEP)
                for (int i = 0; i < 2; i++)
                    from[i] = memcpy(rest[i], from[i], (size_t)(cols - c));
            const int64x2_t a = vreinterpretq_s64_s8(vld1q_s8(from[0]));
            const int64x2_t b = vreinterpretq_s64_s8(vld1q_s8(from[1]));
            vst1q_s8(to, vreinterpretq_s8_s64(vzip1q_s64(a, b)));
            vst1q_s8(to + GROUP * DEPTH, vreinterpretq_s8_s64(vzip2q_s64(a, b)));
        }
    }
}

/* y[2 * pairs, GROUP] of some columns, stored or added. */
static inline __attribute__((always_inline)) void multiply(const int pairs, const int8_t *x,
                                                           const int8_t *w, int64_t cols,
                                                           int32_t *y, int64_t ldy, bool add) {
    int32x4_t sums[PAIRS][PAIRS];
    for (int i = 0; i < pairs; i++)
        for (int r = 0; r < PAIRS; r++)
            sums[i][r] = vdupq_n_s32(0);
    for (int64_t c = 0; c < cols; c += DEPTH, x += pairs * 2 * DEPTH, w += GROUP * DEPTH) {
        int8x16_t right[PAIRS];
        for (int r = 0; r < PAIRS; r++)
            right[r] = vld1q_s8(w + r * 2 * DEPTH);
        for (int i = 0; i < pairs; i++) {
            const int8x16_t left = vld1q_s8(x + i * 2 * DEPTH);
            for (int r = 0; r < PAIRS; r++)
                sums[i][r] = vmmlaq_s32(sums[i][r], left, right[r]);
        }
    }
    /* The halves of a block belong to two rows of y. */
    for (int i = 0; i < pairs; i++)
        for (int r = 0; r < PAIRS; r += 2) {
            const int64x2_t a = vreinterpretq_s64_s32(sums[i][r]);
            const int64x2_t b = vreinterpretq_s64_s32(sums[i][r + 1]);
            const int32x4_t row[2] = {vreinterpretq_s32_s64(vzip1q_s64(a, b)),
                                      vreinterpretq_s32_s64(vzip2q_s64(a, b))};
            for (int j = 0; j < 2; j++) {
                int32_t *to = y + (2 * i + j) * ldy + 2 * r;
                vst1q_s32(to, add ? vaddq_s32(vld1q_s32(to), row[j]) : row[j]);
            }
        }
}

static void multiply_any(int64_t pairs, const int8_t *x, const int8_t *w, int64_t cols, int32_t *y,
                         int64_t ldy, bool add) {
    switch (pairs) {
    case 1: multiply(1, x, w, cols, y, ldy, add); break;
    case 2: multiply(2, x, w, cols, y, ldy, add); break;
    case 3: multiply(3, x, w, cols, y, ldy, add); break;
    default: multiply(PAIRS, x, w, cols, y, ldy, add); break;
    }
}

/* xs <= GROUP rows of x by rows <= GROUP of W: what would be stored past them is not. */
static void multiply_group(int64_t xs, const int8_t *x, const int8_t *w, int64_t cols, int64_t rows,
                           int32_t *y, int64_t ldy, bool add) {
    if (xs % 2 == 0 && rows == GROUP) {
        multiply_any(xs / 2, x, w, cols, y, ldy, add);
        return;
    }
    int32_t edge[GROUP][GROUP];
    multiply_any((xs + 1) / 2, x, w, cols, edge[0], GROUP, false);
    for (int64_t i = 0; i < xs; i++)
        for (int64_t r = 0; r < rows; r++)
            y[i * ldy + r] = (add ? y[i * ldy + r] : 0) + edge[i][r];
}

static void linear_s8_neon_i8mm(const void *packed, int64_t m, const int8_t *w, int64_t ldw,
                                int64_t rows, int64_t k, int32_t *y, int64_t ldy, void *scratch) {
    assert(m >= 1 && m <= BNBQ_TILE_M && rows >= 1 && rows <= BNBQ_TILE_N);
    assert(k >= 1 && k <= BNBQ_MAX_K_S8 && ldw >= k && ldy >= rows);
    if (m <= FEW) {
        bnbq_s8_neon.run(packed, m, w, ldw, rows, k, y, ldy, scratch);
        return;
    }
    for (int64_t c = 0; c < k; c += CHUNK) {
        const int64_t cols = least(k - c, CHUNK);
        interleave(w + c, ldw, rows, cols, scratch);
        for (int64_t i = 0; i < m; i += GROUP) {
            const int8_t *x = (const int8_t *)packed + i * padded(k) + pairs_from(i, m) * 2 * c;
            for (int64_t r = 0; r < rows; r += GROUP)
                multiply_group(least(m - i, GROUP), x, (const int8_t *)scratch + r * CHUNK,
                               padded(cols), least(rows - r, GROUP), y + i * ldy + r, ldy, c > 0);
        }
    }
}

const bnbq_s8_kernels bnbq_s8_neon_i8mm = {
    .isa = "i8mm",
    .level = BNBQ_ISA_I8MM,
    .needs = BNBQ_CPU_OF_THIS_FILE,
    .quantize = quantize_s8_neon_i8mm,
    .dequantize = dequantize_s8_neon_i8mm,
    .packed_bytes = packed_bytes_s8_neon_i8mm,
    .pack = pack_s8_neon_i8mm,
    .scratch_bytes = scratch_bytes_s8_neon_i8mm,
    .run = linear_s8_neon_i8mm,
    .scale = scale_s8,
    .decode_columns = decode_columns_s8,
    .add_outliers = add_outliers_s8,
    .backward = backward_s8_neon_i8mm,
};
