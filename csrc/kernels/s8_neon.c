/* s8_neon.c - the int8 family on NEON with the dot-product instruction (Armv8.2-A and later).
 *
 * sdot adds four int8 products to each of four int32 lanes. Rows of W are read as they lie in
 * memory, rows of x are padded with zeros to 16 columns once; a ragged end of W goes through a
 * padded copy. 4 rows of x times 4 rows of W (or 1 times 8) stay in registers.
 *
 * Sources: Arm ARM (DDI 0487), chapter C7: SDOT, FCVTNS, SQXTN. History: written after the AVX
 * kernels; checked bit by bit under qemu, its speed has not been measured on a processor.
 */
#include "../kernels.h"
#include "neon_backward.h"
#include "s8_epilogue.h"

#include <assert.h>
#include <math.h>

#if !defined(__aarch64__) || !defined(__ARM_FEATURE_DOTPROD)
#error "compile with -march=armv8.2-a+dotprod"
#endif

enum {
    STEP = 16,   /* columns of one vector */
    CHUNK = 512, /* columns of W that are multiplied with every row of x while in L1 */
};

/* ------------------------------------------------------------------ codes */

/* Which of four values are kept: |x| < threshold, which NaN is not. */
static inline uint32x4_t kept(float32x4_t x, float32x4_t threshold) {
    return vcltq_f32(vabsq_f32(x), threshold);
}

static inline float32x4_t keep(float32x4_t x, float32x4_t threshold) {
    return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(x), kept(x, threshold)));
}

/* 16 values times scale, to nearest with ties to even. */
static inline int8x16_t round16(const float *x, float32x4_t threshold, float32x4_t scale) {
    int32x4_t q[4];
    for (int v = 0; v < 4; v++)
        q[v] = vcvtnq_s32_f32(vmulq_f32(keep(vld1q_f32(x + 4 * v), threshold), scale));
    const int16x8_t low = vcombine_s16(vqmovn_s32(q[0]), vqmovn_s32(q[1]));
    const int16x8_t high = vcombine_s16(vqmovn_s32(q[2]), vqmovn_s32(q[3]));
    return vcombine_s8(vqmovn_s16(low), vqmovn_s16(high));
}

static int64_t quantize_s8_neon(const float *x, int64_t count, float threshold, int8_t *q,
                                float *absmax) {
    const float32x4_t limit = vdupq_n_f32(threshold);
    const int64_t whole = count / STEP * STEP;
    float rest[STEP] = {0}; /* the end of the row, padded: a zero is never an outlier */
    if (whole < count)
        memcpy(rest, x + whole, (size_t)(count - whole) * sizeof(float));
    float32x4_t greatest = vdupq_n_f32(0);
    int64_t outliers = 0;
    for (int64_t i = 0; i < count; i += STEP) {
        const float *from = i < whole ? x + i : rest;
        int32x4_t dropped = vdupq_n_s32(STEP / 4);
        for (int v = 0; v < 4; v++) {
            const float32x4_t value = vld1q_f32(from + 4 * v);
            greatest = vmaxq_f32(greatest, vabsq_f32(keep(value, limit)));
            dropped = vaddq_s32(dropped, vreinterpretq_s32_u32(kept(value, limit)));
        }
        outliers += vaddvq_s32(dropped);
    }
    *absmax = vmaxvq_f32(greatest);
    const float least = 1e-36f; /* 127 * (1 / 1e-36) is finite */
    const float32x4_t scale = vdupq_n_f32(127.0f * (1.0f / (*absmax > least ? *absmax : least)));
    for (int64_t i = 0; i < whole; i += STEP)
        vst1q_s8(q + i, round16(x + i, limit, scale));
    if (whole < count) {
        int8_t codes[STEP];
        vst1q_s8(codes, round16(rest, limit, scale));
        memcpy(q + whole, codes, (size_t)(count - whole));
    }
    return outliers;
}

/* 16 codes as floats. */
static inline void widen16(const int8_t *q, float32x4_t out[4]) {
    const int8x16_t codes = vld1q_s8(q);
    const int16x8_t low = vmovl_s8(vget_low_s8(codes)), high = vmovl_high_s8(codes);
    out[0] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(low)));
    out[1] = vcvtq_f32_s32(vmovl_high_s16(low));
    out[2] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(high)));
    out[3] = vcvtq_f32_s32(vmovl_high_s16(high));
}

static void dequantize_s8_neon(const int8_t *q, int64_t count, float absmax, float *w) {
    const float inverse = (float)(1.0 / 127);
    int64_t i = 0;
    for (; i + STEP <= count; i += STEP) {
        float32x4_t values[4];
        widen16(q + i, values);
        for (int v = 0; v < 4; v++)
            vst1q_f32(w + i + 4 * v, vmulq_n_f32(vmulq_n_f32(values[v], absmax), inverse));
    }
    for (; i < count; i++)
        w[i] = ((float)q[i] * absmax) * inverse;
}

/* ------------------------------------------------------------------ y = x . W^T */

static int64_t padded(int64_t k) {
    return (k + STEP - 1) / STEP * STEP;
}

/* Packed form: rows of x, padded with zeros. */
static size_t packed_bytes_s8_neon(int64_t m, int64_t k) {
    return (size_t)(m * padded(k));
}

static void pack_s8_neon(const int8_t *x, int64_t i, int64_t m, int64_t k, void *packed) {
    (void)m;
    int8_t *to = (int8_t *)packed + i * padded(k);
    memcpy(to, x, (size_t)k);
    memset(to + k, 0, (size_t)(padded(k) - k));
}

static size_t scratch_bytes_s8_neon(int64_t m, int64_t k) {
    (void)m;
    (void)k;
    return BNBQ_TILE_N * STEP;
}

/* y[count, rows <= 4 * quads] of some columns, stored or added. Rows that do not exist are read as
 * the last one again. */
static inline void multiply(int count, int quads, const int8_t *x, int64_t ldx, const int8_t *w,
                            int64_t ldw, int64_t length, int64_t rows, int32_t *y, int64_t ldy,
                            bool add) {
    int32x4_t sums[4][8];
    const int8_t *row[8];
    for (int r = 0; r < 4 * quads; r++) {
        row[r] = w + (r < rows ? r : rows - 1) * ldw;
        for (int i = 0; i < count; i++)
            sums[i][r] = vdupq_n_s32(0);
    }
    for (int64_t c = 0; c < length; c += STEP) {
        int8x16_t left[4];
        for (int i = 0; i < count; i++)
            left[i] = vld1q_s8(x + i * ldx + c);
        for (int r = 0; r < 4 * quads; r++) {
            const int8x16_t right = vld1q_s8(row[r] + c);
            for (int i = 0; i < count; i++)
                sums[i][r] = vdotq_s32(sums[i][r], left[i], right);
        }
    }
    for (int i = 0; i < count; i++)
        for (int q = 0; q < quads; q++) {
            const int32x4_t *s = sums[i] + 4 * q;
            const int32x4_t sum = vpaddq_s32(vpaddq_s32(s[0], s[1]), vpaddq_s32(s[2], s[3]));
            int32_t *to = y + i * ldy + 4 * q;
            if (rows >= 4 * q + 4) {
                vst1q_s32(to, add ? vaddq_s32(vld1q_s32(to), sum) : sum);
            } else {
                int32_t edge[4];
                vst1q_s32(edge, sum);
                for (int64_t r = 4 * q; r < rows; r++)
                    to[r - 4 * q] = (add ? to[r - 4 * q] : 0) + edge[r - 4 * q];
            }
        }
}

/* All of y for `length` columns of x and w (a multiple of 16 of them readable). */
static void multiply_all(const int8_t *x, int64_t ldx, int64_t m, const int8_t *w, int64_t ldw,
                         int64_t length, int64_t rows, int32_t *y, int64_t ldy, bool add) {
    int64_t i = 0;
    for (; i + 4 <= m; i += 4)
        for (int64_t r = 0; r < rows; r += 4)
            multiply(4, 1, x + i * ldx, ldx, w + r * ldw, ldw, length, rows - r, y + i * ldy + r,
                     ldy, add);
    for (; i < m; i++)
        for (int64_t r = 0; r < rows; r += 8)
            multiply(1, 2, x + i * ldx, ldx, w + r * ldw, ldw, length, rows - r, y + i * ldy + r,
                     ldy, add);
}

static void linear_s8_neon(const void *packed, int64_t m, const int8_t *w, int64_t ldw,
                           int64_t rows, int64_t k, int32_t *y, int64_t ldy, void *scratch) {
    assert(m >= 1 && rows >= 1 && rows <= BNBQ_TILE_N && k >= 1 && k <= BNBQ_MAX_K_S8);
    const int8_t *x = packed;
    const int64_t ldx = padded(k), whole = k / STEP * STEP;
    /* Few rows of x: W passes once anyway, and long runs of each row suit memory best. */
    const int64_t chunk = m <= 4 ? whole : CHUNK;
    for (int64_t c = 0; c < whole; c += chunk)
        multiply_all(x + c, ldx, m, w + c, ldw, whole - c < chunk ? whole - c : chunk, rows, y, ldy,
                     c > 0);
    if (whole < k) {
        int8_t *tail = scratch;
        for (int64_t r = 0; r < rows; r++) {
            memset(tail + r * STEP, 0, STEP);
            memcpy(tail + r * STEP, w + r * ldw + whole, (size_t)(k - whole));
        }
        multiply_all(x + whole, ldx, m, tail, STEP, STEP, rows, y, ldy, whole > 0);
    }
}

/* ------------------------------------------------------------------ gx = gy . W */

static void backward_s8_neon(const float *gy, int64_t ldg, int64_t m, const int8_t *w, int64_t ldw,
                             int64_t n, int64_t cols, float *gx, int64_t ldgx, void *scratch) {
    assert(cols >= 1 && cols <= BNBQ_TILE_K);
    const int64_t whole = cols / STEP * STEP;
    float *decoded = scratch;
    neon_zero(m, cols, gx, ldgx);
    for (int64_t r0 = 0; r0 < n; r0 += NEON_ROWS) {
        const int64_t rows = n - r0 < NEON_ROWS ? n - r0 : NEON_ROWS;
        for (int64_t r = 0; r < rows; r++) {
            const int8_t *codes = w + (r0 + r) * ldw;
            int8_t rest[STEP] = {0};
            if (whole < cols)
                memcpy(rest, codes + whole, (size_t)(cols - whole));
            for (int64_t c = 0; c < cols; c += STEP) {
                float32x4_t values[4];
                widen16(c < whole ? codes + c : rest, values);
                for (int v = 0; v < 4; v++)
                    vst1q_f32(decoded + r * NEON_LD + c + 4 * v, values[v]);
            }
        }
        neon_add_rows(gy + r0, ldg, m, decoded, rows, cols, gx, ldgx);
    }
}

const bnbq_s8_kernels bnbq_s8_neon = {
    .isa = "neon",
    .level = BNBQ_ISA_NEON,
    .needs = BNBQ_CPU_OF_THIS_FILE,
    .quantize = quantize_s8_neon,
    .dequantize = dequantize_s8_neon,
    .packed_bytes = packed_bytes_s8_neon,
    .pack = pack_s8_neon,
    .scratch_bytes = scratch_bytes_s8_neon,
    .run = linear_s8_neon,
    .scale = scale_s8,
    .decode_columns = decode_columns_s8,
    .add_outliers = add_outliers_s8,
    .backward = backward_s8_neon,
};
