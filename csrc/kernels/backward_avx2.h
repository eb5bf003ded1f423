/* backward_avx2.h - gx += gy . W for a panel of decoded rows of W: the backward product of both
 * families on AVX2. Three rows of gy times 32 columns take 12 accumulators, three broadcasts and a
 * load: all sixteen registers.
 */
#ifndef BNBQ_BACKWARD_AVX2_H
#define BNBQ_BACKWARD_AVX2_H

#include "backward_blocking.h"

#include <immintrin.h>
#include <string.h>

enum {
    BACKWARD_ROWS = 128, /* rows of W decoded at a time: 16 KB per panel */
    BACKWARD_PANEL = 32, /* columns */
    BACKWARD_GROUP = 3,  /* rows of gy */
    BACKWARD_AHEAD = 32, /* rows of W from a decoded one to the one that is prefetched */
};

/* gx[xs, BACKWARD_PANEL] (+)= gy[xs, n] . panel[n, BACKWARD_PANEL] */
BNBQ_INLINE void backward_whole(const int xs, const float *gy, int64_t ldg, const float *panel,
                                int64_t n, bool first, float *gx, int64_t ldgx) {
    __m256 sum[3][4];
#pragma GCC unroll 3
    for (int i = 0; i < xs; i++)
#pragma GCC unroll 4
        for (int v = 0; v < 4; v++)
            sum[i][v] = first ? _mm256_setzero_ps() : _mm256_loadu_ps(gx + i * ldgx + 8 * v);
    for (int64_t r = 0; r < n; r++) {
        __m256 g[3];
#pragma GCC unroll 3
        for (int i = 0; i < xs; i++)
            g[i] = _mm256_set1_ps(gy[i * ldg + r]);
#pragma GCC unroll 4
        for (int v = 0; v < 4; v++) {
            __m256 w = _mm256_loadu_ps(panel + r * BACKWARD_PANEL + 8 * v);
#pragma GCC unroll 3
            for (int i = 0; i < xs; i++)
                sum[i][v] = _mm256_fmadd_ps(g[i], w, sum[i][v]);
        }
    }
#pragma GCC unroll 3
    for (int i = 0; i < xs; i++)
#pragma GCC unroll 4
        for (int v = 0; v < 4; v++)
            _mm256_storeu_ps(gx + i * ldgx + 8 * v, sum[i][v]);
}

/* The same for cols < BACKWARD_PANEL columns, in a copy. */
static void backward_part(const float *gy, const float *panel, int64_t n, int64_t cols, bool first,
                          float *gx) {
    float part[BACKWARD_PANEL] = {0};
    memcpy(part, gx, (size_t)cols * sizeof *gx);
    backward_whole(1, gy, 0, panel, n, first, part, 0);
    memcpy(gx, part, (size_t)cols * sizeof *gx);
}

static void backward_panel_any(int64_t xs, const float *gy, int64_t ldg, const float *panel,
                               int64_t n, int64_t cols, bool first, float *gx, int64_t ldgx) {
    if (cols < BACKWARD_PANEL) {
        for (int64_t i = 0; i < xs; i++)
            backward_part(gy + i * ldg, panel, n, cols, first, gx + i * ldgx);
        return;
    }
    switch (xs) {
    case 1: backward_whole(1, gy, ldg, panel, n, first, gx, ldgx); break;
    case 2: backward_whole(2, gy, ldg, panel, n, first, gx, ldgx); break;
    default: backward_whole(3, gy, ldg, panel, n, first, gx, ldgx); break;
    }
}

static const backward_kernel backward_fp32 = {BACKWARD_ROWS, BACKWARD_PANEL, BACKWARD_GROUP,
                                              backward_panel_any};

#endif
