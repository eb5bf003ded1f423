/* s8_avx2.c - the int8 family on AVX2: Haswell and later, Zen and later.
 *
 * x is widened to 16 bits when it is packed and W as it is read; vpmaddwd then gives exact sums of
 * two products for every int8 value. (vpmaddubsw takes 32 bytes at once but needs absolute values
 * and signs moved across, an instruction per product, and is not exact for -128.)
 *
 * Up to GEMV_ROWS rows of x read W directly, lanes along k. For more, W is widened, interleaved by
 * pairs of columns and multiplied as in s8_blocking.h.
 *
 * Source: Intel SDM volume 2, VPMADDWD.
 * History, 4096 x 4096, one thread of a busy Zen 4 at 3.7 GHz, weights from DRAM: m = 1 0.85 ms,
 * 4 1.2, 8 2.4, 16 3.8, 64 12.6, 256 49 (multiplications and additions from registers alone take
 * 40). Lanes along k for every m: 4 2.0, 8 3.0, 16 4.6, 64 14, 256 54.
 */
#include "../kernels.h"
#include "backward_avx2.h"
#include "s8_blocking.h"
#include "s8_epilogue.h"

#include <assert.h>

#if !defined(__AVX2__) || !defined(__FMA__) || !defined(__F16C__)
#error "compile with -mavx2 -mfma -mf16c"
#endif

enum {
    STEP = 16,     /* columns of one vector */
    GEMV_ROWS = 4, /* rows of x that read W directly, at most */
    AHEAD = 16384, /* bytes, then */
    PANEL = 16,    /* rows of W in s8_blocking.h */
    X_GROUP = 6,   /* rows of x */
};

/* ---------------------------------------------------------------- quantise, dequantise */

static const float tiny = 1e-36f; /* least divisor: 127 * (1 / 1e-36) is finite */

static inline __m256 abs8(__m256 x) {
    return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x);
}

/* The elements that are not outliers: NaN compares false, and so does Inf with Inf. */
static inline __m256 kept8(__m256 x, __m256 threshold) {
    return _mm256_cmp_ps(abs8(x), threshold, _CMP_LT_OQ);
}

static inline float greatest_of(__m256 x) {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}

/* Eight values, or the count that are left and zeros. */
static inline __m256 load8(const float *x, int64_t count) {
    if (count >= 8)
        return _mm256_loadu_ps(x);
    float values[8] = {0};
    memcpy(values, x, (size_t)count * sizeof *x);
    return _mm256_loadu_ps(values);
}

static int64_t quantize_s8_avx2(const float *x, int64_t count, float threshold, int8_t *q,
                                float *absmax) {
    const __m256 limit = _mm256_set1_ps(threshold);
    __m256 greatest = _mm256_setzero_ps();
    int64_t outliers = 0; /* the zeros past the end are none: threshold > 0 */
    for (int64_t i = 0; i < count; i += 8) {
        __m256 v = load8(x + i, count - i), kept = kept8(v, limit);
        greatest = _mm256_max_ps(greatest, _mm256_and_ps(abs8(v), kept));
        outliers += 8 - __builtin_popcount((unsigned)_mm256_movemask_ps(kept));
    }
    *absmax = greatest_of(greatest);
    const __m256 scale = _mm256_set1_ps(127.0f * (1.0f / (*absmax > tiny ? *absmax : tiny)));
    for (int64_t i = 0; i < count; i += 8) {
        __m256 v = load8(x + i, count - i);
        __m256 scaled = _mm256_mul_ps(_mm256_and_ps(v, kept8(v, limit)), scale);
        scaled = _mm256_round_ps(scaled, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        __m256i wide = _mm256_cvtps_epi32(scaled);
        __m128i codes =
            _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
        codes = _mm_packs_epi16(codes, codes);
        if (count - i >= 8)
            _mm_storel_epi64((__m128i *)(q + i), codes);
        else
            memcpy(q + i, &codes, (size_t)(count - i));
    }
    return outliers;
}

static inline __m256 widen8(const int8_t *q) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)q)));
}

static void dequantize_s8_avx2(const int8_t *q, int64_t count, float absmax, float *w) {
    const float inverse = (float)(1.0 / 127);
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) {
        __m256 product = _mm256_mul_ps(widen8(q + i), _mm256_set1_ps(absmax));
        _mm256_storeu_ps(w + i, _mm256_mul_ps(product, _mm256_set1_ps(inverse)));
    }
    for (; i < count; i++)
        w[i] = ((float)q[i] * absmax) * inverse;
}

/* ---------------------------------------------------------------- forward */

/* Packed: x as 16-bit integers, whole rows for gemv, and one line longer so that they do not all
 * meet in one set of L1; else as pieces. */
static int64_t row_columns(int64_t k) {
    return (k + BLOCK - 1) / BLOCK * BLOCK + 32;
}

static size_t packed_bytes_s8_avx2(int64_t m, int64_t k) {
    return m <= GEMV_ROWS ? (size_t)(m * row_columns(k)) * sizeof(int16_t)
                          : s8_pieces_bytes(m, k, sizeof(int16_t));
}

static size_t scratch_bytes_s8_avx2(int64_t m, int64_t k) {
    (void)k;
    return m <= GEMV_ROWS ? 0 : PANEL_BYTES;
}

/* Sixteen columns as 16-bit integers, or the count that are left and zeros. */
BNBQ_INLINE __m256i widen16(const int8_t *q, int64_t count) {
    if (count >= STEP)
        return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)q));
    int8_t part[STEP] = {0};
    if (count > 0)
        memcpy(part, q, (size_t)count);
    return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)part));
}

static void pack_s8_avx2(const int8_t *x, int64_t i, int64_t m, int64_t k, void *packed) {
    assert(i >= 0 && i < m && m <= BNBQ_TILE_M && k >= 1 && k <= BNBQ_MAX_K_S8);
    int16_t *rows = packed;
    for (int64_t c = 0; c < (k + BLOCK - 1) / BLOCK * BLOCK; c += STEP) {
        int64_t at =
            m <= GEMV_ROWS ? i * row_columns(k) + c : (c / CHUNK * m + i) * CHUNK + c % CHUNK;
        _mm256_store_si256((__m256i *)(rows + at), widen16(x + c, k - c));
    }
}

static inline int32_t sum_of(__m256i x) {
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}

/* Sums have the element type of what is done with them: as __m256i (64-bit elements), gcc 12 keeps
 * every accumulator of a loop twice, once in each type, and spills half of them. */
typedef uint32_t u32x8 __attribute__((vector_size(32)));

BNBQ_INLINE u32x8 multiply_add(u32x8 sum, __m256i w, __m256i x) {
    return sum + (u32x8)_mm256_madd_epi16(w, x);
}

/* A few rows of W at a time: memory is the limit. The rows after them are prefetched in the order
 * in which they lie. */
BNBQ_INLINE void gemv_rows(const int xs, const int ws, const int16_t *x, const int8_t *w,
                           int64_t ldw, int64_t k, int32_t *y, int64_t ldy) {
    const int64_t ldx = row_columns(k);
    const int8_t *next = w + AHEAD;
    u32x8 sum[GEMV_ROWS][4];
#pragma GCC unroll 4
    for (int i = 0; i < xs; i++)
#pragma GCC unroll 4
        for (int r = 0; r < ws; r++)
            sum[i][r] = (u32x8){0};
    for (int64_t c = 0; c < k; c += STEP) {
        if (c % 64 == 0)
            for (int r = 0; r < ws; r++, next += 64)
                _mm_prefetch((const char *)next, _MM_HINT_T1);
        __m256i v[4];
#pragma GCC unroll 4
        for (int r = 0; r < ws; r++)
            v[r] = widen16(w + r * ldw + c, k - c);
#pragma GCC unroll 4
        for (int i = 0; i < xs; i++) {
            const __m256i xv = _mm256_load_si256((const __m256i *)(x + i * ldx + c));
#pragma GCC unroll 4
            for (int r = 0; r < ws; r++)
                sum[i][r] = multiply_add(sum[i][r], v[r], xv);
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < xs; i++)
#pragma GCC unroll 4
        for (int r = 0; r < ws; r++)
            y[i * ldy + r] = sum_of((__m256i)sum[i][r]);
}

BNBQ_INLINE void gemv(const int xs, const int16_t *x, const int8_t *w, int64_t ldw, int64_t rows,
                      int64_t k, int32_t *y, int64_t ldy) {
    const int ws = xs <= 2 ? 4 : 2;
    int64_t n = 0;
    for (; n + ws <= rows; n += ws)
        gemv_rows(xs, ws, x, w + n * ldw, ldw, k, y + n, ldy);
    for (; n < rows; n++)
        gemv_rows(xs, 1, x, w + n * ldw, ldw, k, y + n, ldy);
}

/* Eight rows of W, 16 columns: eight vectors that hold two columns of each row. */
BNBQ_INLINE void interleave8(const int8_t *w, int64_t ldw, int64_t count, int16_t *out) {
    __m256i t[8];
    /* t[j], t[4 + j]: columns 2 j and 2 j + 8 ... of rows 0 to 3, and 4 to 7 */
#pragma GCC unroll 2
    for (int r = 0; r < 8; r += 4, w += 4 * ldw) {
        const __m256i v0 = widen16(w, count), v1 = widen16(w + ldw, count);
        const __m256i v2 = widen16(w + 2 * ldw, count), v3 = widen16(w + 3 * ldw, count);
        const __m256i a = _mm256_unpacklo_epi32(v0, v1), b = _mm256_unpacklo_epi32(v2, v3);
        const __m256i c = _mm256_unpackhi_epi32(v0, v1), d = _mm256_unpackhi_epi32(v2, v3);
        t[r] = _mm256_unpacklo_epi64(a, b);
        t[r + 1] = _mm256_unpackhi_epi64(a, b);
        t[r + 2] = _mm256_unpacklo_epi64(c, d);
        t[r + 3] = _mm256_unpackhi_epi64(c, d);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++, out += 2 * PANEL) {
        __m256i *low = (__m256i *)out, *high = (__m256i *)(out + 8 * PANEL);
        _mm256_store_si256(low, _mm256_permute2x128_si256(t[j], t[4 + j], 0x20));
        _mm256_store_si256(high, _mm256_permute2x128_si256(t[j], t[4 + j], 0x31));
    }
}

static void interleave(const int8_t *w, int64_t ldw, int64_t rows, int64_t cols, void *dst) {
    for (int64_t n = 0; n < rows; n += 8) {
        const int8_t *from = w + n * ldw;
        const int64_t stride = rows - n >= 8 ? ldw : 0; /* else one row eight times */
        int16_t *out = (int16_t *)dst + n * 2;
        for (int64_t c = 0; c < (cols + BLOCK - 1) / BLOCK * BLOCK; c += STEP)
            interleave8(from + c, stride, cols - c, out + c * PANEL);
        for (int64_t r = 0; stride == 0 && r < rows - n; r++)
            for (int64_t c = 0; c < cols; c++)
                out[c / 2 * 2 * PANEL + 2 * r + c % 2] = from[r * ldw + c];
    }
}

/* Up to six rows of x times 16 of W: twelve accumulators. */
BNBQ_INLINE void multiply(const int xs, const int16_t *x, const int16_t *w, int64_t blocks,
                          const int8_t *next, int64_t ldw, int32_t *y, int64_t ldy) {
    u32x8 sum[X_GROUP][2];
#pragma GCC unroll 6
    for (int i = 0; i < xs; i++) {
        sum[i][0] = (u32x8)_mm256_loadu_si256((const __m256i *)(y + i * ldy));
        sum[i][1] = (u32x8)_mm256_loadu_si256((const __m256i *)(y + i * ldy + 8));
    }
    /* A chunk of W has half a line in a row for each of the sixteen steps to a row. Not unrolled:
     * gcc would add up the products of two steps first, and run out of registers. */
    for (int64_t r = 0; r < 2 * blocks; r++, next += ldw)
#pragma GCC unroll 1
        for (int s = 0; s < 16; s++, x += 2, w += 2 * PANEL) {
            _mm_prefetch((const char *)next + s * 32, _MM_HINT_T1);
            const __m256i w0 = _mm256_load_si256((const __m256i *)w);
            const __m256i w1 = _mm256_load_si256((const __m256i *)(w + PANEL));
#pragma GCC unroll 6
            for (int i = 0; i < xs; i++) {
                int32_t two;
                memcpy(&two, x + i * CHUNK, sizeof two);
                const __m256i v = _mm256_set1_epi32(two);
                sum[i][0] = multiply_add(sum[i][0], w0, v);
                sum[i][1] = multiply_add(sum[i][1], w1, v);
            }
        }
#pragma GCC unroll 6
    for (int i = 0; i < xs; i++) {
        _mm256_storeu_si256((__m256i *)(y + i * ldy), (__m256i)sum[i][0]);
        _mm256_storeu_si256((__m256i *)(y + i * ldy + 8), (__m256i)sum[i][1]);
    }
}

static void multiply_any(int64_t xs, const void *x, const void *w, int64_t blocks,
                         const int8_t *next, int64_t ldw, int64_t rows, int32_t *y, int64_t ldy) {
    if (rows < PANEL) { /* the last ones of W: y is narrower than the vectors */
        int32_t whole[X_GROUP * PANEL] = {0};
        for (int64_t i = 0; i < xs; i++)
            memcpy(whole + i * PANEL, y + i * ldy, (size_t)rows * sizeof *y);
        multiply_any(xs, x, w, blocks, next, ldw, PANEL, whole, PANEL);
        for (int64_t i = 0; i < xs; i++)
            memcpy(y + i * ldy, whole + i * PANEL, (size_t)rows * sizeof *y);
        return;
    }
    switch (xs) {
    case 3: multiply(3, x, w, blocks, next, ldw, y, ldy); break;
    case 4: multiply(4, x, w, blocks, next, ldw, y, ldy); break;
    case 5: multiply(5, x, w, blocks, next, ldw, y, ldy); break;
    default: multiply(6, x, w, blocks, next, ldw, y, ldy); break;
    }
}

static void linear_s8_avx2(const void *packed, int64_t m, const int8_t *w, int64_t ldw,
                           int64_t rows, int64_t k, int32_t *y, int64_t ldy, void *scratch) {
    assert(m >= 1 && m <= BNBQ_TILE_M && rows >= 1 && rows <= BNBQ_TILE_N);
    assert(k >= 1 && k <= BNBQ_MAX_K_S8 && ldw >= k && ldy >= rows);
    switch (m) {
    case 1: gemv(1, packed, w, ldw, rows, k, y, ldy); return;
    case 2: gemv(2, packed, w, ldw, rows, k, y, ldy); return;
    case 3: gemv(3, packed, w, ldw, rows, k, y, ldy); return;
    case 4: gemv(4, packed, w, ldw, rows, k, y, ldy); return;
    }
    for (int64_t i = 0; i < m; i++)
        memset(y + i * ldy, 0, (size_t)rows * sizeof *y);
    const s8_product product = {
        .pieces = packed,
        .m = m,
        .rows = rows,
        .k = k,
        .ldw = ldw,
        .ldy = ldy,
        .piece_bytes = CHUNK * sizeof(int16_t),
        .panel = PANEL,
        .x_group = X_GROUP,
        .interleave = interleave,
        .multiply = multiply_any,
    };
    s8_run_blocked(product, w, y, scratch);
}

/* ---------------------------------------------------------------- backward */

static void decode_panel(const void *of, int64_t row, int64_t rows, int64_t col, int64_t cols,
                         float *panel) {
    const backward_s8 *weight = of;
    for (int64_t r = row; r < row + rows; r++, panel += BACKWARD_PANEL) {
        const int8_t *w = weight->w + r * weight->ldw + col;
        _mm_prefetch((const char *)w + BACKWARD_AHEAD * weight->ldw, _MM_HINT_T0);
        for (int64_t c = 0; c < cols; c += 8) {
            int8_t part[8] = {0};
            if (cols - c < 8)
                memcpy(part, w + c, (size_t)(cols - c));
            _mm256_storeu_ps(panel + c, widen8(cols - c < 8 ? part : w + c));
        }
    }
}

static void backward_s8_avx2(const float *gy, int64_t ldg, int64_t m, const int8_t *w, int64_t ldw,
                             int64_t n, int64_t cols, float *gx, int64_t ldgx, void *scratch) {
    assert(m >= 1 && m <= BNBQ_TILE_M && cols >= 1 && cols <= BNBQ_TILE_K);
    const backward_s8 of = {w, ldw};
    run_backward(backward_fp32, decode_panel, &of, gy, ldg, m, n, cols, gx, ldgx, scratch);
}

const bnbq_s8_kernels bnbq_s8_avx2 = {
    .isa = "avx2",
    .level = BNBQ_ISA_AVX2,
    .needs = BNBQ_CPU_OF_THIS_FILE,
    .quantize = quantize_s8_avx2,
    .dequantize = dequantize_s8_avx2,
    .packed_bytes = packed_bytes_s8_avx2,
    .pack = pack_s8_avx2,
    .scratch_bytes = scratch_bytes_s8_avx2,
    .run = linear_s8_avx2,
    .scale = scale_s8,
    .decode_columns = decode_columns_s8,
    .add_outliers = add_outliers_s8,
    .backward = backward_s8_avx2,
};
