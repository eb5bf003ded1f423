/* blocking.h - the loop nest of the forward products for many rows of x: cache blocking only, no
 * instruction set, no arithmetic.
 *
 * Both operands lie as rows of PIECE_BYTES: one row of x or W cut to a chunk of columns, so the
 * inner kernel addresses all its rows with constant offsets from one pointer. A chunk of 8 rows of
 * W (16 KB) stays in L1 while the rows of x stream past it; 64 rows (128 KB) and a block of x
 * (192 KB) stay in L2. W is prepared (decoded, widened) once for all rows of x.
 *
 * A chunk is also the unit of summation: each result is the sum over its chunks, in order, of the
 * sum over a chunk, which the inner kernel forms the same way whatever m and the position are.
 * That is what makes results independent of the batch.
 *
 * Source: the loop order follows Goto and van de Geijn, "Anatomy of High-Performance Matrix
 * Multiplication" (2008), with the packing of W replaced by its decoding.
 */
#ifndef BNBQ_BLOCKING_H
#define BNBQ_BLOCKING_H

#include <stddef.h>
#include <stdint.h>

#define BNBQ_INLINE static inline __attribute__((always_inline))

enum {
    PIECE_BYTES = 2048,
    W_GROUP = 4,  /* rows of W per call of the inner kernel */
    W_BLOCK = 8,  /* rows of W in L1 */
    X_BLOCK = 96, /* rows of x in L2; a multiple of every x_group */
};

/* x[m, k] as [chunk][m][PIECE_BYTES], the last chunk not shorter. */
static inline size_t blocked_bytes(int64_t m, int64_t k, int64_t chunk) {
    return (size_t)((k + chunk - 1) / chunk * m) * PIECE_BYTES;
}

static inline size_t blocked_scratch_bytes(int64_t m) {
    return (size_t)(m <= X_BLOCK ? W_BLOCK : 64) * PIECE_BYTES;
}

typedef struct blocked_product {
    const uint8_t *packed; /* from blocked_bytes() */
    int64_t m, rows, k, ldy;
    int64_t chunk;   /* columns */
    int64_t x_group; /* rows of x per call of the inner kernel, at most */
    const void *w;
    /* Rows [row, row + count) of W, columns [col, col + cols), into dst: pieces, the rows filled
     * up to a multiple of W_GROUP with anything finite. */
    void (*prepare)(const void *w, int64_t row, int64_t count, int64_t col, int64_t cols,
                    uint8_t *dst);
    /* y[xs, ws] = or += pieces of x . pieces of W over cols columns; y has 32-bit elements. */
    void (*multiply)(int64_t xs, const uint8_t *x, const uint8_t *w, int64_t cols, int64_t ws,
                     int first, void *y, int64_t ldy);
} blocked_product;

BNBQ_INLINE void run_blocked(blocked_product p, void *y, uint8_t *scratch) {
    for (int64_t col = 0; col < p.k; col += p.chunk, p.packed += p.m * PIECE_BYTES) {
        int64_t cols = p.k - col < p.chunk ? p.k - col : p.chunk;
        for (int64_t i0 = 0; i0 < p.m; i0 += X_BLOCK) {
            int64_t i1 = p.m - i0 < X_BLOCK ? p.m : i0 + X_BLOCK;
            for (int64_t n = 0; n < p.rows; n += W_BLOCK) {
                int64_t count = p.rows - n < W_BLOCK ? p.rows - n : W_BLOCK;
                uint8_t *w = scratch + (p.m <= X_BLOCK ? 0 : n * PIECE_BYTES);
                if (i0 == 0)
                    p.prepare(p.w, n, count, col, cols, w);
                for (int64_t i = i0; i < i1; i += p.x_group) {
                    int64_t xs = i1 - i < p.x_group ? i1 - i : p.x_group;
                    for (int64_t r = 0; r < count; r += W_GROUP) {
                        int64_t ws = count - r < W_GROUP ? count - r : W_GROUP;
                        p.multiply(xs, p.packed + i * PIECE_BYTES, w + r * PIECE_BYTES, cols, ws,
                                   col == 0, (int32_t *)y + i * p.ldy + n + r, p.ldy);
                    }
                }
            }
        }
    }
}

#endif
