/* q4_avx2.c - the 4-bit family on AVX2 and FMA: Haswell and later, Zen and later.
 *
 * Exact fp32: a weight is codebook[code] * absmax rounded once, as dequantize gives it.
 *
 * Forward: the codebook is kept as four tables of 16 bytes, one for each byte of the fp32 values.
 * vpshufb looks 32 codes up in each, and interleaving the four results makes 32 values. It leaves
 * the columns of 64 in an order of its own, in which x is packed once; the weight is never
 * rearranged. Up to GEMV_ROWS rows of x use each decoded vector at once; for more, chunks of W are
 * decoded to L1 (blocking.h).
 *
 * Natural order (dequantise, backward): a register holds half the codebook, scaled; four packed
 * bytes are broadcast, each lane shifts its own code up, vpermps looks three bits of it up in both
 * halves and the fourth, the sign bit by then, blends. In the forward pass it was slower (Zen 4:
 * m = 1 1.37 ms against 1.17), and tables of earlier Zen cores list vpermps as slower still.
 *
 * History, 4096 x 4096 nf4, one thread of a busy Zen 4 at 3.65 GHz, weights from DRAM: m = 1
 * 1.2 ms, 4 2.1, 16 6.6, 64 22, 256 87 (the FMA units allow 73).
 */
#include "../kernels.h"
#include "backward_avx2.h"
#include "blocking.h"
#include "codes_avx2.h"

#include <assert.h>

#if !defined(__AVX2__) || !defined(__FMA__) || !defined(__F16C__)
#error "compile with -mavx2 -mfma -mf16c"
#endif

enum {
    GROUP = 64,                          /* columns decoded together */
    CHUNK = PIECE_BYTES / sizeof(float), /* columns per partial sum */
    GEMV_ROWS = 4,                       /* rows of x that decode W directly, at most */
};

/* ---------------------------------------------------------------- forward */

static size_t packed_bytes_q4_avx2(int64_t m, int64_t k) {
    return blocked_bytes(m, k, CHUNK);
}

static size_t scratch_bytes_q4_avx2(int64_t m, int64_t k) {
    (void)k;
    return blocked_scratch_bytes(m);
}

/* Vector 4h + v of a group of 64 columns holds, for the 16 bytes of each 128-bit lane, the low
 * (h = 0) or high nibbles of bytes 4v .. 4v+3: the order in which bytes are interleaved below. A
 * last group of 32 columns is filled up with zeros. */
static void pack_q4_avx2(const float *x, int64_t i, int64_t m, int64_t k, void *packed) {
    assert(i >= 0 && i < m && m <= BNBQ_TILE_M && k % 32 == 0);
    for (int64_t c = 0; c < k; c += GROUP) {
        float *out = (float *)packed + (c / CHUNK * m + i) * CHUNK + c % CHUNK;
        for (int v = 0; v < 4; v++) {
            const float *from = x + c + 8 * v;
            bool whole = k - c >= GROUP;
            __m256 low = _mm256_loadu_ps(from);
            __m256 high = whole ? _mm256_loadu_ps(from + 32) : _mm256_setzero_ps();
            __m256 a = _mm256_permute2f128_ps(low, high, 0x20);
            __m256 b = _mm256_permute2f128_ps(low, high, 0x31);
            _mm256_store_ps(out + 8 * v, _mm256_shuffle_ps(a, b, 0xdd));
            _mm256_store_ps(out + 8 * v + 32, _mm256_shuffle_ps(a, b, 0x88));
        }
    }
}

/* The codebook as four tables of bytes, for vpshufb. */
typedef struct planes {
    __m256i plane[4];
} planes;

static inline planes planes_of(const float *codebook) {
    planes p;
    for (int b = 0; b < 4; b++) {
        uint8_t bytes[16];
        for (int i = 0; i < 16; i++)
            bytes[i] = ((const uint8_t *)codebook)[4 * i + b];
        p.plane[b] = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)bytes));
    }
    return p;
}

/* Four vectors of codebook values: the low (h = 0) or high nibbles of 32 bytes. */
BNBQ_INLINE void look_up(__m256i codes, int h, const planes *p, __m256 w[4]) {
    codes = _mm256_and_si256(h ? _mm256_srli_epi16(codes, 4) : codes, _mm256_set1_epi8(15));
    __m256i b0 = _mm256_shuffle_epi8(p->plane[0], codes);
    __m256i b1 = _mm256_shuffle_epi8(p->plane[1], codes);
    __m256i b2 = _mm256_shuffle_epi8(p->plane[2], codes);
    __m256i b3 = _mm256_shuffle_epi8(p->plane[3], codes);
    __m256i low0 = _mm256_unpacklo_epi8(b0, b1), low1 = _mm256_unpackhi_epi8(b0, b1);
    __m256i high0 = _mm256_unpacklo_epi8(b2, b3), high1 = _mm256_unpackhi_epi8(b2, b3);
    w[0] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low0, high0));
    w[1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low0, high0));
    w[2] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low1, high1));
    w[3] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low1, high1));
}

/* Codes and scales of a group of 64 columns, of which `left` are in the row. Each 128-bit lane is
 * 32 columns: narrow blocks, of 32, have two scales (the second one may be past the row). */
BNBQ_INLINE __m256 scale_of(const float *absmax, int64_t col, int shift, const bool narrow,
                            int64_t left) {
    if (!narrow)
        return _mm256_broadcast_ss(absmax + (col >> shift));
    float first = absmax[col / 32], second = left > 32 ? absmax[col / 32 + 1] : 0.0f;
    return _mm256_set_m128(_mm_set1_ps(second), _mm_set1_ps(first));
}

BNBQ_INLINE __m256i codes_of(const uint8_t *q, const bool narrow, int64_t left) {
    if (narrow && left <= 32)
        return _mm256_zextsi128_si256(_mm_loadu_si128((const __m128i *)q));
    return _mm256_loadu_si256((const __m256i *)q);
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

/* sum[r][i] = row + r of W . row i of x, over cols columns (<= CHUNK) from column col. Each is one
 * chain of FMAs, so several rows of W are needed to hide their latency. */
BNBQ_INLINE void dots(const int ws, const int xs, const bool narrow, const bnbq_q4_rows *w,
                      const planes *p, int64_t row, int64_t col, int64_t cols, const float *x,
                      int64_t ahead, __m256 sum[4][GEMV_ROWS]) {
    const int64_t row_bytes = w->k / 2, blocks = w->k / w->blocksize;
    const uint8_t *q = w->qweight + row * row_bytes + col / 2;
    const float *absmax = w->absmax + row * blocks;
    const int shift = log2_of(w->blocksize);
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++)
#pragma GCC unroll 4
        for (int i = 0; i < xs; i++)
            sum[r][i] = _mm256_setzero_ps();
    for (int64_t c = 0; c < cols; c += GROUP) {
        for (int b = 0; b < ws * GROUP / 2; b += 64)
            prefetch_rows(q + c / 2 * ws + b, ahead);
#pragma GCC unroll 4
        for (int r = 0; r < ws; r++) {
            const __m256 scale = scale_of(absmax + r * blocks, col + c, shift, narrow, cols - c);
            const __m256i codes = codes_of(q + r * row_bytes + c / 2, narrow, cols - c);
#pragma GCC unroll 2
            for (int h = 0; h < 2; h++) {
                __m256 v[4];
                look_up(codes, h, p, v);
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++) {
                    v[j] = _mm256_mul_ps(v[j], scale);
#pragma GCC unroll 4
                    for (int i = 0; i < xs; i++) {
                        __m256 xv = _mm256_load_ps(x + i * CHUNK + c + 32 * h + 8 * j);
                        sum[r][i] = _mm256_fmadd_ps(v[j], xv, sum[r][i]);
                    }
                }
            }
        }
    }
}

BNBQ_INLINE void gemv(const int xs, const bool narrow, const float *x, const bnbq_q4_rows *w,
                      int64_t rows, float *y, int64_t ldy) {
    const int together = xs == 1 ? 4 : 2; /* rows of W: what the registers hold */
    const planes p = planes_of(w->codebook);
    __m256 sum[4][GEMV_ROWS];
    for (int64_t n = 0, ws; n < rows; n += ws) {
        ws = rows - n < together ? 1 : together;
        for (int64_t col = 0; col < w->k; col += CHUNK) {
            int64_t cols = w->k - col < CHUNK ? w->k - col : CHUNK;
            /* Prefetch the next rows, in the order in which they lie. */
            int64_t ahead = (ws * w->k + (ws - 1) * col) / 2;
            if (ws == together)
                dots(together, xs, narrow, w, &p, n, col, cols, x + col * xs, ahead, sum);
            else
                dots(1, xs, narrow, w, &p, n, col, cols, x + col * xs, ahead, sum);
#pragma GCC unroll 4
            for (int i = 0; i < xs; i++)
                put4(y + i * ldy + n, sum4(sum[0][i], sum[1][i], sum[2][i], sum[3][i]), ws,
                     col == 0);
        }
    }
}

/* Functions of their own: in one large one, gcc 12 spills inside the loops. */
#define GEMV(xs)                                                                                   \
    __attribute__((noinline)) static void gemv##xs(const float *x, const bnbq_q4_rows *w,          \
                                                   int64_t rows, float *y, int64_t ldy) {          \
        if (w->blocksize == 32)                                                                    \
            gemv(xs, true, x, w, rows, y, ldy);                                                    \
        else                                                                                       \
            gemv(xs, false, x, w, rows, y, ldy);                                                   \
    }

GEMV(1)
GEMV(2)
GEMV(3)
GEMV(4)

BNBQ_INLINE void decode_rows(const bool narrow, const bnbq_q4_rows *w, int64_t row, int64_t ws,
                             int64_t col, int64_t cols, uint8_t *dst) {
    const planes p = planes_of(w->codebook);
    const int shift = log2_of(w->blocksize);
    for (int64_t r = 0; r < ws; r++) {
        const uint8_t *q = w->qweight + (row + r) * (w->k / 2) + col / 2;
        const float *absmax = w->absmax + (row + r) * (w->k / w->blocksize);
        float *out = (float *)(dst + r * PIECE_BYTES);
        for (int64_t c = 0; c < cols; c += GROUP) {
            _mm_prefetch((const char *)q + c / 2 + W_GROUP * (w->k / 2), _MM_HINT_T0);
            const __m256 scale = scale_of(absmax, col + c, shift, narrow, cols - c);
            const __m256i codes = codes_of(q + c / 2, narrow, cols - c);
            for (int h = 0; h < 2; h++) {
                __m256 v[4];
                look_up(codes, h, &p, v);
                for (int j = 0; j < 4; j++)
                    _mm256_store_ps(out + c + 32 * h + 8 * j, _mm256_mul_ps(v[j], scale));
            }
        }
    }
    for (int64_t r = ws; r < W_GROUP; r++)
        memset(dst + r * PIECE_BYTES, 0, PIECE_BYTES);
}

static void prepare(const void *weight, int64_t row, int64_t ws, int64_t col, int64_t cols,
                    uint8_t *dst) {
    const bnbq_q4_rows *w = weight;
    if (w->blocksize == 32)
        decode_rows(true, w, row, ws, col, cols, dst);
    else
        decode_rows(false, w, row, ws, col, cols, dst);
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
    cols = (cols + GROUP - 1) / GROUP * GROUP;
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
    case 1: gemv1(packed, w, rows, y, ldy); return;
    case 2: gemv2(packed, w, rows, y, ldy); return;
    case 3: gemv3(packed, w, rows, y, ldy); return;
    case 4: gemv4(packed, w, rows, y, ldy); return;
    }
    const blocked_product product = {
        .packed = packed,
        .m = m,
        .rows = rows,
        .k = w->k,
        .ldy = ldy,
        .chunk = CHUNK,
        .x_group = 3,
        .w = w,
        .prepare = prepare,
        .multiply = multiply_any,
    };
    run_blocked(product, y, scratch);
}

#include "q4_few_avx2.h" /* uses what stands above */

/* ---------------------------------------------------------------- backward */

static void decode_panel(const void *of, int64_t row, int64_t rows, int64_t col, int64_t cols,
                         float *panel) {
    const bnbq_q4_rows *w = ((const backward_q4 *)of)->w;
    const int64_t k0 = ((const backward_q4 *)of)->k0 + col, blocks = w->k / w->blocksize;
    const int64_t block = k0 >> log2_of(w->blocksize); /* one: a panel is 32 columns */
    for (int64_t r = row; r < row + rows; r++, panel += BACKWARD_PANEL) {
        const uint8_t *q = w->qweight + (r * w->k + k0) / 2;
        const float *absmax = w->absmax + r * blocks + block;
        _mm_prefetch((const char *)(q + BACKWARD_AHEAD * w->k / 2), _MM_HINT_T0);
        _mm_prefetch((const char *)(absmax + BACKWARD_AHEAD * blocks), _MM_HINT_T0);
        decode(q, cols, scaled(w->codebook, *absmax), panel);
    }
}

static void backward_q4_avx2(const float *gy, int64_t ldg, int64_t m, const bnbq_q4_rows *w,
                             int64_t n, int64_t k0, int64_t cols, float *gx, int64_t ldgx,
                             void *scratch) {
    assert(m >= 1 && m <= BNBQ_TILE_M && k0 % 32 == 0 && cols >= 1 && cols <= BNBQ_TILE_K);
    const backward_q4 of = {w, k0};
    run_backward(backward_fp32, decode_panel, &of, gy, ldg, m, n, cols, gx, ldgx, scratch);
}

const bnbq_q4_kernels bnbq_q4_avx2 = {
    .isa = "avx2",
    .level = BNBQ_ISA_AVX2,
    .needs = BNBQ_CPU_OF_THIS_FILE,
    .quantize = quantize_q4,
    .dequantize = dequantize_q4_avx2,
    .linear = {packed_bytes_q4_avx2, pack_q4_avx2, scratch_bytes_q4_avx2, linear_q4_avx2},
    .bf16 = {{1, {packed_bytes_few, pack_few, scratch_bytes_few, linear_few}},
             {5, {packed_bytes_q4_avx2, pack_q4_avx2, scratch_bytes_q4_avx2, linear_q4_avx2}}},
    .backward = backward_q4_avx2,
};
