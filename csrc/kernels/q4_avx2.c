/* q4_avx2.c - the 4-bit family on AVX2 and FMA: Haswell and later, Zen and later.
 *
 * Exact fp32: a weight is codebook[code] * absmax rounded once, as dequantize gives it. A register
 * holds half the codebook; both halves are multiplied by the absmax of a block once, looked up by
 * vpermps (which uses three bits of each index) and blended by the fourth. Four bytes broadcast to
 * all lanes and a shift by lane give eight codes in their natural order, so x is packed as it is.
 *
 * Forward: up to GEMV_ROWS rows of x use each decoded vector at once; for more, chunks of W are
 * decoded to L1 (blocking.h).
 *
 * Source: encoding is a binary search (Knuth 6.2.1) whose loads are blends and permutes.
 */
#include "../kernels.h"
#include "backward_avx2.h"
#include "blocking.h"

#include <assert.h>

#if !defined(__AVX2__) || !defined(__FMA__) || !defined(__F16C__)
#error "compile with -mavx2 -mfma -mf16c"
#endif

enum {
    GROUP = 32,                          /* columns decoded together: the smallest block */
    CHUNK = PIECE_BYTES / sizeof(float), /* columns per partial sum */
    GEMV_ROWS = 4,                       /* rows of x that decode W directly, at most */
};

static inline int log2_of(int64_t blocksize) {
    return __builtin_ctzll((unsigned long long)blocksize);
}

/* ---------------------------------------------------------------- quantise, dequantise */

static const float tiny = 1e-38f; /* least divisor: the reciprocal stays finite */

typedef struct search {
    __m256 step8, low4, high4; /* thresholds[7]; [3]; [11] */
    __m256 step2, step1;       /* thresholds[1, 5, 9, 13] twice; [0, 2, .. 14] */
} search;

static search make_search(const float *t) {
    return (search){
        .step8 = _mm256_set1_ps(t[7]),
        .low4 = _mm256_set1_ps(t[3]),
        .high4 = _mm256_set1_ps(t[11]),
        .step2 = _mm256_setr_ps(t[1], t[5], t[9], t[13], t[1], t[5], t[9], t[13]),
        .step1 = _mm256_setr_ps(t[0], t[2], t[4], t[6], t[8], t[10], t[12], t[14]),
    };
}

/* 2 * i, and 1 more where t < x. */
static inline __m256i descend(__m256i i, __m256 t, __m256 x) {
    __m256i below = _mm256_castps_si256(_mm256_cmp_ps(t, x, _CMP_LT_OQ));
    return _mm256_sub_epi32(_mm256_add_epi32(i, i), below);
}

/* The number of thresholds below x. */
static inline __m256i count8(__m256 x, const search *s) {
    x = _mm256_max_ps(_mm256_min_ps(x, _mm256_set1_ps(1.0f)), _mm256_set1_ps(-1.0f));
    __m256 above = _mm256_cmp_ps(s->step8, x, _CMP_LT_OQ);
    __m256i i = _mm256_srli_epi32(_mm256_castps_si256(above), 31);
    i = descend(i, _mm256_blendv_ps(s->low4, s->high4, above), x);
    i = descend(i, _mm256_permutevar_ps(s->step2, i), x);
    return descend(i, _mm256_permutevar8x32_ps(s->step1, i), x);
}

static inline float greatest_of(__m256 x) {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}

static void quantize_q4_avx2(const float *w, int64_t count, const bnbq_format *format,
                             int64_t blocksize, uint8_t *qweight, float *absmax) {
    assert(count >= 1 && bnbq_valid_blocksize(blocksize));
    const search s = make_search(format->thresholds);
    const __m256i order = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)format->order));
    const __m256 sign = _mm256_set1_ps(-0.0f);
    int64_t start = 0;
    for (; start + blocksize <= count; start += blocksize) {
        __m256 max0 = _mm256_setzero_ps(), max1 = max0;
        for (int64_t i = start; i < start + blocksize; i += 16) {
            max0 = _mm256_max_ps(max0, _mm256_andnot_ps(sign, _mm256_loadu_ps(w + i)));
            max1 = _mm256_max_ps(max1, _mm256_andnot_ps(sign, _mm256_loadu_ps(w + i + 8)));
        }
        float greatest = greatest_of(_mm256_max_ps(max0, max1));
        __m256 inverse = _mm256_set1_ps(1.0f / (greatest > tiny ? greatest : tiny));
        *absmax++ = greatest;
        for (int64_t i = start; i < start + blocksize; i += 32) {
            __m256i n[4];
#pragma GCC unroll 4
            for (int v = 0; v < 4; v++)
                n[v] = count8(_mm256_mul_ps(_mm256_loadu_ps(w + i + 8 * v), inverse), &s);
            /* To bytes, to codes, pairs of codes to bytes (high nibble first). Packing goes by
             * 128-bit lanes: each holds four codes of every vector. */
            __m256i bytes = _mm256_packus_epi16(_mm256_packus_epi32(n[0], n[1]),
                                                _mm256_packus_epi32(n[2], n[3]));
            bytes = _mm256_shuffle_epi8(order, bytes);
            __m256i pairs = _mm256_maddubs_epi16(bytes, _mm256_set1_epi16(1 << 8 | 16));
            pairs = _mm256_packus_epi16(pairs, pairs);
            __m128i low = _mm256_castsi256_si128(pairs), high = _mm256_extracti128_si256(pairs, 1);
            _mm_storeu_si128((__m128i *)(qweight + i / 2), _mm_unpacklo_epi16(low, high));
        }
    }
    /* The short block at the end of a weight has its own rule (it is divided, not multiplied). */
    if (start < count)
        bnbq_q4_scalar.quantize(w + start, count - start, format, blocksize, qweight + start / 2,
                                absmax);
}

typedef struct table {
    __m256 low, high; /* values of codes 0..7 and 8..15 */
} table;

BNBQ_INLINE table scaled(const float *codebook, float absmax) {
    __m256 scale = _mm256_set1_ps(absmax);
    return (table){_mm256_mul_ps(_mm256_loadu_ps(codebook), scale),
                   _mm256_mul_ps(_mm256_loadu_ps(codebook + 8), scale)};
}

/* Four packed bytes as eight values. */
BNBQ_INLINE __m256 decode8(const uint8_t *q, table t) {
    int32_t bytes;
    memcpy(&bytes, q, 4);
    /* Code i to the top of lane i: its first bit is the sign that the blend looks at. */
    __m256i top = _mm256_sllv_epi32(_mm256_set1_epi32(bytes),
                                    _mm256_setr_epi32(24, 28, 16, 20, 8, 12, 0, 4));
    __m256i index = _mm256_srli_epi32(top, 28);
    __m256 low = _mm256_permutevar8x32_ps(t.low, index);
    __m256 high = _mm256_permutevar8x32_ps(t.high, index);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(top));
}

/* Any count of values. */
BNBQ_INLINE void decode(const uint8_t *q, int64_t count, table t, float *w) {
    int64_t i = 0;
    for (; i + 8 <= count; i += 8)
        _mm256_storeu_ps(w + i, decode8(q + i / 2, t));
    if (i < count) {
        uint8_t bytes[4] = {0};
        float values[8];
        memcpy(bytes, q + i / 2, (size_t)(count - i + 1) / 2);
        _mm256_storeu_ps(values, decode8(bytes, t));
        memcpy(w + i, values, (size_t)(count - i) * sizeof *w);
    }
}

static void dequantize_q4_avx2(const uint8_t *qweight, const float *absmax, const float *codebook,
                               int64_t count, int64_t blocksize, float *w) {
    assert(count >= 1 && bnbq_valid_blocksize(blocksize));
    for (int64_t i = 0; i < count; i += blocksize) {
        int64_t left = count - i < blocksize ? count - i : blocksize;
        decode(qweight + i / 2, left, scaled(codebook, *absmax++), w + i);
    }
}

/* ---------------------------------------------------------------- forward */

static size_t packed_bytes_q4_avx2(int64_t m, int64_t k) {
    return blocked_bytes(m, k, CHUNK);
}

static size_t scratch_bytes_q4_avx2(int64_t m, int64_t k) {
    (void)k;
    return blocked_scratch_bytes(m);
}

static void pack_q4_avx2(const float *x, int64_t i, int64_t m, int64_t k, void *packed) {
    assert(i >= 0 && i < m && m <= BNBQ_TILE_M && k % 32 == 0);
    for (int64_t c = 0; c < k; c += CHUNK) {
        int64_t cols = k - c < CHUNK ? k - c : CHUNK;
        memcpy((float *)packed + c * m + i * CHUNK, x + c, (size_t)cols * sizeof *x);
    }
}

/* The sums over the lanes of four vectors. One order for all: lanes 0+2 and 1+3 of each 128 bits,
 * then the 128-bit halves. */
BNBQ_INLINE __m128 sum4(__m256 a, __m256 b, __m256 c, __m256 d) {
    __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
    __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
    __m256 low = _mm256_castpd_ps(_mm256_unpacklo_pd(_mm256_castps_pd(ab), _mm256_castps_pd(cd)));
    __m256 high = _mm256_castpd_ps(_mm256_unpackhi_pd(_mm256_castps_pd(ab), _mm256_castps_pd(cd)));
    __m256 all = _mm256_add_ps(low, high);
    return _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
}

/* y[0..ws) = or += sums */
BNBQ_INLINE void put4(float *y, __m128 sums, int64_t ws, bool first) {
    if (ws == 4) {
        _mm_storeu_ps(y, first ? sums : _mm_add_ps(_mm_loadu_ps(y), sums));
        return;
    }
    float s[4];
    _mm_storeu_ps(s, sums);
    for (int64_t r = 0; r < ws; r++)
        y[r] = first ? s[r] : y[r] + s[r];
}

/* sum[s][i] = stream s of W . row i of x, over cols columns (<= CHUNK) from column col. The
 * streams are consecutive rows, or (along) consecutive chunks of one row with one row of x; several
 * of them hide the latency of the one chain of FMAs that each result is. */
BNBQ_INLINE void dots(const int streams, const int xs, const bool along, const bnbq_q4_rows *w,
                      int64_t row, int64_t col, int64_t cols, const float *x, int64_t ahead,
                      __m256 sum[4][GEMV_ROWS]) {
    const int64_t row_bytes = w->k / 2, blocks = w->k / w->blocksize;
    const uint8_t *q = w->qweight + row * row_bytes + col / 2;
    const float *absmax = w->absmax + row * blocks;
    const int shift = log2_of(w->blocksize);
    const int64_t q_stride = along ? CHUNK / 2 : row_bytes, x_stride = along ? CHUNK : 0;
#pragma GCC unroll 4
    for (int s = 0; s < streams; s++)
#pragma GCC unroll 4
        for (int i = 0; i < xs; i++)
            sum[s][i] = _mm256_setzero_ps();
    for (int64_t c = 0; c < cols; c += GROUP) {
        for (int b = 0; b < streams * GROUP / 2; b += 64)
            _mm_prefetch((const char *)q + ahead + c / 2 * streams + b, _MM_HINT_T0);
#pragma GCC unroll 4
        for (int s = 0; s < streams; s++) {
            const float *a = absmax + (along ? 0 : s * blocks);
            const int64_t at = col + c + (along ? s * CHUNK : 0);
            const table t = scaled(w->codebook, a[at >> shift]);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                __m256 v = decode8(q + s * q_stride + c / 2 + 4 * j, t);
#pragma GCC unroll 4
                for (int i = 0; i < xs; i++) {
                    const float *at_x = x + i * CHUNK + s * x_stride + c + 8 * j;
                    sum[s][i] = _mm256_fmadd_ps(v, _mm256_loadu_ps(at_x), sum[s][i]);
                }
            }
        }
    }
}

/* Bytes from what is read to what is prefetched when one row is read from end to end. */
enum { AHEAD = 3072 };

static void gemv1(const float *x, const bnbq_q4_rows *w, int64_t rows, float *y) {
    __m256 sum[4][GEMV_ROWS];
    const __m256 zero = _mm256_setzero_ps();
    for (int64_t n = 0; n < rows; n++) {
        float total = 0.0f, sums[4];
        for (int64_t col = 0; col < w->k;) {
            int streams = 1;
            int64_t left = w->k - col, cols = left < CHUNK ? left : CHUNK;
            if (left >= 4 * CHUNK) {
                streams = 4;
                dots(4, 1, true, w, n, col, CHUNK, x + col, AHEAD, sum);
                _mm_storeu_ps(sums, sum4(sum[0][0], sum[1][0], sum[2][0], sum[3][0]));
            } else {
                dots(1, 1, true, w, n, col, cols, x + col, AHEAD, sum);
                _mm_storeu_ps(sums, sum4(sum[0][0], zero, zero, zero));
            }
            for (int s = 0; s < streams; s++, col += CHUNK)
                total = col == 0 ? sums[s] : total + sums[s];
        }
        y[n] = total;
    }
}

BNBQ_INLINE void gemv(const int xs, const float *x, const bnbq_q4_rows *w, int64_t rows, float *y,
                      int64_t ldy) {
    enum { STREAMS = 2 }; /* and 4 rows of x: 8 sums of 16 registers */
    __m256 sum[4][GEMV_ROWS];
    const __m256 zero = _mm256_setzero_ps();
    int64_t n = 0;
    for (; n + STREAMS <= rows; n += STREAMS)
        for (int64_t col = 0; col < w->k; col += CHUNK) {
            int64_t cols = w->k - col < CHUNK ? w->k - col : CHUNK;
            /* The next rows, in the order in which they lie. */
            int64_t ahead = STREAMS * w->k / 2 + (STREAMS - 1) * col / 2;
            dots(STREAMS, xs, false, w, n, col, cols, x + col * xs, ahead, sum);
            for (int i = 0; i < xs; i++)
                put4(y + i * ldy + n, sum4(sum[0][i], sum[1][i], zero, zero), STREAMS, col == 0);
        }
    for (; n < rows; n++)
        for (int64_t col = 0; col < w->k; col += CHUNK) {
            int64_t cols = w->k - col < CHUNK ? w->k - col : CHUNK;
            dots(1, xs, false, w, n, col, cols, x + col * xs, AHEAD, sum);
            for (int i = 0; i < xs; i++)
                put4(y + i * ldy + n, sum4(sum[0][i], zero, zero, zero), 1, col == 0);
        }
}

static void prepare(const void *weight, int64_t row, int64_t count, int64_t col, int64_t cols,
                    uint8_t *dst) {
    const bnbq_q4_rows *w = weight;
    const int shift = log2_of(w->blocksize);
    for (int64_t r = 0; r < count; r++) {
        const uint8_t *q = w->qweight + (row + r) * (w->k / 2) + col / 2;
        const float *absmax = w->absmax + (row + r) * (w->k / w->blocksize);
        float *out = (float *)(dst + r * PIECE_BYTES);
        for (int64_t c = 0; c < cols; c += GROUP) {
            _mm_prefetch((const char *)q + c / 2 + W_BLOCK * (w->k / 2), _MM_HINT_T0);
            decode(q + c / 2, GROUP, scaled(w->codebook, absmax[(col + c) >> shift]), out + c);
        }
    }
    for (int64_t r = count; r % W_GROUP != 0; r++)
        memset(dst + r * PIECE_BYTES, 0, PIECE_BYTES);
}

/* Four rows of W times up to three of x: 12 accumulators. */
BNBQ_INLINE void multiply(const int xs, const float *x, const float *w, int64_t cols, int64_t ws,
                          bool first, float *y, int64_t ldy) {
    __m256 sum[3][4];
#pragma GCC unroll 3
    for (int i = 0; i < xs; i++)
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++)
            sum[i][r] = _mm256_setzero_ps();
    for (int64_t c = 0; c < cols; c += 8) {
        __m256 xv[3];
#pragma GCC unroll 3
        for (int i = 0; i < xs; i++)
            xv[i] = _mm256_load_ps(x + i * CHUNK + c);
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) {
            __m256 v = _mm256_load_ps(w + r * CHUNK + c);
#pragma GCC unroll 3
            for (int i = 0; i < xs; i++)
                sum[i][r] = _mm256_fmadd_ps(v, xv[i], sum[i][r]);
        }
    }
#pragma GCC unroll 3
    for (int i = 0; i < xs; i++)
        put4(y + i * ldy, sum4(sum[i][0], sum[i][1], sum[i][2], sum[i][3]), ws, first);
}

static void multiply_any(int64_t xs, const uint8_t *x_piece, const uint8_t *w_piece, int64_t cols,
                         int64_t ws, int first, void *y, int64_t ldy) {
    const float *x = (const float *)x_piece, *w = (const float *)w_piece;
    switch (xs) {
    case 1: multiply(1, x, w, cols, ws, first, y, ldy); break;
    case 2: multiply(2, x, w, cols, ws, first, y, ldy); break;
    default: multiply(3, x, w, cols, ws, first, y, ldy); break;
    }
}

static void linear_q4_avx2(const void *packed, int64_t m, const bnbq_q4_rows *w, int64_t rows,
                           float *y, int64_t ldy, void *scratch) {
    assert(m >= 1 && m <= BNBQ_TILE_M && rows >= 1 && rows <= BNBQ_TILE_N);
    assert(w->k % 32 == 0 && w->k % w->blocksize == 0 && ldy >= rows);
    switch (m) {
    case 1: gemv1(packed, w, rows, y); return;
    case 2: gemv(2, packed, w, rows, y, ldy); return;
    case 3: gemv(3, packed, w, rows, y, ldy); return;
    case 4: gemv(4, packed, w, rows, y, ldy); return;
    }
    const blocked_product product = {
        .packed = packed, .m = m, .rows = rows, .k = w->k, .ldy = ldy, .chunk = CHUNK,
        .x_group = 3, .w = w, .prepare = prepare, .multiply = multiply_any,
    };
    run_blocked(product, y, scratch);
}

/* ---------------------------------------------------------------- backward */

static void backward_q4_avx2(const float *gy, int64_t ldg, int64_t m, const bnbq_q4_rows *w,
                             int64_t n, int64_t k0, int64_t cols, float *gx, int64_t ldgx,
                             void *scratch) {
    assert(m >= 1 && m <= BNBQ_TILE_M && k0 % 32 == 0 && cols >= 1 && cols <= BNBQ_TILE_K);
    const int shift = log2_of(w->blocksize);
    for (int64_t n0 = 0; n0 < n; n0 += BACKWARD_ROWS) {
        int64_t rows = n - n0 < BACKWARD_ROWS ? n - n0 : BACKWARD_ROWS;
        for (int64_t r = 0; r < rows; r++) {
            const uint8_t *q = w->qweight + ((n0 + r) * w->k + k0) / 2;
            const float *absmax = w->absmax + (n0 + r) * (w->k / w->blocksize);
            float *out = (float *)scratch + r * BACKWARD_PANEL;
            for (int64_t c = 0; c < cols; c += GROUP, out += BACKWARD_PANEL * BACKWARD_ROWS) {
                table t = scaled(w->codebook, absmax[(k0 + c) >> shift]);
                decode(q + c / 2, cols - c < GROUP ? cols - c : GROUP, t, out);
            }
        }
        backward_rows(gy + n0, ldg, m, scratch, rows, cols, n0 == 0, gx, ldgx);
    }
}

_Static_assert((int)GROUP == (int)BACKWARD_PANEL, "a group is a row of a panel");

const bnbq_q4_kernels bnbq_q4_avx2 = {
    .isa = "avx2",
    .level = BNBQ_ISA_AVX2,
    .needs = BNBQ_CPU_OF_THIS_FILE,
    .quantize = quantize_q4_avx2,
    .dequantize = dequantize_q4_avx2,
    .linear = {packed_bytes_q4_avx2, pack_q4_avx2, scratch_bytes_q4_avx2, linear_q4_avx2},
    .linear_bf16 = {packed_bytes_q4_avx2, pack_q4_avx2, scratch_bytes_q4_avx2, linear_q4_avx2},
    .bf16_min_m = 1,
    .backward = backward_q4_avx2,
};
