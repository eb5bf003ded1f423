/* blocking.h - the loop nest of the forward products for many rows of x: cache blocking only, no
 * instruction set, no arithmetic.
 *
 * Both operands lie as pieces of PIECE_BYTES: one row of x or W cut to a chunk of columns, so the
 * inner kernel addresses all its rows with constant offsets from one pointer. A chunk of 4 rows of
 * W (8 KB) stays in L1 while the rows of x stream past it (half of a small L1, in case another
 * hyperthread has the rest); 64 rows (128 KB) and a block of x (192 KB) stay in L2. W is prepared
 * (decoded, widened) once for all rows of x.
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

#include "../kernels.h"

static inline int log2_of(int64_t blocksize) {
    return __builtin_ctzll((unsigned long long)blocksize);
}

enum {
    PIECE_BYTES = 2048,
    W_GROUP = 4, /* rows of W in L1, and per call of the inner kernel */
    NEAR_BYTES = 16 << 10,
    X_BLOCK = 96, /* rows of x in L2; a multiple of every x_group */
};

/* A line of the next rows of W, `ahead` bytes behind those in work: to L1, or to L2 only where so
 * much is on its way that x would have to leave L1 for it. */
BNBQ_INLINE void prefetch_rows(const uint8_t *w, int64_t ahead) {
    if (ahead < NEAR_BYTES)
        __builtin_prefetch(w + ahead, 0, 3);
    else
        __builtin_prefetch(w + ahead, 0, 2);
}

/* x[m, k] as [chunk][m][PIECE_BYTES], the last chunk not shorter. */
static inline size_t blocked_bytes(int64_t m, int64_t k, int64_t chunk) {
    return (size_t)((k + chunk - 1) / chunk * m) * PIECE_BYTES;
}

static inline size_t blocked_scratch_bytes(int64_t m) {
    return (size_t)(m <= X_BLOCK ? W_GROUP : BNBQ_TILE_N) * PIECE_BYTES;
}

typedef struct blocked_product {
    const uint8_t *packed; /* from blocked_bytes() */
    int64_t m, rows, k, ldy;
    int64_t chunk;   /* columns */
    int64_t x_group; /* rows of x per call of the inner kernel, at most */
    const void *w;
    /* Rows [row, row + ws) of W, columns [col, col + cols), into dst: W_GROUP pieces, those past ws
     * zero. */
    void (*prepare)(const void *w, int64_t row, int64_t ws, int64_t col, int64_t cols,
                    uint8_t *dst);
    /* y[xs, ws] = or += pieces of x . pieces of W over cols columns; y has 32-bit elements. */
    void (*multiply)(int64_t xs, const uint8_t *x, const uint8_t *w, int64_t cols, int64_t ws,
                     int first, void *y, int64_t ldy);
} blocked_product;

/* Rows of x that the inner kernel takes of those left: the last two calls share what is there,
 * since a single row has too few independent sums to keep the multipliers busy. */
BNBQ_INLINE int64_t rows_next(int64_t left, int64_t x_group) {
    if (left >= 2 * x_group)
        return x_group;
    return left > x_group ? (left + 1) / 2 : left;
}

BNBQ_INLINE void run_blocked(blocked_product p, void *y, uint8_t *scratch) {
    for (int64_t col = 0; col < p.k; col += p.chunk, p.packed += p.m * PIECE_BYTES) {
        int64_t cols = p.k - col < p.chunk ? p.k - col : p.chunk;
        for (int64_t i0 = 0; i0 < p.m; i0 += X_BLOCK) {
            int64_t i1 = p.m - i0 < X_BLOCK ? p.m : i0 + X_BLOCK;
            for (int64_t n = 0; n < p.rows; n += W_GROUP) {
                int64_t ws = p.rows - n < W_GROUP ? p.rows - n : W_GROUP;
                uint8_t *w = scratch + (p.m <= X_BLOCK ? 0 : n * PIECE_BYTES);
                if (i0 == 0)
                    p.prepare(p.w, n, ws, col, cols, w);
                for (int64_t i = i0, xs; i < i1; i += xs) {
                    xs = rows_next(i1 - i, p.x_group);
                    p.multiply(xs, p.packed + i * PIECE_BYTES, w, cols, ws, col == 0,
                               (int32_t *)y + i * p.ldy + n, p.ldy);
                }
            }
        }
    }
}

#endif
