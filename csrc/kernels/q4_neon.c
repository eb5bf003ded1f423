/* q4_neon.c - the 4-bit family on 128-bit NEON: every 64-bit Arm processor.
 *
 * Decoding: the fp32 codebook is loaded as four planes of 16 bytes (ld4), each a table for tbl; 16
 * codes look up four planes and two levels of zip make 16 floats of them. Exact, 12 instructions
 * for 16 weights. A product decodes 128 columns of its rows of W into L1 and multiplies them with
 * every row of x there. High nibbles are the even elements, low ones the odd: x is split the same
 * way once, in each group of 32, so that weights need no interleaving.
 *
 * Sums: each y is the sum, in ascending order, of the sums of 128 columns; each of those is four
 * chains of fused multiply-adds (element j of a vector in chain j) added as (0 + 1) + (2 + 3).
 * Nothing in that depends on m, on the row of the batch or on the other rows of W.
 *
 * Sources: Arm ARM (DDI 0487), chapter C7: TBL, ZIP, LD4, FMLA, SLI. History: written after the
 * AVX kernels; checked bit by bit under qemu, its speed has not been measured on a processor.
 */
#include "../float16.h"
#include "../kernels.h"
#include "neon_backward.h"

#define QUANTIZE_UNIT 32
#include "quantize_q4.h"

#include <assert.h>

#if !defined(__aarch64__) || !defined(__ARM_NEON)
#error "q4_neon.c is for AArch64"
#endif

enum {
    CHUNK = 128, /* columns summed at once: part of the result, not a tuning knob */
    GROUP = 32,  /* weights decoded at once, 16 bytes */
    FEW = 8,     /* rows of W decoded at once for a few rows of x */
};

/* ------------------------------------------------------------------ decoding */

static inline void look_up(uint8x16x4_t planes, uint8x16_t codes, float32x4_t scale,
                           float32x4_t out[4]) {
    const uint8x16_t byte0 = vqtbl1q_u8(planes.val[0], codes);
    const uint8x16_t byte1 = vqtbl1q_u8(planes.val[1], codes);
    const uint8x16_t byte2 = vqtbl1q_u8(planes.val[2], codes);
    const uint8x16_t byte3 = vqtbl1q_u8(planes.val[3], codes);
    const uint16x8_t low0 = vreinterpretq_u16_u8(vzip1q_u8(byte0, byte1));
    const uint16x8_t low1 = vreinterpretq_u16_u8(vzip2q_u8(byte0, byte1));
    const uint16x8_t high0 = vreinterpretq_u16_u8(vzip1q_u8(byte2, byte3));
    const uint16x8_t high1 = vreinterpretq_u16_u8(vzip2q_u8(byte2, byte3));
    out[0] = vmulq_f32(vreinterpretq_f32_u16(vzip1q_u16(low0, high0)), scale);
    out[1] = vmulq_f32(vreinterpretq_f32_u16(vzip2q_u16(low0, high0)), scale);
    out[2] = vmulq_f32(vreinterpretq_f32_u16(vzip1q_u16(low1, high1)), scale);
    out[3] = vmulq_f32(vreinterpretq_f32_u16(vzip2q_u16(low1, high1)), scale);
}

/* The planes: byte b of each of the 16 values. */
static uint8x16x4_t planes_of(const float *codebook) {
    return vld4q_u8((const uint8_t *)codebook);
}

/* 16 bytes to 32 weights: in order, or the even ones and then the odd ones. */
static inline void decode_group(const uint8_t *q, uint8x16x4_t planes, float absmax, bool in_order,
                                float *w) {
    const uint8x16_t bytes = vld1q_u8(q);
    uint8x16_t even = vshrq_n_u8(bytes, 4), odd = vandq_u8(bytes, vdupq_n_u8(15));
    const uint8x16_t first = in_order ? vzip1q_u8(even, odd) : even;
    const uint8x16_t second = in_order ? vzip2q_u8(even, odd) : odd;
    float32x4_t out[8];
    look_up(planes, first, vdupq_n_f32(absmax), out);
    look_up(planes, second, vdupq_n_f32(absmax), out + 4);
    for (int v = 0; v < 8; v++)
        vst1q_f32(w + 4 * v, out[v]);
}

static uint8_t code_at(const uint8_t *qweight, int64_t i) {
    return i % 2 == 0 ? qweight[i / 2] >> 4 : qweight[i / 2] & 15;
}

static void dequantize_f32(const uint8_t *qweight, const float *absmax, const float *codebook,
                           int64_t count, int64_t blocksize, float *w) {
    const uint8x16x4_t planes = planes_of(codebook);
    int64_t i = 0;
    for (; i + GROUP <= count; i += GROUP)
        decode_group(qweight + i / 2, planes, absmax[i / blocksize], true, w + i);
    for (; i < count; i++)
        w[i] = codebook[code_at(qweight, i)] * absmax[i / blocksize];
}

/* Each value is one of sixteen in a block: these are rounded, and then looked up. */
static void dequantize_halves(const uint8_t *qweight, const float *absmax, const float *codebook,
                              int64_t count, int64_t blocksize, bnbq_dtype dtype, uint16_t *w) {
    for (int64_t start = 0; start < count; start += blocksize) {
        const int64_t end = start + blocksize < count ? start + blocksize : count;
        float values[16];
        uint16_t halves[16];
        for (int code = 0; code < 16; code++)
            values[code] = codebook[code] * absmax[start / blocksize];
        bnbq_edge_scalar.narrow(values, 16, dtype, halves);
        const uint8x16x2_t planes = vld2q_u8((const uint8_t *)halves);
        int64_t i = start;
        for (; i + GROUP <= end; i += GROUP) {
            const uint8x16_t bytes = vld1q_u8(qweight + i / 2);
            const uint8x16_t even = vshrq_n_u8(bytes, 4), odd = vandq_u8(bytes, vdupq_n_u8(15));
            const uint8x16_t codes[2] = {vzip1q_u8(even, odd), vzip2q_u8(even, odd)};
            for (int h = 0; h < 2; h++) {
                const uint8x16x2_t found = {
                    {vqtbl1q_u8(planes.val[0], codes[h]), vqtbl1q_u8(planes.val[1], codes[h])}};
                vst2q_u8((uint8_t *)(w + i + 16 * h), found);
            }
        }
        for (; i < end; i++)
            w[i] = halves[code_at(qweight, i)];
    }
}

static void dequantize_q4_neon(const uint8_t *qweight, const float *absmax, const float *codebook,
                               int64_t count, int64_t blocksize, bnbq_dtype dtype, void *w) {
    if (dtype == BNBQ_F32)
        dequantize_f32(qweight, absmax, codebook, count, blocksize, w);
    else
        dequantize_halves(qweight, absmax, codebook, count, blocksize, dtype, w);
}

/* ------------------------------------------------------------------ encoding */

/* Four values as fp32; `dtype` is a constant of the caller. */
static inline float32x4_t load4(const void *w, const bnbq_dtype dtype, int64_t i) {
    if (dtype == BNBQ_F32)
        return vld1q_f32((const float *)w + i);
    const uint16x4_t halves = vld1_u16((const uint16_t *)w + i);
    if (dtype == BNBQ_F16)
        return vcvt_f32_f16(vreinterpret_f16_u16(halves));
    return vreinterpretq_f32_u32(vshll_n_u16(halves, 16));
}

/* Codes of 16 weights from element i, times scale: at most 1, or an ulp more. */
static inline uint8x16_t encode(const void *w, const bnbq_dtype dtype, int64_t i, float32x4_t scale,
                                const float32x4_t *thresholds, uint8x16_t order) {
    uint32x4_t below[4];
    for (int v = 0; v < 4; v++) {
        const float32x4_t x = vmulq_f32(load4(w, dtype, i + 4 * v), scale);
        below[v] = vdupq_n_u32(0);
        for (int t = 0; t < 15; t++) /* true is -1 */
            below[v] = vsubq_u32(below[v], vcgtq_f32(x, thresholds[t]));
    }
    const uint16x8_t low =
        vuzp1q_u16(vreinterpretq_u16_u32(below[0]), vreinterpretq_u16_u32(below[1]));
    const uint16x8_t high =
        vuzp1q_u16(vreinterpretq_u16_u32(below[2]), vreinterpretq_u16_u32(below[3]));
    return vqtbl1q_u8(order, vuzp1q_u8(vreinterpretq_u8_u16(low), vreinterpretq_u8_u16(high)));
}

/* As an integer, of which NaN and Inf are the greatest. */
static inline float absmax_of(const void *w, const bnbq_dtype dtype, int64_t start,
                              int64_t blocksize) {
    const uint32x4_t magnitude = vdupq_n_u32(0x7fffffff);
    uint32x4_t greatest[4] = {vdupq_n_u32(0), vdupq_n_u32(0), vdupq_n_u32(0), vdupq_n_u32(0)};
    for (int64_t i = start; i < start + blocksize; i += 16)
        for (int v = 0; v < 4; v++) {
            const uint32x4_t bits = vreinterpretq_u32_f32(load4(w, dtype, i + 4 * v));
            greatest[v] = vmaxq_u32(greatest[v], vandq_u32(bits, magnitude));
        }
    return bnbq_float(vmaxvq_u32(
        vmaxq_u32(vmaxq_u32(greatest[0], greatest[1]), vmaxq_u32(greatest[2], greatest[3]))));
}

BNBQ_INLINE void quantize_blocks(const void *w, const bnbq_dtype dtype, int64_t count,
                                 const bnbq_format *format, int64_t blocksize, uint8_t *qweight,
                                 float *absmax) {
    const uint8x16_t order = vld1q_u8(format->order);
    float32x4_t thresholds[15];
    for (int t = 0; t < 15; t++)
        thresholds[t] = vdupq_n_f32(format->thresholds[t]);
    for (int64_t i = 0; i < count; i += blocksize) {
        const float most = absmax_of(w, dtype, i, blocksize);
        const float32x4_t inverse = vdupq_n_f32(1.0f / (most > tiny ? most : tiny));
        absmax[i / blocksize] = most;
        for (int64_t j = i; j < i + blocksize; j += GROUP) {
            const uint8x16_t first = encode(w, dtype, j, inverse, thresholds, order);
            const uint8x16_t second = encode(w, dtype, j + 16, inverse, thresholds, order);
            const uint8x16_t even = vuzp1q_u8(first, second), odd = vuzp2q_u8(first, second);
            vst1q_u8(qweight + j / 2, vsliq_n_u8(odd, even, 4)); /* even << 4 | odd */
        }
    }
}

/* ------------------------------------------------------------------ y = x . W^T */

/* Packed form: rows of x, in each group of 32 the even elements first. */
static size_t packed_bytes_q4_neon(int64_t m, int64_t k) {
    return (size_t)(m * k) * sizeof(float);
}

static void pack_q4_neon(const float *x, int64_t i, int64_t m, int64_t k, void *packed) {
    (void)m;
    float *to = (float *)packed + i * k;
    for (int64_t j = 0; j < k; j += 8) {
        const float32x4x2_t pair = vld2q_f32(x + j);
        float *group = to + j / GROUP * GROUP + j % GROUP / 2;
        vst1q_f32(group, pair.val[0]);
        vst1q_f32(group + GROUP / 2, pair.val[1]);
    }
}

static size_t scratch_bytes_q4_neon(int64_t m, int64_t k) {
    (void)m;
    (void)k;
    return BNBQ_TILE_N * CHUNK * sizeof(float);
}

/* y[count, 4 * quads] of one chunk, stored or (later chunks) added. `rows` of the columns exist.
 * w: decoded rows, row stride CHUNK; x: row stride k. */
static inline void multiply(int count, int quads, const float *x, int64_t k, const float *w,
                            int64_t length, int64_t rows, float *y, int64_t ldy, bool add) {
    float32x4_t sums[4][8];
    for (int i = 0; i < count; i++)
        for (int r = 0; r < 4 * quads; r++)
            sums[i][r] = vdupq_n_f32(0);
    for (int64_t c = 0; c < length; c += 4) {
        float32x4_t left[4];
        for (int i = 0; i < count; i++)
            left[i] = vld1q_f32(x + i * k + c);
        for (int r = 0; r < 4 * quads; r++) {
            const float32x4_t right = vld1q_f32(w + r * CHUNK + c);
            for (int i = 0; i < count; i++)
                sums[i][r] = vfmaq_f32(sums[i][r], left[i], right);
        }
    }
    for (int i = 0; i < count; i++)
        for (int q = 0; q < quads; q++) {
            const float32x4_t *s = sums[i] + 4 * q;
            const float32x4_t sum = vpaddq_f32(vpaddq_f32(s[0], s[1]), vpaddq_f32(s[2], s[3]));
            float *to = y + i * ldy + 4 * q;
            if (rows >= 4 * q + 4) {
                vst1q_f32(to, add ? vaddq_f32(vld1q_f32(to), sum) : sum);
            } else {
                float edge[4];
                vst1q_f32(edge, sum);
                for (int64_t r = 4 * q; r < rows; r++)
                    to[r - 4 * q] = add ? to[r - 4 * q] + edge[r - 4 * q] : edge[r - 4 * q];
            }
        }
}

static void linear_q4_neon(const void *packed, int64_t m, const bnbq_q4_rows *w, int64_t rows,
                           float *y, int64_t ldy, void *scratch) {
    assert(m >= 1 && rows >= 1 && rows <= BNBQ_TILE_N && w->k % w->blocksize == 0);
    const int64_t k = w->k, blocks = k / w->blocksize;
    const uint8x16x4_t planes = planes_of(w->codebook);
    /* Few rows of x: memory decides, so few rows of W at a time and the next ones on their way. */
    const int64_t step = m <= 4 ? FEW : BNBQ_TILE_N;
    float *decoded = scratch;
    for (int64_t n = 0; n < rows; n += step) {
        const int64_t here = rows - n < step ? rows - n : step;
        const uint8_t *ahead = w->qweight + (n + here) * (k / 2);
        for (int64_t c = 0; c < k; c += CHUNK) {
            const int64_t length = k - c < CHUNK ? k - c : CHUNK;
            for (int64_t r = 0; r < here; r++) {
                const uint8_t *q = w->qweight + ((n + r) * k + c) / 2;
                const float *absmax = w->absmax + (n + r) * blocks;
                __builtin_prefetch(ahead, 0, 2);
                ahead += CHUNK / 2;
                for (int64_t j = 0; j < length; j += GROUP)
                    decode_group(q + j / 2, planes, absmax[(c + j) / w->blocksize], false,
                                 decoded + r * CHUNK + j);
            }
            for (int64_t i = 0; i < m;) {
                const float *x = (const float *)packed + i * k + c;
                float *to = y + i * ldy + n;
                if (m - i >= 4) {
                    for (int64_t r = 0; r < here; r += 4)
                        multiply(4, 1, x, k, decoded + r * CHUNK, length, here - r, to + r, ldy,
                                 c > 0);
                    i += 4;
                } else {
                    for (int64_t r = 0; r < here; r += 8)
                        multiply(1, 2, x, k, decoded + r * CHUNK, length, here - r, to + r, ldy,
                                 c > 0);
                    i++;
                }
            }
        }
    }
}

/* ------------------------------------------------------------------ gx = gy . W */

static void backward_q4_neon(const float *gy, int64_t ldg, int64_t m, const bnbq_q4_rows *w,
                             int64_t n, int64_t k0, int64_t cols, float *gx, int64_t ldgx,
                             void *scratch) {
    assert(k0 % GROUP == 0 && cols >= 1 && cols <= BNBQ_TILE_K && k0 + cols <= w->k);
    const uint8x16x4_t planes = planes_of(w->codebook);
    float *decoded = scratch;
    neon_zero(m, cols, gx, ldgx);
    for (int64_t r0 = 0; r0 < n; r0 += NEON_ROWS) {
        const int64_t rows = n - r0 < NEON_ROWS ? n - r0 : NEON_ROWS;
        for (int64_t r = 0; r < rows; r++) {
            const uint8_t *q = w->qweight + ((r0 + r) * w->k + k0) / 2;
            const float *absmax = w->absmax + (r0 + r) * (w->k / w->blocksize);
            for (int64_t c = 0; c < cols; c += GROUP)
                decode_group(q + c / 2, planes, absmax[(k0 + c) / w->blocksize], true,
                             decoded + r * NEON_LD + c);
        }
        neon_add_rows(gy + r0, ldg, m, decoded, rows, cols, gx, ldgx);
    }
}

const bnbq_q4_kernels bnbq_q4_neon = {
    .isa = "neon",
    .level = BNBQ_ISA_NEON,
    .needs = BNBQ_CPU_OF_THIS_FILE,
    .quantize = quantize_q4,
    .dequantize = dequantize_q4_neon,
    .linear = {packed_bytes_q4_neon, pack_q4_neon, scratch_bytes_q4_neon, linear_q4_neon},
    .backward = backward_q4_neon,
};
