/* neon_backward.h - gx += gy . W on fp32 vectors of 4, shared by the q4 and s8 rows of NEON.
 *
 * Each gx[i, c] is one chain of fused multiply-adds over the rows of W in ascending order, so its
 * bits depend neither on m nor on how columns or rows were cut. 4 rows of gy times 16 columns stay
 * in registers; a strip of 16 columns of W is read from L1 for every four rows of gy.
 */
#ifndef BNBQ_NEON_BACKWARD_H
#define BNBQ_NEON_BACKWARD_H

#include <arm_neon.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

/* What a backward kernel decodes at once: 64 KB of its scratch. */
enum { NEON_ROWS = 64, NEON_LD = 256 };

static inline void neon_add_block(int count, const float *gy, int64_t ldg, const float *w,
                                  int64_t rows, float *gx, int64_t ldgx) {
    float32x4_t sums[4][4];
    for (int i = 0; i < count; i++)
        for (int v = 0; v < 4; v++)
            sums[i][v] = vld1q_f32(gx + i * ldgx + 4 * v);
    for (int64_t r = 0; r < rows; r++)
        for (int i = 0; i < count; i++)
            for (int v = 0; v < 4; v++)
                sums[i][v] =
                    vfmaq_n_f32(sums[i][v], vld1q_f32(w + r * NEON_LD + 4 * v), gy[i * ldg + r]);
    for (int i = 0; i < count; i++)
        for (int v = 0; v < 4; v++)
            vst1q_f32(gx + i * ldgx + 4 * v, sums[i][v]);
}

/* gx[m, cols] += gy[m, rows] . w[rows, cols]; w: row stride NEON_LD, readable up to the next
 * multiple of 16 columns. */
static inline void neon_add_rows(const float *gy, int64_t ldg, int64_t m, const float *w,
                                 int64_t rows, int64_t cols, float *gx, int64_t ldgx) {
    for (int64_t c = 0; c < cols; c += 16) {
        const int64_t width = cols - c < 16 ? cols - c : 16;
        for (int64_t i = 0; i < m;) {
            const int count = m - i >= 4 ? 4 : 1;
            float edge[4 * 16] = {0}, *to = gx + i * ldgx + c;
            int64_t ld = ldgx;
            if (width < 16) { /* the last columns go through a buffer */
                for (int j = 0; j < count; j++)
                    memcpy(edge + 16 * j, to + j * ldgx, (size_t)width * sizeof(float));
                to = edge;
                ld = 16;
            }
            if (count == 4)
                neon_add_block(4, gy + i * ldg, ldg, w + c, rows, to, ld);
            else
                neon_add_block(1, gy + i * ldg, ldg, w + c, rows, to, ld);
            for (int j = 0; j < count && width < 16; j++)
                memcpy(gx + (i + j) * ldgx + c, edge + 16 * j, (size_t)width * sizeof(float));
            i += count;
        }
    }
}

static inline void neon_zero(int64_t m, int64_t cols, float *gx, int64_t ldgx) {
    for (int64_t i = 0; i < m; i++)
        memset(gx + i * ldgx, 0, (size_t)cols * sizeof(float));
}

#endif
