/* backward_blocking.h - the loop nest of the backward products, gx = gy . W: cache blocking only,
 * no instruction set, no arithmetic.
 *
 * Lanes run along the columns, so each result is one chain of additions over the rows of W in
 * ascending order, whatever m and the cut are; it rests in gx, exactly, while other rows or columns
 * have their turn. A panel, a few columns of many rows of W, is decoded once for all rows of gy.
 */
#ifndef BNBQ_BACKWARD_BLOCKING_H
#define BNBQ_BACKWARD_BLOCKING_H

#include "blocking.h"

typedef struct backward_product {
    const void *gy;
    int64_t gy_size; /* of an element */
    int64_t ldg, m, n, cols;
    float *gx;
    int64_t ldgx;
    int64_t panel_rows, panel_cols;
    int64_t group; /* rows of gy per call of the inner kernel, at most */
    const void *w;
    /* Rows [row, row + rows) of W, columns [col, col + cols) of the product, cols <= panel_cols. */
    void (*decode)(const void *w, int64_t row, int64_t rows, int64_t col, int64_t cols,
                   void *panel);
    /* gx[xs, cols] = or += gy[xs, rows] . panel */
    void (*multiply)(int64_t xs, const void *gy, int64_t ldg, const void *panel, int64_t rows,
                     int64_t cols, bool first, float *gx, int64_t ldgx);
    void *scratch;
} backward_product;

BNBQ_INLINE void run_backward(backward_product p) {
    for (int64_t n0 = 0; n0 < p.n; n0 += p.panel_rows) {
        const int64_t rows = p.n - n0 < p.panel_rows ? p.n - n0 : p.panel_rows;
        for (int64_t c = 0; c < p.cols; c += p.panel_cols) {
            const int64_t cols = p.cols - c < p.panel_cols ? p.cols - c : p.panel_cols;
            p.decode(p.w, n0, rows, c, cols, p.scratch);
            for (int64_t i = 0, xs; i < p.m; i += xs) {
                xs = rows_next(p.m - i, p.group);
                p.multiply(xs, (const char *)p.gy + (i * p.ldg + n0) * p.gy_size, p.ldg, p.scratch,
                           rows, cols, n0 == 0, p.gx + i * p.ldgx + c, p.ldgx);
            }
        }
    }
}

#endif
