/* s8_blocking.h - the loop nest of the int8 product for many rows of x: cache blocking only, no
 * instruction set, no arithmetic.
 *
 * Lanes run along the rows of W: a panel of them is interleaved, a chunk of columns at a time, so
 * that a vector holds the same few columns of many rows and each row of x is broadcast against it.
 * Nothing is ever summed across lanes. (Integer sums are exact in any order, so unlike blocking.h
 * the nest is free to do this.)
 *
 * A chunk of a panel takes 16 KB, half of a small L1. While the first rows of x pass over it, the
 * bytes of W that come next are fetched, in step with the multiplications.
 *
 * Source: Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication" (2008).
 */
#ifndef BNBQ_S8_BLOCKING_H
#define BNBQ_S8_BLOCKING_H

#include "../kernels.h"

enum {
    CHUNK = 512, /* columns */
    BLOCK = 64,  /* columns that are interleaved at a time; the last ones are padded with zeros */
    PANEL_BYTES = 16 * 1024,
};

/* x[m, k] as [chunk][m][CHUNK], zeros to the end of a BLOCK. */
static inline size_t s8_pieces_bytes(int64_t m, int64_t k, size_t element) {
    return (size_t)((k + CHUNK - 1) / CHUNK * CHUNK * m) * element;
}

typedef struct s8_product {
    const char *pieces;
    int64_t m, rows, k, ldw, ldy;
    int64_t piece_bytes; /* of CHUNK columns of x */
    int64_t panel;       /* rows of W */
    int64_t x_group;     /* rows of x per call of multiply, at most */
    /* rows <= panel of W, cols <= CHUNK columns, into dst */
    void (*interleave)(const int8_t *w, int64_t ldw, int64_t rows, int64_t cols, void *dst);
    /* y[xs, rows] += x . panel over `blocks` BLOCKs of columns; meanwhile one chunk of `panel` rows
     * at `next` is prefetched. */
    void (*multiply)(int64_t xs, const void *x, const void *w, int64_t blocks, const int8_t *next,
                     int64_t ldw, int64_t rows, int32_t *y, int64_t ldy);
} s8_product;

/* y += x . W^T. scratch: PANEL_BYTES */
BNBQ_INLINE void s8_run_blocked(s8_product p, const int8_t *w, int32_t *y, void *scratch) {
    for (int64_t col = 0; col < p.k; col += CHUNK, p.pieces += p.m * p.piece_bytes) {
        const int64_t cols = p.k - col < CHUNK ? p.k - col : CHUNK;
        for (int64_t n = 0; n < p.rows; n += p.panel) {
            const int64_t rows = p.rows - n < p.panel ? p.rows - n : p.panel;
            const int8_t *at = w + n * p.ldw + col, *next = at + p.panel * p.ldw;
            if (n + p.panel >= p.rows) /* the next chunk, or the rows of the next tile */
                next = col + CHUNK < p.k ? w + col + CHUNK : at - col + p.panel * p.ldw;
            p.interleave(at, p.ldw, rows, cols, scratch);
            /* In groups of equal size, give or take one: few rows leave the multipliers waiting. */
            int64_t groups = (p.m + p.x_group - 1) / p.x_group;
            for (int64_t i = 0, xs; i < p.m; i += xs, groups--) {
                xs = (p.m - i + groups - 1) / groups;
                p.multiply(xs, p.pieces + i * p.piece_bytes, scratch, (cols + BLOCK - 1) / BLOCK,
                           i == 0 ? next : at, i == 0 ? p.ldw : 0, rows, y + i * p.ldy + n, p.ldy);
            }
        }
    }
}

#endif
