/* q4_few_avx2.h - few rows of bf16-valued x times a 4-bit weight on AVX2, the codebook rounded to
 * bf16.
 *
 * Two vpshufb give the two bytes of 32 values, where fp32 needs four and twice the interleaving;
 * a shift and a mask make fp32 of them. The scale goes to the sum over a block (or over what is
 * summed of it together). x is packed once in the order in which the values come out.
 *
 * History, 4096 x 4096 nf4, one thread of a busy Zen 4, weights from DRAM: m = 1 0.95 ms where the
 * fp32 kernel of q4_avx2.c takes 1.2; two chains of FMAs per row instead of one took 1.1.
 */
#ifndef BNBQ_Q4_FEW_AVX2_H
#define BNBQ_Q4_FEW_AVX2_H

#include "../float16.h"

enum {
    FEW_GROUP = 64, /* columns decoded together */
    FEW_CHUNK = 1024,
    FEW_ROWS = 4, /* rows of x that a decoded row of W is multiplied with at once, at most */
};

/* x as [chunk of columns][m][FEW_CHUNK], the last chunk filled up with zeros to whole groups. */
static int64_t few_columns(int64_t k, int64_t col) {
    int64_t left = (k + FEW_GROUP - 1) / FEW_GROUP * FEW_GROUP - col;
    return left < FEW_CHUNK ? left : FEW_CHUNK;
}

static size_t packed_bytes_few(int64_t m, int64_t k) {
    return (size_t)((k + FEW_GROUP - 1) / FEW_GROUP * FEW_GROUP * m) * sizeof(float);
}

static size_t scratch_bytes_few(int64_t m, int64_t k) {
    (void)m, (void)k;
    return 0;
}

/* Vector 4h + 2j + p of a group holds, of each 32 columns, the low (h = 0) or high nibbles of bytes
 * 8j + p + {0, 2, 4, 6}. */
static void pack_few(const float *x, int64_t i, int64_t m, int64_t k, void *packed) {
    assert(i >= 0 && i < m && m <= BNBQ_TILE_M && k % 32 == 0);
    for (int64_t c = 0; c < k; c += FEW_GROUP) {
        const int64_t chunk = c / FEW_CHUNK * FEW_CHUNK;
        float *out = (float *)packed + chunk * m + few_columns(k, chunk) * i + c - chunk;
        for (int v = 0; v < 8; v++)
            for (int lane = 0; lane < 8; lane++) {
                const int byte = v / 2 % 2 * 8 + v % 2 + lane % 4 * 2;
                const int64_t col = c + lane / 4 * 32 + 2 * byte + (v < 4);
                out[8 * v + lane] = col < k ? x[col] : 0.0f;
            }
    }
}

typedef struct few_table {
    __m256i low, high; /* bytes of the codebook in bf16 */
} few_table;

static inline few_table make_few_table(const float *codebook) {
    uint8_t low[16], high[16];
    for (int i = 0; i < 16; i++) {
        const uint16_t value = bnbq_f32_to_bf16(codebook[i]);
        low[i] = (uint8_t)value;
        high[i] = (uint8_t)(value >> 8);
    }
    return (few_table){
        _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)low)),
        _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)high)),
    };
}

/* y[i, row .. row + ws) = or += over the columns of one chunk; x: [xs][cols] of it. */
BNBQ_INLINE void few_dots(const int ws, const int xs, const bool narrow, const few_table *t,
                          const bnbq_q4_rows *w, int64_t row, int64_t blocks, int64_t col,
                          int64_t cols, const float *x, int64_t ahead, float *y, int64_t ldy) {
    const int64_t row_bytes = w->k / 2;
    const uint8_t *q = w->qweight + row * row_bytes + col / 2;
    const float *absmax = w->absmax + row * blocks;
    const int shift = log2_of(w->blocksize);
    __m256 sum[4][FEW_ROWS];
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++)
#pragma GCC unroll 4
        for (int i = 0; i < xs; i++)
            sum[r][i] = _mm256_setzero_ps();
    for (int64_t c = 0; c < cols; c += FEW_GROUP) {
        const int64_t left = w->k - col - c;
        for (int b = 0; b < ws * FEW_GROUP / 2; b += 64)
            prefetch_rows(q + c / 2 * ws + b, ahead);
#pragma GCC unroll 4
        for (int r = 0; r < ws; r++) {
            const __m256i codes = codes_of(q + r * row_bytes + c / 2, narrow, left);
            __m256 part[FEW_ROWS];
#pragma GCC unroll 2
            for (int h = 0; h < 2; h++) {
                const __m256i index =
                    _mm256_and_si256(h ? _mm256_srli_epi16(codes, 4) : codes, _mm256_set1_epi8(15));
                const __m256i low = _mm256_shuffle_epi8(t->low, index);
                const __m256i high = _mm256_shuffle_epi8(t->high, index);
#pragma GCC unroll 2
                for (int j = 0; j < 2; j++) {
                    const __m256i pairs =
                        j ? _mm256_unpackhi_epi8(low, high) : _mm256_unpacklo_epi8(low, high);
                    const __m256 even = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
                    const __m256 odd = _mm256_castsi256_ps(
                        _mm256_and_si256(pairs, _mm256_set1_epi32((int)0xffff0000)));
#pragma GCC unroll 4
                    for (int i = 0; i < xs; i++) {
                        const float *at = x + i * cols + c + 32 * h + 16 * j;
                        part[i] = h + j == 0 ? _mm256_mul_ps(even, _mm256_loadu_ps(at))
                                             : _mm256_fmadd_ps(even, _mm256_loadu_ps(at), part[i]);
                        part[i] = _mm256_fmadd_ps(odd, _mm256_loadu_ps(at + 8), part[i]);
                    }
                }
            }
            const __m256 scale = scale_of(absmax + r * blocks, col + c, shift, narrow, left);
#pragma GCC unroll 4
            for (int i = 0; i < xs; i++)
                sum[r][i] = _mm256_fmadd_ps(part[i], scale, sum[r][i]);
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < xs; i++)
        put4(y + i * ldy + row, sum4(sum[0][i], sum[1][i], sum[2][i], sum[3][i]), ws, col == 0);
}

BNBQ_INLINE void few_rows(const int xs, const bool narrow, const float *packed, int64_t i,
                          int64_t m, const bnbq_q4_rows *w, int64_t rows, float *y, int64_t ldy) {
    const int together = xs <= 2 ? 4 : 2;
    const few_table t = make_few_table(w->codebook);
    const int64_t blocks = w->k / w->blocksize;
    y += i * ldy;
    for (int64_t n = 0, ws; n < rows; n += ws) {
        ws = rows - n < together ? 1 : together;
        for (int64_t col = 0; col < w->k; col += FEW_CHUNK) {
            const int64_t cols = few_columns(w->k, col);
            const float *x = packed + col * m + i * cols;
            /* Prefetch the next rows, in the order in which they lie. */
            const int64_t ahead = (ws * w->k + (ws - 1) * col) / 2;
            if (ws == together)
                few_dots(together, xs, narrow, &t, w, n, blocks, col, cols, x, ahead, y, ldy);
            else
                few_dots(1, xs, narrow, &t, w, n, blocks, col, cols, x, ahead, y, ldy);
        }
    }
}

/* Functions of their own: in one large one, gcc 12 spills inside the loops. */
#define FEW(xs)                                                                                    \
    __attribute__((noinline)) static void few##xs(const float *packed, int64_t i, int64_t m,       \
                                                  const bnbq_q4_rows *w, int64_t rows, float *y,   \
                                                  int64_t ldy) {                                   \
        if (w->blocksize == 32)                                                                    \
            few_rows(xs, true, packed, i, m, w, rows, y, ldy);                                     \
        else                                                                                       \
            few_rows(xs, false, packed, i, m, w, rows, y, ldy);                                    \
    }
FEW(1)
FEW(2)
FEW(3)
FEW(4)
#undef FEW

static void linear_few(const void *packed, int64_t m, const bnbq_q4_rows *w, int64_t rows, float *y,
                       int64_t ldy, void *scratch) {
    (void)scratch;
    assert(m >= 1 && m <= BNBQ_TILE_M && rows >= 1 && rows <= BNBQ_TILE_N);
    assert(w->k % 32 == 0 && w->k % w->blocksize == 0 && ldy >= rows);
    for (int64_t i = 0, xs; i < m; i += xs) {
        xs = rows_next(m - i, FEW_ROWS);
        switch (xs) {
        case 1: few1(packed, i, m, w, rows, y, ldy); break;
        case 2: few2(packed, i, m, w, rows, y, ldy); break;
        case 3: few3(packed, i, m, w, rows, y, ldy); break;
        default: few4(packed, i, m, w, rows, y, ldy); break;
        }
    }
}

#endif
