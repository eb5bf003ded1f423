/* backward_avx512.h - gx += gy . W for a panel of decoded rows of W: the backward product of both
 * families on AVX-512. Six rows of gy times 64 columns give 24 accumulators, enough to hide the
 * latency of two FMA units, and 10 loads for 24 FMAs.
 *
 * History, 4096 x 4096 nf4, one thread of a busy Zen 4 at 3.65 GHz, weights from DRAM: m = 1 2.7
 * ms, 8 4.8, 64 23, 256 83 (one FMA of 512 bits per cycle allows 74).
 */
#ifndef BNBQ_BACKWARD_AVX512_H
#define BNBQ_BACKWARD_AVX512_H

#include "backward_blocking.h"
#include "lanes_avx512.h"

#include <immintrin.h>

enum {
    BACKWARD_ROWS = 128, /* rows of W decoded at a time: 32 KB per panel */
    BACKWARD_PANEL = 64, /* columns */
    BACKWARD_GROUP = 6,  /* rows of gy */
    BACKWARD_AHEAD = 32, /* rows of W from a decoded one to the one that is prefetched */
};

/* gx[xs, cols] (+)= gy[xs, n] . panel[n, BACKWARD_PANEL]; cols <= BACKWARD_PANEL */
BNBQ_INLINE void backward_panel(const int xs, const float *gy, int64_t ldg, const float *panel,
                                int64_t n, int64_t cols, bool first, float *gx, int64_t ldgx) {
    __m512 sum[6][4];
    __mmask16 mask[4];
#pragma GCC unroll 4
    for (int v = 0; v < 4; v++) {
        mask[v] = first16(cols - 16 * v);
#pragma GCC unroll 6
        for (int i = 0; i < xs; i++)
            sum[i][v] = first ? _mm512_setzero_ps()
                              : _mm512_maskz_loadu_ps(mask[v], gx + i * ldgx + 16 * v);
    }
    for (int64_t r = 0; r < n; r++) {
        __m512 w[4];
#pragma GCC unroll 4
        for (int v = 0; v < 4; v++)
            w[v] = _mm512_loadu_ps(panel + r * BACKWARD_PANEL + 16 * v);
#pragma GCC unroll 6
        for (int i = 0; i < xs; i++) {
            __m512 g = _mm512_set1_ps(gy[i * ldg + r]);
#pragma GCC unroll 4
            for (int v = 0; v < 4; v++)
                sum[i][v] = _mm512_fmadd_ps(g, w[v], sum[i][v]);
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < xs; i++)
#pragma GCC unroll 4
        for (int v = 0; v < 4; v++)
            _mm512_mask_storeu_ps(gx + i * ldgx + 16 * v, mask[v], sum[i][v]);
}

static void backward_panel_any(int64_t xs, const float *gy, int64_t ldg, const float *panel,
                               int64_t n, int64_t cols, bool first, float *gx, int64_t ldgx) {
    switch (xs) {
    case 1: backward_panel(1, gy, ldg, panel, n, cols, first, gx, ldgx); break;
    case 2: backward_panel(2, gy, ldg, panel, n, cols, first, gx, ldgx); break;
    case 3: backward_panel(3, gy, ldg, panel, n, cols, first, gx, ldgx); break;
    case 4: backward_panel(4, gy, ldg, panel, n, cols, first, gx, ldgx); break;
    case 5: backward_panel(5, gy, ldg, panel, n, cols, first, gx, ldgx); break;
    default: backward_panel(6, gy, ldg, panel, n, cols, first, gx, ldgx); break;
    }
}

static const backward_kernel backward_fp32 = {BACKWARD_ROWS, BACKWARD_PANEL, BACKWARD_GROUP,
                                              backward_panel_any};

#endif
