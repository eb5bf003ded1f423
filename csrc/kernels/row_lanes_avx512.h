/* row_lanes_avx512.h - what 4-bit products whose lanes are rows of W share: 16 rows of 64 bytes are
 * transposed as dwords; up to four such vectors of rows stay in registers with some rows of x.
 */
#ifndef BNBQ_ROW_LANES_AVX512_H
#define BNBQ_ROW_LANES_AVX512_H

#include "blocking.h"
#include "lanes_avx512.h"

enum {
    GROUP = 128, /* columns decoded together: 64 packed bytes */
    LANES = 16,
    SUMS = 12, /* in registers, and as many scaled ones */
};

static inline int64_t groups_of(int64_t k) {
    return (k + GROUP - 1) / GROUP;
}

/* 128 columns of 16 packed rows of 4 bits as dwords of eight codes, transposed; 0 past the rows and
 * columns. */
BNBQ_INLINE void load_group(const uint8_t *q, int64_t row_bytes, int64_t rows, int64_t cols,
                            __m512i t[16]) {
    if (rows >= 16 && cols >= 128) {
#pragma GCC unroll 16
        for (int r = 0; r < 16; r++) {
            t[r] = _mm512_loadu_si512(q);
            q += row_bytes;
            __asm__("" : "+r"(q)); /* or gcc keeps and spills sixteen pointers */
        }
    } else {
        const __mmask16 mask = first16(cols / 8);
#pragma GCC unroll 16
        for (int r = 0; r < 16; r++)
            t[r] = r < rows ? _mm512_maskz_loadu_epi32(mask, q + r * row_bytes)
                            : _mm512_setzero_si512();
    }
    transpose16(t);
}

/* [k / blocksize][BNBQ_TILE_N], times `factor`, zero where there is no row; in whole vectors of
 * blocks. */
static inline void transpose_scales(const bnbq_q4_rows *w, int64_t rows, float factor,
                                    float *scales) {
    const int64_t blocks = w->k / w->blocksize;
    for (int64_t b = 0; b < blocks; b += 16) {
        const __mmask16 mask = first16(blocks - b);
        for (int64_t n = 0; n < BNBQ_TILE_N; n += 16) {
            __m512i t[16];
            for (int r = 0; r < 16; r++) {
                const __m512 row =
                    n + r < rows ? _mm512_maskz_loadu_ps(mask, w->absmax + (n + r) * blocks + b)
                                 : _mm512_setzero_ps();
                t[r] = _mm512_castps_si512(_mm512_mul_ps(row, _mm512_set1_ps(factor)));
            }
            transpose16(t);
            for (int i = 0; i < 16; i++)
                _mm512_store_si512(scales + (b + i) * BNBQ_TILE_N + n, t[i]);
        }
    }
}

/* F(what, xs, vs) for each shape whose sums fit: xs rows of x by vs vectors of rows of W. A shape
 * has a function of its own, not inlined: what the callers keep in registers would make gcc spill
 * sums.
 */
#define EACH_SHAPE(F, what)                                                                        \
    F(what, 1, 1)                                                                                  \
    F(what, 2, 1)                                                                                  \
    F(what, 3, 1)                                                                                  \
    F(what, 4, 1)                                                                                  \
    F(what, 5, 1)                                                                                  \
    F(what, 6, 1)                                                                                  \
    F(what, 1, 2)                                                                                  \
    F(what, 2, 2)                                                                                  \
    F(what, 3, 2)                                                                                  \
    F(what, 4, 2)                                                                                  \
    F(what, 5, 2)                                                                                  \
    F(what, 6, 2)                                                                                  \
    F(what, 1, 3)                                                                                  \
    F(what, 2, 3)                                                                                  \
    F(what, 3, 3)                                                                                  \
    F(what, 4, 3)                                                                                  \
    F(what, 1, 4)                                                                                  \
    F(what, 2, 4)                                                                                  \
    F(what, 3, 4)
static const int64_t most_rows[4] = {6, 6, 4, 3}; /* the largest xs for vs - 1 */

#endif
