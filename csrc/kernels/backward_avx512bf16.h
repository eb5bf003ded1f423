/* backward_avx512bf16.h - gx = gy . W in bf16: the backward product of both families on AVX-512
 * BF16.
 *
 * vdpbf16ps adds two products to each fp32 lane. Lanes run along the columns and the two products
 * are of rows 2p and 2p + 1 of W: a decoded pair has the two weights of a column side by side, and
 * a dword of gy is the two gradients that all columns share. So nothing is summed across lanes: a
 * result is one chain over the pairs in ascending order whatever m is, and rests in gx, exactly,
 * while other rows or columns have their turn. Six rows of gy times 64 columns give 24
 * accumulators, and 10 loads for 24 products.
 *
 * Up to PAIRS_GROUP rows of gy use each decoded pair at once. For more, 256 rows of a panel of 64
 * columns are decoded to scratch; that is a whole L1, but it is read in order and rarely enough
 * (256 bytes in 24 cycles) to come from L2, and half of it would double the traffic of gx.
 *
 * Like the instruction, this treats subnormal bf16 (below 1.2e-38) as zero.
 * History, 4096 x 4096 nf4, one thread of a busy Zen 4 at 3.65 GHz (one vdpbf16ps of 512 bits per
 * cycle allows 37 ms for m = 256), weights from DRAM: m = 1 1.05 ms, 4 1.4, 8 3.0, 16 4.1, 64 11.4,
 * 256 41. Decoding 128 rows at a time took 2 ms more at m = 256.
 */
#ifndef BNBQ_BACKWARD_AVX512BF16_H
#define BNBQ_BACKWARD_AVX512BF16_H

#include "blocking.h"
#include "lanes_avx512.h"

#include <immintrin.h>
#include <string.h>

enum {
    PAIRS_PANEL = 64, /* columns of W decoded together */
    PAIRS_GROUP = 6,  /* rows of gy multiplied together */
    PAIRS_MANY = 128, /* pairs of rows of W decoded to scratch, and */
    PAIRS_FEW = 8,    /* used at once before the next columns */
    PAIRS_AHEAD = 16, /* rows of W from a decoded one to the one that is prefetched */
};

/* Rows `row` and `row` + 1 of W, from column `col` of the product on, of which `left` are left: up
 * to 64 columns in the lanes of four vectors. A row past the last is zeros, columns are anything.
 */
typedef void decode_pair(const void *w, int64_t row, int64_t col, int64_t left, __m512i pair[4]);

BNBQ_INLINE void load_sums(const int xs, const float *gx, int64_t ldgx, int64_t cols,
                           __m512 sum[PAIRS_GROUP][4]) {
#pragma GCC unroll 6
    for (int i = 0; i < xs; i++)
#pragma GCC unroll 4
        for (int v = 0; v < 4; v++)
            sum[i][v] = _mm512_maskz_loadu_ps(first16(cols - 16 * v), gx + i * ldgx + 16 * v);
}

BNBQ_INLINE void zero_sums(const int xs, __m512 sum[PAIRS_GROUP][4]) {
#pragma GCC unroll 6
    for (int i = 0; i < xs; i++)
#pragma GCC unroll 4
        for (int v = 0; v < 4; v++)
            sum[i][v] = _mm512_setzero_ps();
}

BNBQ_INLINE void store_sums(const int xs, float *gx, int64_t ldgx, int64_t cols,
                            __m512 sum[PAIRS_GROUP][4]) {
#pragma GCC unroll 6
    for (int i = 0; i < xs; i++)
#pragma GCC unroll 4
        for (int v = 0; v < 4; v++)
            _mm512_mask_storeu_ps(gx + i * ldgx + 16 * v, first16(cols - 16 * v), sum[i][v]);
}

/* sum[xs][4] += gy[xs, 2] . pair */
BNBQ_INLINE void add_pair(const int xs, const uint16_t *gy, int64_t ldg, const __m512i pair[4],
                          __m512 sum[PAIRS_GROUP][4]) {
#pragma GCC unroll 6
    for (int i = 0; i < xs; i++) {
        int32_t two;
        memcpy(&two, gy + i * ldg, sizeof two);
        const __m512bh g = (__m512bh)_mm512_set1_epi32(two);
#pragma GCC unroll 4
        for (int v = 0; v < 4; v++)
            sum[i][v] = _mm512_dpbf16_ps(sum[i][v], g, (__m512bh)pair[v]);
    }
}

/* gx[xs, cols] (+)= gy[xs, 2 * pairs] . panel[pairs]; cols <= PAIRS_PANEL */
BNBQ_INLINE void multiply_panel(const int xs, const uint16_t *gy, int64_t ldg,
                                const __m512i (*panel)[4], int64_t pairs, int64_t cols, bool first,
                                float *gx, int64_t ldgx) {
    __m512 sum[PAIRS_GROUP][4];
    if (first)
        zero_sums(xs, sum);
    else
        load_sums(xs, gx, ldgx, cols, sum);
    for (int64_t p = 0; p < pairs; p++)
        add_pair(xs, gy + 2 * p, ldg, panel[p], sum);
    store_sums(xs, gx, ldgx, cols, sum);
}

static void multiply_panel_any(int64_t xs, const uint16_t *gy, int64_t ldg,
                               const __m512i (*panel)[4], int64_t pairs, int64_t cols, bool first,
                               float *gx, int64_t ldgx) {
    switch (xs) {
    case 1: multiply_panel(1, gy, ldg, panel, pairs, cols, first, gx, ldgx); break;
    case 2: multiply_panel(2, gy, ldg, panel, pairs, cols, first, gx, ldgx); break;
    case 3: multiply_panel(3, gy, ldg, panel, pairs, cols, first, gx, ldgx); break;
    case 4: multiply_panel(4, gy, ldg, panel, pairs, cols, first, gx, ldgx); break;
    case 5: multiply_panel(5, gy, ldg, panel, pairs, cols, first, gx, ldgx); break;
    default: multiply_panel(6, gy, ldg, panel, pairs, cols, first, gx, ldgx); break;
    }
}

BNBQ_INLINE void backward_many(decode_pair *decode, const void *w, int64_t n, const uint16_t *gy,
                               int64_t ldg, int64_t m, int64_t cols, float *gx, int64_t ldgx,
                               __m512i (*panel)[4]) {
    for (int64_t n0 = 0; n0 < n; n0 += 2 * PAIRS_MANY) {
        const int64_t rows = n - n0 < 2 * PAIRS_MANY ? n - n0 : 2 * PAIRS_MANY;
        for (int64_t c = 0; c < cols; c += PAIRS_PANEL) {
            for (int64_t r = 0; r < rows; r += 2)
                decode(w, n0 + r, c, cols - c, panel[r / 2]);
            for (int64_t i = 0, xs; i < m; i += xs) {
                xs = rows_next(m - i, PAIRS_GROUP);
                multiply_panel_any(xs, gy + i * ldg + n0, ldg, panel, (rows + 1) / 2, cols - c,
                                   n0 == 0, gx + i * ldgx + c, ldgx);
            }
        }
    }
}

BNBQ_INLINE void backward_few(const int xs, decode_pair *decode, const void *w, int64_t n,
                              const uint16_t *gy, int64_t ldg, int64_t cols, float *gx,
                              int64_t ldgx) {
    for (int64_t n0 = 0; n0 < n; n0 += 2 * PAIRS_FEW) {
        const int64_t end = n - n0 < 2 * PAIRS_FEW ? n : n0 + 2 * PAIRS_FEW;
        for (int64_t c = 0; c < cols; c += PAIRS_PANEL) {
            __m512 sum[PAIRS_GROUP][4];
            if (n0 == 0)
                zero_sums(xs, sum);
            else
                load_sums(xs, gx + c, ldgx, cols - c, sum);
            for (int64_t r = n0; r < end; r += 2) {
                __m512i pair[4];
                decode(w, r, c, cols - c, pair);
                add_pair(xs, gy + r, ldg, pair, sum);
            }
            store_sums(xs, gx + c, ldgx, cols - c, sum);
        }
    }
}

/* gx[m, cols] = gy[m, n] . W */
BNBQ_INLINE void backward_pairs(decode_pair *decode, const void *w, int64_t n, const uint16_t *gy,
                                int64_t ldg, int64_t m, int64_t cols, float *gx, int64_t ldgx,
                                void *scratch) {
    switch (m) {
    case 1: backward_few(1, decode, w, n, gy, ldg, cols, gx, ldgx); break;
    case 2: backward_few(2, decode, w, n, gy, ldg, cols, gx, ldgx); break;
    case 3: backward_few(3, decode, w, n, gy, ldg, cols, gx, ldgx); break;
    case 4: backward_few(4, decode, w, n, gy, ldg, cols, gx, ldgx); break;
    case 5: backward_few(5, decode, w, n, gy, ldg, cols, gx, ldgx); break;
    case 6: backward_few(6, decode, w, n, gy, ldg, cols, gx, ldgx); break;
    default: backward_many(decode, w, n, gy, ldg, m, cols, gx, ldgx, scratch); break;
    }
}

#endif
