/* transpose_avx512.h - 16 x 16 elements of 32 bits, turned round in registers, and the scales of a
 * tile so that lanes are rows of W.
 */
#ifndef BNBQ_TRANSPOSE_AVX512_H
#define BNBQ_TRANSPOSE_AVX512_H

#include "../kernels.h"

#include <immintrin.h>

/* t[r], lane c becomes t[c], lane r. */
static inline __attribute__((always_inline)) void transpose16(__m512i t[16]) {
    __m512i u[16];
#pragma GCC unroll 8
    for (int r = 0; r < 16; r += 2) {
        u[r] = _mm512_unpacklo_epi32(t[r], t[r + 1]);
        u[r + 1] = _mm512_unpackhi_epi32(t[r], t[r + 1]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < 16; r += 4) { /* t[r + i]: column i of each 128 bits, rows r..r+3 */
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++) {
            t[r + 2 * i] = _mm512_unpacklo_epi64(u[r + i], u[r + 2 + i]);
            t[r + 2 * i + 1] = _mm512_unpackhi_epi64(u[r + i], u[r + 2 + i]);
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) { /* 4 x 4 transpose of 128-bit groups */
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            u[4 * i + half] = _mm512_shuffle_i32x4(t[8 * half + i], t[8 * half + 4 + i], 0x88);
            u[4 * i + 2 + half] = _mm512_shuffle_i32x4(t[8 * half + i], t[8 * half + 4 + i], 0xdd);
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(u[4 * i], u[4 * i + 1], 0x88);
        t[8 + i] = _mm512_shuffle_i32x4(u[4 * i], u[4 * i + 1], 0xdd);
        t[4 + i] = _mm512_shuffle_i32x4(u[4 * i + 2], u[4 * i + 3], 0x88);
        t[12 + i] = _mm512_shuffle_i32x4(u[4 * i + 2], u[4 * i + 3], 0xdd);
    }
}

/* [k / blocksize][BNBQ_TILE_N], times `factor`, zero where there is no row; in whole vectors of
 * blocks. */
static inline void transpose_scales(const bnbq_q4_rows *w, int64_t rows, float factor,
                                    float *scales) {
    const int64_t blocks = w->k / w->blocksize;
    for (int64_t b = 0; b < blocks; b += 16) {
        const __mmask16 mask = blocks - b >= 16 ? 0xffff : (__mmask16)((1u << (blocks - b)) - 1);
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

#endif
