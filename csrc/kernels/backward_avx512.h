/* backward_avx512.h - gx += gy . W for a few decoded rows of W: the backward product of both
 * families on AVX-512.
 *
 * Lanes run along the columns, so a result is one chain of FMAs over n in ascending order whatever
 * m is; between calls it rests in gx, exactly. Six rows of gy times 64 columns give 24
 * accumulators, enough to hide the latency of two FMA units, and 10 loads for 24 FMAs.
 */
#ifndef BNBQ_BACKWARD_AVX512_H
#define BNBQ_BACKWARD_AVX512_H

#include "blocking.h"

#include <immintrin.h>
#include <string.h>

enum {
    BACKWARD_ROWS = 64,  /* rows of W decoded at a time: 16 KB per panel */
    BACKWARD_PANEL = 64, /* columns */
};

/* gx[xs, cols] (+)= gy[xs, n] . panel[n, BACKWARD_PANEL]; cols <= BACKWARD_PANEL */
BNBQ_INLINE void backward_panel(const int xs, const float *gy, int64_t ldg, const float *panel,
                                int64_t n, int64_t cols, bool first, float *gx, int64_t ldgx) {
    __m512 sum[6][4];
    __mmask16 mask[4];
#pragma GCC unroll 4
    for (int v = 0; v < 4; v++) {
        int64_t left = cols - 16 * v;
        mask[v] = left >= 16 ? 0xffff : left <= 0 ? 0 : (__mmask16)((1 << left) - 1);
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

/* w: [ceil(cols / BACKWARD_PANEL)][BACKWARD_ROWS][BACKWARD_PANEL], n rows filled. */
static inline void backward_rows(const float *gy, int64_t ldg, int64_t m, const float *w, int64_t n,
                                 int64_t cols, bool first, float *gx, int64_t ldgx) {
    for (int64_t c = 0; c < cols; c += BACKWARD_PANEL) {
        const float *panel = w + c * BACKWARD_ROWS;
        for (int64_t i = 0; i < m; i += 6) {
            const float *g = gy + i * ldg;
            float *out = gx + i * ldgx + c;
            switch (m - i) {
            case 1: backward_panel(1, g, ldg, panel, n, cols - c, first, out, ldgx); break;
            case 2: backward_panel(2, g, ldg, panel, n, cols - c, first, out, ldgx); break;
            case 3: backward_panel(3, g, ldg, panel, n, cols - c, first, out, ldgx); break;
            case 4: backward_panel(4, g, ldg, panel, n, cols - c, first, out, ldgx); break;
            case 5: backward_panel(5, g, ldg, panel, n, cols - c, first, out, ldgx); break;
            default: backward_panel(6, g, ldg, panel, n, cols - c, first, out, ldgx); break;
            }
        }
    }
}

#endif
