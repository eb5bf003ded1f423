/* neon_pairs.h - y = x . W^T with instructions that multiply two rows by two rows, 8 bytes of each,
 * and add the four sums to a 2 x 2 block: smmla of int8, bfmmla of bf16.
 *
 * Both operands lie as [group of 8 rows][8 bytes of columns][pair of rows][2][8 bytes]; the last
 * group of x has as many pairs as it needs. x is packed that way once, a chunk of W for all rows of
 * x, which pass over it while it is in L1. 8 rows of x times 8 of W stay in registers: 16 blocks,
 * 16 instructions for every 8 loads. What a row that does not exist gives is dropped, so its bytes
 * are left as they are.
 *
 * Each result is the sum over its chunks, in order, of the sum over a chunk: nothing in it depends
 * on m or on the position.
 *
 * Before including it, define: pair_result, the type of y; pair_block, a vector of four;
 * multiply_add(), the instruction.
 */
#ifndef BNBQ_NEON_PAIRS_H
#define BNBQ_NEON_PAIRS_H

#include "../kernels.h"

#include <arm_neon.h>
#include <string.h>

enum {
    DEPTH = 8, /* bytes of each row in one instruction */
    GROUP = 8, /* rows of x, and of W, in registers */
    PAIRS = GROUP / 2,
    CHUNK = 256, /* bytes of each row of W in L1: 16 KB of BNBQ_TILE_N rows */
};

static inline int64_t least(int64_t a, int64_t b) {
    return a < b ? a : b;
}

/* Bytes from one step of columns to the next, in the group of x that begins with row i. */
static inline int64_t step_of(int64_t i, int64_t m) {
    return (least(m - i, GROUP) + 1) / 2 * 2 * DEPTH;
}

static inline size_t pairs_bytes(int64_t m, int64_t row_bytes) {
    return (size_t)((m + 1) / 2 * 2 * row_bytes);
}

/* Where row i of x begins, and the bytes from one step of it to the next. */
static inline int8_t *row_of_x(void *packed, int64_t i, int64_t m, int64_t row_bytes,
                               int64_t *step) {
    const int64_t first = i / GROUP * GROUP;
    *step = step_of(first, m);
    return (int8_t *)packed + first * row_bytes + (i - first) * DEPTH;
}

/* Where row r of W begins in a chunk; steps are GROUP * DEPTH bytes apart. */
static inline int8_t *row_of_w(void *chunk, int64_t r) {
    return (int8_t *)chunk + r / GROUP * GROUP * CHUNK + r % GROUP * DEPTH;
}

/* 16 bytes of two rows of W: two steps. */
static inline void store_pair(int8_t *to, int8x16_t even, int8x16_t odd) {
    const int64x2_t a = vreinterpretq_s64_s8(even), b = vreinterpretq_s64_s8(odd);
    vst1q_s8(to, vreinterpretq_s8_s64(vzip1q_s64(a, b)));
    vst1q_s8(to + GROUP * DEPTH, vreinterpretq_s8_s64(vzip2q_s64(a, b)));
}

/* y[2 * pairs, GROUP] of some columns, stored or added. */
BNBQ_INLINE void multiply(const int pairs, const int8_t *x, const int8_t *w, int64_t bytes,
                          pair_result *y, int64_t ldy, bool add) {
    pair_block sums[PAIRS][PAIRS];
    for (int i = 0; i < pairs; i++)
        for (int r = 0; r < PAIRS; r++)
            sums[i][r] = (pair_block){0};
    for (int64_t c = 0; c < bytes; c += DEPTH, x += pairs * 2 * DEPTH, w += GROUP * DEPTH) {
        int8x16_t right[PAIRS];
        for (int r = 0; r < PAIRS; r++)
            right[r] = vld1q_s8(w + r * 2 * DEPTH);
        for (int i = 0; i < pairs; i++) {
            const int8x16_t left = vld1q_s8(x + i * 2 * DEPTH);
            for (int r = 0; r < PAIRS; r++)
                sums[i][r] = multiply_add(sums[i][r], left, right[r]);
        }
    }
    /* The halves of a block belong to two rows of y. */
    for (int i = 0; i < pairs; i++)
        for (int r = 0; r < PAIRS; r += 2) {
            const int64x2_t a = (int64x2_t)sums[i][r], b = (int64x2_t)sums[i][r + 1];
            const pair_block row[2] = {(pair_block)vzip1q_s64(a, b), (pair_block)vzip2q_s64(a, b)};
            for (int j = 0; j < 2; j++) {
                pair_result *to = y + (2 * i + j) * ldy + 2 * r;
                pair_block sum = {0};
                if (add)
                    memcpy(&sum, to, sizeof sum);
                sum = add ? sum + row[j] : row[j];
                memcpy(to, &sum, sizeof sum);
            }
        }
}

static void multiply_any(int64_t pairs, const int8_t *x, const int8_t *w, int64_t bytes,
                         pair_result *y, int64_t ldy, bool add) {
    switch (pairs) {
    case 1: multiply(1, x, w, bytes, y, ldy, add); break;
    case 2: multiply(2, x, w, bytes, y, ldy, add); break;
    case 3: multiply(3, x, w, bytes, y, ldy, add); break;
    default: multiply(PAIRS, x, w, bytes, y, ldy, add); break;
    }
}

/* xs <= GROUP rows of x by rows <= GROUP of W: what would be stored past them is not. */
static void multiply_group(int64_t xs, const int8_t *x, const int8_t *w, int64_t bytes,
                           int64_t rows, pair_result *y, int64_t ldy, bool add) {
    if (xs % 2 == 0 && rows == GROUP) {
        multiply_any(xs / 2, x, w, bytes, y, ldy, add);
        return;
    }
    pair_result edge[GROUP][GROUP];
    multiply_any((xs + 1) / 2, x, w, bytes, edge[0], GROUP, false);
    for (int64_t i = 0; i < xs; i++)
        for (int64_t r = 0; r < rows; r++)
            y[i * ldy + r] = add ? y[i * ldy + r] + edge[i][r] : edge[i][r];
}

/* prepare: bytes [at, at + bytes) of the rows of W as a chunk. scratch: BNBQ_TILE_N * CHUNK */
BNBQ_INLINE void run_pairs(const void *packed, int64_t m, int64_t row_bytes, int64_t rows,
                           pair_result *y, int64_t ldy, void *scratch,
                           void (*prepare)(const void *w, int64_t rows, int64_t at, int64_t bytes,
                                           void *chunk),
                           const void *w) {
    for (int64_t at = 0; at < row_bytes; at += CHUNK) {
        const int64_t bytes = least(row_bytes - at, CHUNK);
        prepare(w, rows, at, bytes, scratch);
        for (int64_t i = 0; i < m; i += GROUP) {
            const int8_t *x = (const int8_t *)packed + i * row_bytes + at / DEPTH * step_of(i, m);
            for (int64_t r = 0; r < rows; r += GROUP)
                multiply_group(least(m - i, GROUP), x, row_of_w(scratch, r), bytes,
                               least(rows - r, GROUP), y + i * ldy + r, ldy, at > 0);
        }
    }
}

#endif
