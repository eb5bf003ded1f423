/* s8_avx512bf16.c - the int8 family on AVX-512 with bf16 dot products: Zen 4 and later, Cooper
 * Lake, Sapphire Rapids and later. What needs no bf16 is that of s8_avx512vnni.c.
 *
 * History, 4096 x 4096, one thread of a busy Zen 4, weights from DRAM, 40 % of the columns outliers
 * of bf16: m = 1 1.7 ms, 4 1.9, 16 4.0, 64 11.2, 256 39; with the product of s8_epilogue.h, in fp32
 * and by gathered bytes, 3.9, 4.4, 7.3, 19.3, 65.
 */
#include "../kernels.h"
#include "backward_avx512bf16.h"
#include "lanes_avx512.h"
#include "s8_epilogue.h"

#define LENDER_S8 bnbq_s8_avx512vnni
#include "borrow_s8.h"

#include <assert.h>

#if !defined(__AVX512F__) || !defined(__AVX512BW__) || !defined(__AVX512BF16__)
#error "compile with the flags of s8_avx512vnni.c and -mavx512bf16"
#endif

/* ------------------------------------------------------------------ borrowed from AVX-512 */

static size_t packed_bytes_s8_avx512bf16(int64_t m, int64_t k) {
    return bnbq_s8_avx512vnni.packed_bytes(m, k);
}

static void pack_s8_avx512bf16(const int8_t *x, int64_t i, int64_t m, int64_t k, void *packed) {
    bnbq_s8_avx512vnni.pack(x, i, m, k, packed);
}

static size_t scratch_bytes_s8_avx512bf16(int64_t m, int64_t k) {
    return bnbq_s8_avx512vnni.scratch_bytes(m, k);
}

static void linear_s8_avx512bf16(const void *packed, int64_t m, const int8_t *w, int64_t ldw,
                                 int64_t rows, int64_t k, int32_t *y, int64_t ldy, void *scratch) {
    bnbq_s8_avx512vnni.run(packed, m, w, ldw, rows, k, y, ldy, scratch);
}

/* ------------------------------------------------------------------ products in bf16 */

/* As dequantize gives them. */
BNBQ_INLINE __m512 weights16(__m512i codes, __m512 absmax) {
    return _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(codes), absmax),
                         _mm512_set1_ps((float)(1.0 / 127)));
}

/* Lanes of a and b in bf16, side by side. */
BNBQ_INLINE __m512i interleaved(__m512 a, __m512 b) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i order = _mm512_add_epi32(_mm512_mullo_epi32(lane, _mm512_set1_epi32(0x10001)),
                                           _mm512_set1_epi32(16 << 16));
    return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(b, a));
}

typedef struct s8_pairs {
    const int8_t *q;
    const float *absmax;
    int64_t rows, ldw, ldabsmax;
} s8_pairs;

BNBQ_INLINE __m512i load_codes(const int8_t *q, __mmask16 valid) {
    return _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(valid, q));
}

BNBQ_INLINE void decode_s8_pair(const void *of, int64_t row, int64_t col, int64_t left,
                                __m512i pair[4]) {
    const s8_pairs *w = of;
    const int8_t *q0 = w->q + row * w->ldw + col, *q1 = q0 + w->ldw;
    /* Rows lie in pages of their own, so nothing else would fetch them. */
    _mm_prefetch((const char *)(q0 + PAIRS_AHEAD * w->ldw), _MM_HINT_T0);
    _mm_prefetch((const char *)(q1 + PAIRS_AHEAD * w->ldw), _MM_HINT_T0);
    const bool alone = row + 1 == w->rows;
    const __m512 absmax0 = _mm512_set1_ps(w->absmax[row * w->ldabsmax]);
    const __m512 absmax1 = _mm512_set1_ps(alone ? 0.0f : w->absmax[(row + 1) * w->ldabsmax]);
    if (alone)
        q1 = q0;
#pragma GCC unroll 4
    for (int v = 0; v < 4; v++) {
        const __mmask16 valid = first16(left - 16 * v);
        pair[v] = interleaved(weights16(load_codes(q0 + 16 * v, valid), absmax0),
                              weights16(load_codes(q1 + 16 * v, valid), absmax1));
    }
}

static void backward_bf16_s8(const uint16_t *gy, int64_t ldg, int64_t m, const int8_t *w,
                             int64_t ldw, const float *absmax, int64_t ldabsmax, int64_t n,
                             int64_t cols, float *gx, int64_t ldgx, void *scratch) {
    assert(m >= 1 && m <= BNBQ_TILE_M && cols >= 1 && cols <= BNBQ_TILE_K);
    const s8_pairs pairs = {
        .q = w,
        .absmax = absmax,
        .rows = n,
        .ldw = ldw,
        .ldabsmax = ldabsmax,
    };
    backward_pairs(decode_s8_pair, &pairs, n, gy, ldg, m, cols, gx, ldgx, scratch);
}

/* Outliers are the backward product of another matrix, whose row p is column columns[p] of W: the
 * bytes of 64 columns of the tile are turned round as dwords, once for all outliers among them,
 * and then a column is one byte of each lane. Fewer instructions than gathering single bytes from
 * a few percent of the columns on. */
enum { TURNED = 64 /* columns */, TURNED_AHEAD = 2 * TURNED };

typedef struct turned_block {
    __m512i codes[TURNED / 4][4]; /* four columns of each row: 16 rows per vector */
    __m512 absmax[4];
    int64_t codes_end, absmax_end; /* the columns behind */
} turned_block;

typedef struct s8_columns {
    const bnbq_s8_rows *w;
    int64_t rows, count;
    const int64_t *columns;
    turned_block *block;
} s8_columns;

static __attribute__((noinline)) void turn_codes(const s8_columns *of, int64_t column) {
    const int64_t k = of->w->k, first = column / TURNED * TURNED, left = k - first;
    const __mmask64 valid = left >= TURNED ? ~0ull : (1ull << left) - 1;
    for (int v = 0; v < 4; v++) {
        const int8_t *q = of->w->qweight + 16 * v * k + first;
        __m512i t[16];
#pragma GCC unroll 16
        for (int r = 0; r < 16; r++, q += k) {
            _mm_prefetch((const char *)q + TURNED_AHEAD, _MM_HINT_T0);
            t[r] = _mm512_maskz_loadu_epi8(16 * v + r < of->rows ? valid : 0, q);
        }
        transpose16(t);
#pragma GCC unroll 16
        for (int d = 0; d < 16; d++)
            of->block->codes[d][v] = t[d];
    }
    of->block->codes_end = first + TURNED;
}

static __attribute__((noinline)) void load_scales(const s8_columns *of, int64_t column) {
    const int64_t blocksize = of->w->blocksize, b = column / blocksize;
    const int64_t blocks = (of->w->k + blocksize - 1) / blocksize;
    float absmax[BNBQ_TILE_N] = {0};
    for (int64_t j = 0; j < of->rows; j++)
        absmax[j] = of->w->absmax[j * blocks + b];
    memcpy(of->block->absmax, absmax, sizeof absmax);
    of->block->absmax_end = (b + 1) * blocksize;
}

BNBQ_INLINE void decode_column(const s8_columns *of, int64_t column, __m512 w[4]) {
    if (column >= of->block->codes_end)
        turn_codes(of, column);
    if (column >= of->block->absmax_end)
        load_scales(of, column);
    const __m512i *codes = of->block->codes[column % TURNED / 4];
    const __m128i above = _mm_cvtsi64_si128(24 - column % 4 * 8);
#pragma GCC unroll 4
    for (int v = 0; v < 4; v++)
        w[v] = weights16(_mm512_srai_epi32(_mm512_sll_epi32(codes[v], above), 24),
                         of->block->absmax[v]);
}

BNBQ_INLINE void decode_column_pair(const void *w, int64_t p, int64_t col, int64_t left,
                                    __m512i pair[4]) {
    (void)col, (void)left; /* one panel */
    const s8_columns *of = w;
    __m512 w0[4], w1[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(),
                           _mm512_setzero_ps()};
    decode_column(of, of->columns[p], w0);
    if (p + 1 < of->count)
        decode_column(of, of->columns[p + 1], w1);
#pragma GCC unroll 4
    for (int v = 0; v < 4; v++)
        pair[v] = interleaved(w0[v], w1[v]);
}

static void multiply_outliers_s8(const uint16_t *value, int64_t ldv, int64_t m,
                                 const bnbq_s8_rows *w, int64_t rows, const int64_t *columns,
                                 int64_t count, float *sums, void *scratch) {
    assert(m >= 1 && m <= BNBQ_TILE_M && rows >= 1 && rows <= BNBQ_TILE_N && count >= 1);
    turned_block block = {.codes_end = 0, .absmax_end = 0};
    const s8_columns of = {w, rows, count, columns, &block};
    backward_pairs(decode_column_pair, &of, count, value, ldv, m, rows, sums, BNBQ_TILE_N, scratch);
}

const bnbq_s8_kernels bnbq_s8_avx512bf16 = {
    .isa = "avx512bf16",
    .level = BNBQ_ISA_AVX512BF16,
    .needs = BNBQ_CPU_OF_THIS_FILE,
    .quantize = borrowed_quantize_s8,
    .dequantize = borrowed_dequantize_s8,
    .packed_bytes = packed_bytes_s8_avx512bf16,
    .pack = pack_s8_avx512bf16,
    .scratch_bytes = scratch_bytes_s8_avx512bf16,
    .run = linear_s8_avx512bf16,
    .scale = scale_s8,
    .decode_columns = decode_columns_s8,
    .add_outliers = add_outliers_s8,
    .multiply_outliers_bf16 = multiply_outliers_s8,
    .backward = borrowed_backward_s8,
    .backward_bf16 = backward_bf16_s8,
};
