/* s8_avx512vnni.c - the int8 family on AVX-512 VNNI: Cascade Lake, Ice Lake, Zen 4 and later.
 *
 * vpdpbusd adds four products of an unsigned and a signed byte to each dword, without saturation.
 * The weight is made unsigned on the way, w + 128 (one exclusive or), and 128 * sum(x), summed once
 * when x is packed, is taken off at the end: exact for every int8 value, since all sums are right
 * modulo 2^32 and the result fits.
 *
 * Up to GEMV_ROWS rows of x read W directly. For more, a chunk of rows of W is copied to L1 as
 * unsigned bytes, zeros in x filling the last 64 columns, and multiplied as in blocking.h.
 *
 * Source: Intel SDM volume 2, VPDPBUSD; the exclusive-or form is ours, the usual one offsets x and
 * needs a sum for every row of W.
 * History, 4096 x 4096, one thread of a busy Zen 4 at 3.65 GHz, weights from DRAM: m = 1 0.56 ms,
 * 4 0.8, 16 2.4, 64 6.1, 256 21 (one vpdpbusd of 512 bits per cycle allows 18).
 */
#include "../kernels.h"
#include "backward_avx512.h"
#include "blocking.h"

#include <assert.h>

#if !defined(__AVX512F__) || !defined(__AVX512BW__) || !defined(__AVX512DQ__) ||                   \
    !defined(__AVX512VL__) || !defined(__AVX512VNNI__) || !defined(__FMA__)
#error "compile with -mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni"
#endif

enum {
    STEP = 64,           /* columns of one vector */
    CHUNK = PIECE_BYTES, /* columns per piece */
    GEMV_ROWS = 4,       /* rows of x that read W directly, at most */
};

/* ---------------------------------------------------------------- quantise, dequantise */

static const float tiny = 1e-36f; /* least divisor: 127 * (1 / 1e-36) is finite */

static inline __mmask16 first16(int64_t count) {
    return count >= 16 ? 0xffff : (__mmask16)((1 << count) - 1);
}

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

/* Packed: the corrections 128 * sum(x) as u32[m], padded to 64 bytes; then the pieces. */
static size_t head_bytes(int64_t m) {
    return (size_t)(m + 15) / 16 * 64;
}

static size_t packed_bytes_s8_avx512(int64_t m, int64_t k) {
    return head_bytes(m) + blocked_bytes(m, k, CHUNK);
}

static size_t scratch_bytes_s8_avx512(int64_t m, int64_t k) {
    (void)k;
    return blocked_scratch_bytes(m);
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
    int8_t *pieces = (int8_t *)packed + head_bytes(m);
    __m512i sum = _mm512_setzero_si512();
    for (int64_t c = 0; c < k; c += STEP) {
        __m512i v = _mm512_maskz_loadu_epi8(first64(k - c), x + c);
        _mm512_store_si512(pieces + (c / CHUNK * m + i) * PIECE_BYTES + c % CHUNK, v);
        sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), v);
    }
    ((uint32_t *)packed)[i] = 128 * sum_of(sum);
}

static inline __m512i unsigned_w(const int8_t *w, __mmask64 valid) {
    return _mm512_xor_si512(_mm512_maskz_loadu_epi8(valid, w), _mm512_set1_epi8(-128));
}

/* Sums have the element type of what is done with them: as __m512i (64-bit elements), gcc 12 keeps
 * every accumulator of a loop twice, once in each type, and spills half of them. */
typedef uint32_t u32x16 __attribute__((vector_size(64)));

BNBQ_INLINE u32x16 multiply_add(u32x16 sum, __m512i w, const void *x) {
    return (u32x16)_mm512_dpbusd_epi32((__m512i)sum, w, _mm512_load_si512(x));
}

/* A row of W at a time: memory is the limit. W is prefetched in the order in which it lies. */
BNBQ_INLINE void gemv(const int xs, const uint32_t *corrections, const int8_t *x, const int8_t *w,
                      int64_t ldw, int64_t rows, int64_t k, int32_t *y, int64_t ldy) {
    enum { AHEAD = 2048 };
    for (int64_t n = 0; n < rows; n++, w += ldw) {
        u32x16 even[GEMV_ROWS], odd[GEMV_ROWS];
#pragma GCC unroll 4
        for (int i = 0; i < xs; i++)
            even[i] = odd[i] = (u32x16){0};
        for (int64_t col = 0; col < k; col += CHUNK) {
            const int8_t *piece = x + col * xs;
            int64_t cols = k - col < CHUNK ? k - col : CHUNK, c = 0;
            for (; c + 2 * STEP <= cols; c += 2 * STEP) {
                _mm_prefetch((const char *)w + col + c + AHEAD, _MM_HINT_T0);
                _mm_prefetch((const char *)w + col + c + AHEAD + STEP, _MM_HINT_T0);
                __m512i w0 = unsigned_w(w + col + c, ~0ull);
                __m512i w1 = unsigned_w(w + col + c + STEP, ~0ull);
#pragma GCC unroll 4
                for (int i = 0; i < xs; i++) {
                    const int8_t *at = piece + i * PIECE_BYTES + c;
                    even[i] = multiply_add(even[i], w0, at);
                    odd[i] = multiply_add(odd[i], w1, at + STEP);
                }
            }
            for (; c < cols; c += STEP) {
                __m512i w0 = unsigned_w(w + col + c, first64(cols - c));
#pragma GCC unroll 4
                for (int i = 0; i < xs; i++)
                    even[i] = multiply_add(even[i], w0, piece + i * PIECE_BYTES + c);
            }
        }
#pragma GCC unroll 4
        for (int i = 0; i < xs; i++)
            y[i * ldy + n] = (int32_t)(sum_of((__m512i)(even[i] + odd[i])) - corrections[i]);
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
            _mm_prefetch((const char *)w + c + W_GROUP * weight->ldw, _MM_HINT_T0);
            _mm512_store_si512(dst + c, unsigned_w(w + c, first64(cols - c)));
        }
    }
    for (int64_t r = ws; r < W_GROUP; r++, dst += PIECE_BYTES)
        memset(dst, 0, PIECE_BYTES);
}

/* The sums over the lanes of four vectors. */
BNBQ_INLINE __m128i sum4(__m512i a, __m512i b, __m512i c, __m512i d) {
    __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti32x8_epi32(all, 1));
    return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

/* Four rows of W times up to six of x: 24 accumulators. */
BNBQ_INLINE void multiply(const int xs, const uint8_t *x, const uint8_t *w, int64_t cols,
                          int64_t ws, bool first, int32_t *y, int64_t ldy) {
    u32x16 sum[6][4];
#pragma GCC unroll 6
    for (int i = 0; i < xs; i++)
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++)
            sum[i][r] = (u32x16){0};
    for (int64_t c = 0; c < cols; c += STEP) {
        __m512i v[4];
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++)
            v[r] = _mm512_load_si512(w + r * PIECE_BYTES + c);
#pragma GCC unroll 6
        for (int i = 0; i < xs; i++) {
            __m512i xv = _mm512_load_si512(x + i * PIECE_BYTES + c);
#pragma GCC unroll 4
            for (int r = 0; r < 4; r++)
                sum[i][r] = (u32x16)_mm512_dpbusd_epi32((__m512i)sum[i][r], v[r], xv);
        }
    }
    const __mmask8 mask = (__mmask8)((1 << ws) - 1);
#pragma GCC unroll 6
    for (int i = 0; i < xs; i++) {
        __m128i sums =
            sum4((__m512i)sum[i][0], (__m512i)sum[i][1], (__m512i)sum[i][2], (__m512i)sum[i][3]);
        if (!first)
            sums = _mm_add_epi32(sums, _mm_maskz_loadu_epi32(mask, y + i * ldy));
        _mm_mask_storeu_epi32(y + i * ldy, mask, sums);
    }
}

static void multiply_any(int64_t xs, const uint8_t *x, const uint8_t *w, int64_t cols, int64_t ws,
                         int first, void *y, int64_t ldy) {
    switch (xs) {
    case 1: multiply(1, x, w, cols, ws, first, y, ldy); break;
    case 2: multiply(2, x, w, cols, ws, first, y, ldy); break;
    case 3: multiply(3, x, w, cols, ws, first, y, ldy); break;
    case 4: multiply(4, x, w, cols, ws, first, y, ldy); break;
    case 5: multiply(5, x, w, cols, ws, first, y, ldy); break;
    default: multiply(6, x, w, cols, ws, first, y, ldy); break;
    }
}

static void linear_s8_avx512(const void *packed, int64_t m, const int8_t *w, int64_t ldw,
                             int64_t rows, int64_t k, int32_t *y, int64_t ldy, void *scratch) {
    assert(m >= 1 && m <= BNBQ_TILE_M && rows >= 1 && rows <= BNBQ_TILE_N);
    assert(k >= 1 && k <= BNBQ_MAX_K_S8 && ldw >= k && ldy >= rows);
    const uint32_t *corrections = packed;
    const uint8_t *pieces = (const uint8_t *)packed + head_bytes(m);
    const int8_t *x = (const int8_t *)pieces;
    switch (m) {
    case 1: gemv(1, corrections, x, w, ldw, rows, k, y, ldy); return;
    case 2: gemv(2, corrections, x, w, ldw, rows, k, y, ldy); return;
    case 3: gemv(3, corrections, x, w, ldw, rows, k, y, ldy); return;
    case 4: gemv(4, corrections, x, w, ldw, rows, k, y, ldy); return;
    }
    const weight of = {w, ldw};
    const blocked_product product = {
        .packed = pieces,
        .m = m,
        .rows = rows,
        .k = k,
        .ldy = ldy,
        .chunk = CHUNK,
        .x_group = 6,
        .w = &of,
        .prepare = prepare,
        .multiply = multiply_any,
    };
    run_blocked(product, y, scratch);
    for (int64_t i = 0; i < m; i++)
        for (int64_t n = 0; n < rows; n++)
            y[i * ldy + n] = (int32_t)((uint32_t)y[i * ldy + n] - corrections[i]);
}

/* ---------------------------------------------------------------- backward */

static void backward_s8_avx512(const float *gy, int64_t ldg, int64_t m, const int8_t *w,
                               int64_t ldw, int64_t n, int64_t cols, float *gx, int64_t ldgx,
                               void *scratch) {
    assert(m >= 1 && m <= BNBQ_TILE_M && cols >= 1 && cols <= BNBQ_TILE_K);
    for (int64_t n0 = 0; n0 < n; n0 += BACKWARD_ROWS) {
        int64_t rows = n - n0 < BACKWARD_ROWS ? n - n0 : BACKWARD_ROWS;
        for (int64_t r = 0; r < rows; r++) {
            const int8_t *from = w + (n0 + r) * ldw;
            for (int64_t b = 0; b < cols; b += 64)
                _mm_prefetch((const char *)from + BACKWARD_ROWS * ldw + b, _MM_HINT_T0);
            for (int64_t c = 0; c < cols; c += 16) {
                float *out = (float *)scratch +
                             c / BACKWARD_PANEL * BACKWARD_PANEL * BACKWARD_ROWS +
                             r * BACKWARD_PANEL + c % BACKWARD_PANEL;
                __m128i codes = _mm_maskz_loadu_epi8(first16(cols - c), from + c);
                _mm512_storeu_ps(out, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes)));
            }
        }
        backward_rows(gy + n0, ldg, m, scratch, rows, cols, n0 == 0, gx, ldgx);
    }
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
    .backward = backward_s8_avx512,
};
