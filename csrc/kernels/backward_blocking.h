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

/* Of one instruction set. */
typedef struct backward_kernel {
    int64_t panel_rows, panel_cols; /* of W, decoded at a time */
    int64_t group;                  /* rows of gy per call of multiply, at most */
    /* gx[xs, cols] = or += gy[xs, rows] . panel[rows, panel_cols] */
    void (*multiply)(int64_t xs, const float *gy, int64_t ldg, const float *panel, int64_t rows,
                     int64_t cols, bool first, float *gx, int64_t ldgx);
} backward_kernel;

/* Rows [row, row + rows) of W, columns [col, col + cols) of the product, cols <= panel_cols. */
typedef void decode_panel_fn(const void *w, int64_t row, int64_t rows, int64_t col, int64_t cols,
                             float *panel);

/* What the decode functions of the two families are called with. */
typedef struct backward_q4 {
    const bnbq_q4_rows *w;
    int64_t k0;
} backward_q4;

typedef struct backward_s8 {
    const int8_t *w;
    int64_t ldw;
} backward_s8;

BNBQ_INLINE void run_backward(const backward_kernel k, decode_panel_fn *decode, const void *w,
                              const float *gy, int64_t ldg, int64_t m, int64_t n, int64_t cols,
                              float *gx, int64_t ldgx, float *panel) {
    for (int64_t n0 = 0; n0 < n; n0 += k.panel_rows) {
        const int64_t rows = n - n0 < k.panel_rows ? n - n0 : k.panel_rows;
        for (int64_t c = 0; c < cols; c += k.panel_cols) {
            const int64_t some = cols - c < k.panel_cols ? cols - c : k.panel_cols;
            decode(w, n0, rows, c, some, panel);
            for (int64_t i = 0, xs; i < m; i += xs) {
                xs = rows_next(m - i, k.group);
                k.multiply(xs, gy + i * ldg + n0, ldg, panel, rows, some, n0 == 0,
                           gx + i * ldgx + c, ldgx);
            }
        }
    }
}

#endif
