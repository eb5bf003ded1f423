/* s8_avx512vnni.c - the int8 family on AVX-512 VNNI: Cascade Lake, Ice Lake, Zen 4 and later.
 *
 * vpdpbusd adds four products of an unsigned and a signed byte to each dword, without saturation.
 * The weight is made unsigned on the way, w + 128 (one exclusive or), and 128 * sum(x), summed once
 * when x is packed, is taken off at the end: exact for every int8 value, since all sums are right
 * modulo 2^32 and the result fits.
 *
 * Up to GEMV_ROWS rows of x read W directly, lanes along k. For more, W is interleaved by fours of
 * columns and multiplied as in s8_blocking.h.
 *
 * Source: Intel SDM volume 2, VPDPBUSD; the exclusive-or form is ours, the usual one offsets x and
 * needs a sum for every row of W.
 * History, 4096 x 4096, one thread of a busy Zen 4 at 3.7 GHz, weights from DRAM: m = 1 0.8 ms (as
 * fast as reading), 4 0.8, 8 1.4, 16 1.8, 64 5.4, 256 20 (one vpdpbusd of 512 bits per cycle allows
 * 18). Lanes along k for every m, sums across them per chunk: 4 1.3, 8 2.1, 16 2.7, 64 6.5, 256 22.
 * Prefetching to L1 instead of L2 costs 0.2 ms at m = 9 ... 64, no prefetch 0.7. Interleaving a
 * line of W in several steps took 1 ms instead of 0.4 where its rows lie a power of two apart; done
 * between the multiplications it saved 0.2 ms at m = 8 and 16 and lost 0.4 at 24: gcc spills.
 */
#include "../kernels.h"
#include "backward_avx512.h"
#include "lanes_avx512.h"
#include "s8_blocking.h"
#include "s8_epilogue.h"

#include <assert.h>
#include <string.h>

#if !defined(__AVX512F__) || !defined(__AVX512BW__) || !defined(__AVX512DQ__) ||                   \
    !defined(__AVX512VL__) || !defined(__AVX512VNNI__) || !defined(__FMA__)
#error "compile with -mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni"
#endif

enum {
    STEP = 64,     /* columns of one vector */
    GEMV_ROWS = 5, /* rows of x that read W directly, at most */
    W_ROWS = 4,    /* rows of W at a time, then */
    AHEAD = 16384, /* bytes, likewise */
    PANEL = 32,    /* rows of W in s8_blocking.h */
    X_GROUP = 12,  /* rows of x */
};

/* ---------------------------------------------------------------- quantise, dequantise */

static const float tiny = 1e-36f; /* least divisor: 127 * (1 / 1e-36) is finite */

/* The elements that are not outliers: NaN compares false, and so does Inf with Inf. */
static inline __mmask16 kept16(__m512 x, __mmask16 valid, __m512 threshold) {
    return _mm512_mask_cmp_ps_mask(valid, _mm512_abs_ps(x), threshold, _CMP_LT_OQ);
}

static int64_t quantize_s8_avx512(const float *x, int64_t count, float threshold, int8_t *q,
                                  float *absmax) {
    const __m512 limit = _mm512_set1_ps(threshold);
    __m512 greatest = _mm512_setzero_ps();
    int64_t kept = 0;
    for (int64_t i = 0; i < count; i += 16) {
        __mmask16 valid = first16(count - i);
        __m512 v = _mm512_maskz_loadu_ps(valid, x + i);
        __mmask16 mask = kept16(v, valid, limit);
        greatest = _mm512_mask_max_ps(greatest, mask, greatest, _mm512_abs_ps(v));
        kept += __builtin_popcount(mask);
    }
    *absmax = _mm512_reduce_max_ps(greatest);
    const __m512 scale = _mm512_set1_ps(127.0f * (1.0f / (*absmax > tiny ? *absmax : tiny)));
    for (int64_t i = 0; i < count; i += 16) {
        __mmask16 valid = first16(count - i);
        __m512 v = _mm512_maskz_loadu_ps(valid, x + i);
        __m512 scaled = _mm512_maskz_mul_ps(kept16(v, valid, limit), v, scale);
        __m512i rounded =
            _mm512_cvt_roundps_epi32(scaled, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        _mm512_mask_cvtepi32_storeu_epi8(q + i, valid, rounded);
    }
    return count - kept;
}

static void dequantize_s8_avx512(const int8_t *q, int64_t count, float absmax, float *w) {
    const __m512 scale = _mm512_set1_ps(absmax), inverse = _mm512_set1_ps((float)(1.0 / 127));
    for (int64_t i = 0; i < count; i += 16) {
        __mmask16 valid = first16(count - i);
        __m512i codes = _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(valid, q + i));
        __m512 product = _mm512_mul_ps(_mm512_cvtepi32_ps(codes), scale);
        _mm512_mask_storeu_ps(w + i, valid, _mm512_mul_ps(product, inverse));
    }
}

/* ---------------------------------------------------------------- forward */

/* Packed: the corrections 128 * sum(x) as u32[m], padded to 64 bytes; then x, whose rows are whole
 * for gemv, and one line longer so that they do not all meet in one set of L1; else as pieces. */
static size_t head_bytes(int64_t m) {
    return (size_t)(m + 15) / 16 * 64;
}

static int64_t row_bytes(int64_t k) {
    return (k + STEP - 1) / STEP * STEP + STEP;
}

static size_t packed_bytes_s8_avx512(int64_t m, int64_t k) {
    return head_bytes(m) + (m <= GEMV_ROWS ? (size_t)(m * row_bytes(k)) : s8_pieces_bytes(m, k, 1));
}

static size_t scratch_bytes_s8_avx512(int64_t m, int64_t k) {
    (void)k;
    return m <= GEMV_ROWS ? 0 : PANEL_BYTES;
}

static inline __mmask64 first64(int64_t count) {
    return count >= 64 ? ~0ull : (1ull << count) - 1;
}

/* Modulo 2^32 (_mm512_reduce_add_epi32 of gcc is signed arithmetic). */
static inline uint32_t sum_of(__m512i x) {
    __m256i h = _mm256_add_epi32(_mm512_castsi512_si256(x), _mm512_extracti32x8_epi32(x, 1));
    __m128i q = _mm_add_epi32(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1));
    q = _mm_add_epi32(q, _mm_shuffle_epi32(q, 0x4e));
    return (uint32_t)_mm_cvtsi128_si32(_mm_add_epi32(q, _mm_shuffle_epi32(q, 0xb1)));
}

static void pack_s8_avx512(const int8_t *x, int64_t i, int64_t m, int64_t k, void *packed) {
    assert(i >= 0 && i < m && m <= BNBQ_TILE_M && k >= 1 && k <= BNBQ_MAX_K_S8);
    int8_t *rows = (int8_t *)packed + head_bytes(m);
    __m512i sum = _mm512_setzero_si512();
    for (int64_t c = 0; c < k; c += STEP) {
        __m512i v = _mm512_maskz_loadu_epi8(first64(k - c), x + c);
        int64_t at =
            m <= GEMV_ROWS ? i * row_bytes(k) + c : (c / CHUNK * m + i) * CHUNK + c % CHUNK;
        _mm512_store_si512(rows + at, v);
        sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), v);
    }
    ((uint32_t *)packed)[i] = 128 * sum_of(sum);
}

static inline __m512i unsigned_w(__m512i w) {
    return _mm512_xor_si512(w, _mm512_set1_epi8(-128));
}

/* Sums have the element type of what is done with them: as __m512i (64-bit elements), gcc 12 keeps
 * every accumulator of a loop twice, once in each type, and spills half of them. */
typedef uint32_t u32x16 __attribute__((vector_size(64)));

BNBQ_INLINE u32x16 multiply_add(u32x16 sum, __m512i w, __m512i x) {
    return (u32x16)_mm512_dpbusd_epi32((__m512i)sum, w, x);
}

/* A few rows of W at a time: memory is the limit. The rows after them are prefetched in the order
 * in which they lie. */
BNBQ_INLINE void gemv_rows(const int xs, const int ws, const uint32_t *corrections, const int8_t *x,
                           const int8_t *w, int64_t ldw, int64_t k, int32_t *y, int64_t ldy) {
    const int64_t ldx = row_bytes(k);
    const int8_t *next = w + AHEAD;
    u32x16 sum[GEMV_ROWS][W_ROWS];
#pragma GCC unroll 5
    for (int i = 0; i < xs; i++)
#pragma GCC unroll 4
        for (int r = 0; r < ws; r++)
            sum[i][r] = (u32x16){0};
    for (int64_t c = 0; c < k; c += STEP) {
        const __mmask64 valid = first64(k - c);
        __m512i v[W_ROWS];
#pragma GCC unroll 4
        for (int r = 0; r < ws; r++, next += STEP) {
            _mm_prefetch((const char *)next, _MM_HINT_T1);
            v[r] = unsigned_w(_mm512_maskz_loadu_epi8(valid, w + r * ldw + c));
        }
#pragma GCC unroll 5
        for (int i = 0; i < xs; i++) {
            const __m512i xv = _mm512_load_si512(x + i * ldx + c);
#pragma GCC unroll 4
            for (int r = 0; r < ws; r++)
                sum[i][r] = multiply_add(sum[i][r], v[r], xv);
        }
    }
#pragma GCC unroll 5
    for (int i = 0; i < xs; i++)
#pragma GCC unroll 4
        for (int r = 0; r < ws; r++)
            y[i * ldy + r] = (int32_t)(sum_of((__m512i)sum[i][r]) - corrections[i]);
}

BNBQ_INLINE void gemv(const int xs, const uint32_t *corrections, const int8_t *x, const int8_t *w,
                      int64_t ldw, int64_t rows, int64_t k, int32_t *y, int64_t ldy) {
    int64_t n = 0;
    for (; n + W_ROWS <= rows; n += W_ROWS)
        gemv_rows(xs, W_ROWS, corrections, x, w + n * ldw, ldw, k, y + n, ldy);
    for (; n < rows; n++)
        gemv_rows(xs, 1, corrections, x, w + n * ldw, ldw, k, y + n, ldy);
}

/* Eight rows of W, BLOCK columns, as halves of 16 vectors that hold four columns of each row. Each
 * line of W is loaded once: with a power of two between them they evict each other from L1. */
BNBQ_INLINE void interleave8(const int8_t *w, int64_t ldw, int8_t *out) {
    const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
    const __m512i second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    __m512i v[8], t[8];
#pragma GCC unroll 8
    for (int r = 0; r < 8; r++)
        v[r] = unsigned_w(_mm512_loadu_si512(w + r * ldw));
        /* t[j], t[4 + j]: in lane L of 128 bits, columns 16 L + 4 j ... of rows 0 to 3 and 4 to 7
         */
#pragma GCC unroll 2
    for (int r = 0; r < 8; r += 4) {
        const __m512i a = _mm512_unpacklo_epi32(v[r], v[r + 1]);
        const __m512i b = _mm512_unpacklo_epi32(v[r + 2], v[r + 3]);
        const __m512i c = _mm512_unpackhi_epi32(v[r], v[r + 1]);
        const __m512i d = _mm512_unpackhi_epi32(v[r + 2], v[r + 3]);
        t[r] = _mm512_unpacklo_epi64(a, b);
        t[r + 1] = _mm512_unpackhi_epi64(a, b);
        t[r + 2] = _mm512_unpacklo_epi64(c, d);
        t[r + 3] = _mm512_unpackhi_epi64(c, d);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++, out += 4 * PANEL) {
        const __m512i low = _mm512_permutex2var_epi64(t[j], first, t[4 + j]);
        const __m512i high = _mm512_permutex2var_epi64(t[j], second, t[4 + j]);
        _mm256_store_si256((__m256i *)out, _mm512_castsi512_si256(low));
        _mm256_store_si256((__m256i *)(out + 16 * PANEL), _mm512_extracti64x4_epi64(low, 1));
        _mm256_store_si256((__m256i *)(out + 32 * PANEL), _mm512_castsi512_si256(high));
        _mm256_store_si256((__m256i *)(out + 48 * PANEL), _mm512_extracti64x4_epi64(high, 1));
    }
}

static void interleave(const int8_t *w, int64_t ldw, int64_t rows, int64_t cols, void *dst) {
    for (int64_t n = 0; n < rows; n += 8)
        for (int64_t c = 0; c < cols; c += BLOCK) {
            const int8_t *from = w + n * ldw + c;
            int8_t *out = (int8_t *)dst + c * PANEL + n * 4;
            if (rows - n >= 8 && cols - c >= BLOCK) {
                interleave8(from, ldw, out);
                continue;
            }
            int8_t padded[8 * BLOCK] = {0};
            for (int64_t r = 0; r < 8 && n + r < rows; r++)
                memcpy(padded + r * BLOCK, from + r * ldw, cols - c < BLOCK ? cols - c : BLOCK);
            interleave8(padded, BLOCK, out);
        }
}

static inline __m512i broadcast4(const int8_t *x) {
    int32_t four;
    memcpy(&four, x, sizeof four);
    return _mm512_set1_epi32(four);
}

/* Up to 12 rows of x times 32 of W: 24 accumulators. */
BNBQ_INLINE void multiply(const int xs, const int8_t *x, const uint8_t *w, int64_t blocks,
                          const int8_t *next, int64_t ldw, int64_t rows, int32_t *y, int64_t ldy) {
    const __mmask16 mask0 = first16(rows), mask1 = first16(rows - 16);
    u32x16 sum[X_GROUP][2];
#pragma GCC unroll 12
    for (int i = 0; i < xs; i++) {
        sum[i][0] = (u32x16)_mm512_maskz_loadu_epi32(mask0, y + i * ldy);
        sum[i][1] = (u32x16)_mm512_maskz_loadu_epi32(mask1, y + i * ldy + 16);
    }
    /* A chunk of W has as many lines in a row as there are steps to four of them. */
    for (int64_t r = 0; r < 4 * blocks; r++, next += ldw)
#pragma GCC unroll 4
        for (int s = 0; s < 4; s++, x += 4, w += 4 * PANEL) {
            _mm_prefetch((const char *)next + 2 * s * 64, _MM_HINT_T1);
            _mm_prefetch((const char *)next + (2 * s + 1) * 64, _MM_HINT_T1);
            const __m512i w0 = _mm512_load_si512(w), w1 = _mm512_load_si512(w + 64);
#pragma GCC unroll 12
            for (int i = 0; i < xs; i++) {
                const __m512i v = broadcast4(x + i * CHUNK);
                sum[i][0] = multiply_add(sum[i][0], w0, v);
                sum[i][1] = multiply_add(sum[i][1], w1, v);
            }
        }
#pragma GCC unroll 12
    for (int i = 0; i < xs; i++) {
        _mm512_mask_storeu_epi32(y + i * ldy, mask0, (__m512i)sum[i][0]);
        _mm512_mask_storeu_epi32(y + i * ldy + 16, mask1, (__m512i)sum[i][1]);
    }
}

static void multiply_any(int64_t xs, const void *x, const void *w, int64_t blocks,
                         const int8_t *next, int64_t ldw, int64_t rows, int32_t *y, int64_t ldy) {
    switch (xs) {
    case 6: multiply(6, x, w, blocks, next, ldw, rows, y, ldy); break;
    case 7: multiply(7, x, w, blocks, next, ldw, rows, y, ldy); break;
    case 8: multiply(8, x, w, blocks, next, ldw, rows, y, ldy); break;
    case 9: multiply(9, x, w, blocks, next, ldw, rows, y, ldy); break;
    case 10: multiply(10, x, w, blocks, next, ldw, rows, y, ldy); break;
    case 11: multiply(11, x, w, blocks, next, ldw, rows, y, ldy); break;
    default: multiply(12, x, w, blocks, next, ldw, rows, y, ldy); break;
    }
}

static void linear_s8_avx512(const void *packed, int64_t m, const int8_t *w, int64_t ldw,
                             int64_t rows, int64_t k, int32_t *y, int64_t ldy, void *scratch) {
    assert(m >= 1 && m <= BNBQ_TILE_M && rows >= 1 && rows <= BNBQ_TILE_N);
    assert(k >= 1 && k <= BNBQ_MAX_K_S8 && ldw >= k && ldy >= rows);
    const uint32_t *corrections = packed;
    const int8_t *x = (const int8_t *)packed + head_bytes(m);
    switch (m) {
    case 1: gemv(1, corrections, x, w, ldw, rows, k, y, ldy); return;
    case 2: gemv(2, corrections, x, w, ldw, rows, k, y, ldy); return;
    case 3: gemv(3, corrections, x, w, ldw, rows, k, y, ldy); return;
    case 4: gemv(4, corrections, x, w, ldw, rows, k, y, ldy); return;
    case 5: gemv(5, corrections, x, w, ldw, rows, k, y, ldy); return;
    }
    for (int64_t i = 0; i < m; i++)
        for (int64_t n = 0; n < rows; n += 16)
            _mm512_mask_storeu_epi32(y + i * ldy + n, first16(rows - n),
                                     _mm512_set1_epi32((int32_t)-corrections[i]));
    const s8_product product = {
        .pieces = (const char *)x,
        .m = m,
        .rows = rows,
        .k = k,
        .ldw = ldw,
        .ldy = ldy,
        .piece_bytes = CHUNK,
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
        for (int64_t c = 0; c < cols; c += 16) {
            __m128i codes = _mm_maskz_loadu_epi8(first16(cols - c), w + c);
            _mm512_storeu_ps(panel + c, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes)));
        }
    }
}

static void backward_s8_avx512(const float *gy, int64_t ldg, int64_t m, const int8_t *w,
                               int64_t ldw, int64_t n, int64_t cols, float *gx, int64_t ldgx,
                               void *scratch) {
    assert(m >= 1 && m <= BNBQ_TILE_M && cols >= 1 && cols <= BNBQ_TILE_K);
    const backward_s8 of = {w, ldw};
    run_backward(backward_fp32, decode_panel, &of, gy, ldg, m, n, cols, gx, ldgx, scratch);
}

const bnbq_s8_kernels bnbq_s8_avx512vnni = {
    .isa = "avx512vnni",
    .level = BNBQ_ISA_AVX512,
    .needs = BNBQ_CPU_OF_THIS_FILE,
    .quantize = quantize_s8_avx512,
    .dequantize = dequantize_s8_avx512,
    .packed_bytes = packed_bytes_s8_avx512,
    .pack = pack_s8_avx512,
    .scratch_bytes = scratch_bytes_s8_avx512,
    .run = linear_s8_avx512,
    .scale = scale_s8,
    .decode_columns = decode_columns_s8,
    .add_outliers = add_outliers_s8,
    .backward = backward_s8_avx512,
};
