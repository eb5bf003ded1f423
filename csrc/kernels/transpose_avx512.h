/* transpose_avx512.h - 16 x 16 elements of 32 bits, turned round in registers. */
#ifndef BNBQ_TRANSPOSE_AVX512_H
#define BNBQ_TRANSPOSE_AVX512_H

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

#endif
