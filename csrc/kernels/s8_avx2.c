/* s8_avx2.c - the int8 family on AVX2: Haswell and later, Zen and later.
 *
 * x is widened to 16 bits when it is packed and W as it is read; vpmaddwd then gives exact sums of
 * two products for every int8 value. (vpmaddubsw takes 32 bytes at once but needs absolute values
 * and signs moved across, an instruction per product, and is not exact for -128.)
 *
 * Up to GEMV_ROWS rows of x read W directly. For more, a chunk of rows of W is widened to L1, with
 * zeros up to a whole vector, and multiplied as in blocking.h.
 *
 * Source: Intel SDM volume 2, VPMADDWD.
 * History, 4096 x 4096, one thread of a busy Zen 4 at 3.65 GHz, weights from DRAM: m = 1 0.7 ms,
 * 4 1.6, 16 4.5, 64 14, 256 55 (multiplications and additions from registers alone take 40).
 */
#include "../kernels.h"
#include "backward_avx2.h"
#include "blocking.h"

#include <assert.h>

#if !defined(__AVX2__) || !defined(__FMA__) || !defined(__F16C__)
#error "compile with -mavx2 -mfma -mf16c"
#endif

enum {
    STEP = 16,                             /* columns of one vector */
    CHUNK = PIECE_BYTES / sizeof(int16_t), /* columns per piece */
    GEMV_ROWS = 4,                         /* rows of x that read W directly, at most */
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

static size_t packed_bytes_s8_avx2(int64_t m, int64_t k) {
    return blocked_bytes(m, k, CHUNK);
}

static size_t scratch_bytes_s8_avx2(int64_t m, int64_t k) {
    (void)k;
    return blocked_scratch_bytes(m);
}

/* Sixteen columns as 16-bit integers, or the count that are left and zeros. */
BNBQ_INLINE __m256i widen16(const int8_t *q, int64_t count) {
    if (count >= STEP)
        return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)q));
    int8_t part[STEP] = {0};
    memcpy(part, q, (size_t)count);
    return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)part));
}

static void pack_s8_avx2(const int8_t *x, int64_t i, int64_t m, int64_t k, void *packed) {
    assert(i >= 0 && i < m && m <= BNBQ_TILE_M && k >= 1 && k <= BNBQ_MAX_K_S8);
    int16_t *pieces = packed;
    for (int64_t c = 0; c < k; c += STEP) {
        int16_t *out = pieces + (c / CHUNK * m + i) * CHUNK + c % CHUNK;
        _mm256_store_si256((__m256i *)out, widen16(x + c, k - c));
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

BNBQ_INLINE u32x8 multiply_add(u32x8 sum, __m256i w, const int16_t *x) {
    return sum + (u32x8)_mm256_madd_epi16(w, _mm256_load_si256((const __m256i *)x));
}

/* A row of W at a time: memory is the limit. W is prefetched in the order in which it lies. */
BNBQ_INLINE void gemv(const int xs, const int16_t *x, const int8_t *w, int64_t ldw, int64_t rows,
                      int64_t k, int32_t *y, int64_t ldy) {
    enum { AHEAD = 2048 };
    for (int64_t n = 0; n < rows; n++, w += ldw) {
        u32x8 even[GEMV_ROWS], odd[GEMV_ROWS];
#pragma GCC unroll 4
        for (int i = 0; i < xs; i++)
            even[i] = odd[i] = (u32x8){0};
        for (int64_t col = 0; col < k; col += CHUNK) {
            const int16_t *piece = x + col * xs;
            int64_t cols = k - col < CHUNK ? k - col : CHUNK, c = 0;
            for (; c + 4 * STEP <= cols; c += 4 * STEP) {
                _mm_prefetch((const char *)w + col + c + AHEAD, _MM_HINT_T0);
#pragma GCC unroll 2
                for (int v = 0; v < 4; v += 2) {
                    __m256i w0 = widen16(w + col + c + v * STEP, STEP);
                    __m256i w1 = widen16(w + col + c + (v + 1) * STEP, STEP);
#pragma GCC unroll 4
                    for (int i = 0; i < xs; i++) {
                        const int16_t *at = piece + i * CHUNK + c + v * STEP;
                        even[i] = multiply_add(even[i], w0, at);
                        odd[i] = multiply_add(odd[i], w1, at + STEP);
                    }
                }
            }
            for (; c < cols; c += STEP) {
                __m256i w0 = widen16(w + col + c, cols - c);
#pragma GCC unroll 4
                for (int i = 0; i < xs; i++)
                    even[i] = multiply_add(even[i], w0, piece + i * CHUNK + c);
            }
        }
#pragma GCC unroll 4
        for (int i = 0; i < xs; i++)
            y[i * ldy + n] = sum_of((__m256i)(even[i] + odd[i]));
    }
}

typedef struct weight {
    const int8_t *w;
    int64_t ldw;
} weight;

static void prepare(const void *of, int64_t row, int64_t ws, int64_t col, int64_t cols,
                    uint8_t *dst) {
    const weight *weight = of;
    for (int64_t r = 0; r < ws; r++, dst += PIECE_BYTES) {
        const int8_t *w = weight->w + (row + r) * weight->ldw + col;
        for (int64_t c = 0; c < cols; c += STEP) {
            if (c % 64 == 0)
                _mm_prefetch((const char *)w + c + W_GROUP * weight->ldw, _MM_HINT_T0);
            _mm256_store_si256((__m256i *)(dst + 2 * c), widen16(w + c, cols - c));
        }
    }
    for (int64_t r = ws; r < W_GROUP; r++, dst += PIECE_BYTES)
        memset(dst, 0, PIECE_BYTES);
}

/* The sums over the lanes of four vectors. */
BNBQ_INLINE __m128i sum4(__m256i a, __m256i b, __m256i c, __m256i d) {
    __m256i all = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
    return _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
}

/* Four rows of W times up to two of x: eight accumulators, and a product on its way to each. */
BNBQ_INLINE void multiply(const int xs, const int16_t *x, const int16_t *w, int64_t cols,
                          int64_t ws, bool first, int32_t *y, int64_t ldy) {
    u32x8 sum[2][4];
#pragma GCC unroll 2
    for (int i = 0; i < xs; i++)
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++)
            sum[i][r] = (u32x8){0};
    for (int64_t c = 0; c < cols; c += STEP) {
        __m256i v[4];
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++)
            v[r] = _mm256_load_si256((const __m256i *)(w + r * CHUNK + c));
#pragma GCC unroll 2
        for (int i = 0; i < xs; i++) {
            __m256i xv = _mm256_load_si256((const __m256i *)(x + i * CHUNK + c));
#pragma GCC unroll 4
            for (int r = 0; r < 4; r++)
                sum[i][r] += (u32x8)_mm256_madd_epi16(v[r], xv);
        }
    }
#pragma GCC unroll 2
    for (int i = 0; i < xs; i++) {
        int32_t *out = y + i * ldy;
        __m128i sums =
            sum4((__m256i)sum[i][0], (__m256i)sum[i][1], (__m256i)sum[i][2], (__m256i)sum[i][3]);
        if (ws == 4) {
            if (!first)
                sums = _mm_add_epi32(sums, _mm_loadu_si128((const __m128i *)out));
            _mm_storeu_si128((__m128i *)out, sums);
            continue;
        }
        int32_t s[4];
        _mm_storeu_si128((__m128i *)s, sums);
        for (int64_t r = 0; r < ws; r++)
            out[r] = first ? s[r] : out[r] + s[r];
    }
}

static void multiply_any(int64_t xs, const uint8_t *x_piece, const uint8_t *w_piece, int64_t cols,
                         int64_t ws, int first, void *y, int64_t ldy) {
    const int16_t *x = (const int16_t *)x_piece, *w = (const int16_t *)w_piece;
    if (xs == 1)
        multiply(1, x, w, cols, ws, first, y, ldy);
    else
        multiply(2, x, w, cols, ws, first, y, ldy);
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
    const weight of = {w, ldw};
    const blocked_product product = {
        .packed = packed,
        .m = m,
        .rows = rows,
        .k = k,
        .ldy = ldy,
        .chunk = CHUNK,
        .x_group = 2,
        .w = &of,
        .prepare = prepare,
        .multiply = multiply_any,
    };
    run_blocked(product, y, scratch);
}

/* ---------------------------------------------------------------- backward */

static void backward_s8_avx2(const float *gy, int64_t ldg, int64_t m, const int8_t *w, int64_t ldw,
                             int64_t n, int64_t cols, float *gx, int64_t ldgx, void *scratch) {
    assert(m >= 1 && m <= BNBQ_TILE_M && cols >= 1 && cols <= BNBQ_TILE_K);
    for (int64_t n0 = 0; n0 < n; n0 += BACKWARD_ROWS) {
        int64_t rows = n - n0 < BACKWARD_ROWS ? n - n0 : BACKWARD_ROWS;
        for (int64_t r = 0; r < rows; r++) {
            const int8_t *from = w + (n0 + r) * ldw;
            for (int64_t b = 0; b < cols; b += 64)
                _mm_prefetch((const char *)from + BACKWARD_ROWS * ldw + b, _MM_HINT_T0);
            for (int64_t c = 0; c < cols; c += 8) {
                float *out = (float *)scratch +
                             c / BACKWARD_PANEL * BACKWARD_PANEL * BACKWARD_ROWS +
                             r * BACKWARD_PANEL + c % BACKWARD_PANEL;
                int8_t part[8] = {0};
                if (cols - c < 8)
                    memcpy(part, from + c, (size_t)(cols - c));
                _mm256_storeu_ps(out, widen8(cols - c < 8 ? part : from + c));
            }
        }
        backward_rows(gy + n0, ldg, m, scratch, rows, cols, n0 == 0, gx, ldgx);
    }
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
    .backward = backward_s8_avx2,
};
