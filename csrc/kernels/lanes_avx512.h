/* lanes_avx512.h - what the AVX-512 kernels do with the lanes of vectors: masks, sums over them,
 * and turning tiles round so that lanes are rows of W.
 */
#ifndef BNBQ_LANES_AVX512_H
#define BNBQ_LANES_AVX512_H

#include "../kernels.h"

#include <immintrin.h>

/* The first `left` of 16 lanes, which may be negative or more than there are. */
static inline __mmask16 first16(int64_t left) {
    return left >= 16 ? 0xffff : left <= 0 ? 0 : (__mmask16)((1u << left) - 1);
}

/* The sums over the lanes of four vectors. One order for all: lanes 0+2 and 1+3 of each 128 bits,
 * then the 128-bit parts 0+2 and 1+3. */
BNBQ_INLINE __m128 sum4(__m512 a, __m512 b, __m512 c, __m512 d) {
    __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    __m512 low = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd)));
    __m512 high = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd)));
    __m512 all = _mm512_add_ps(low, high);
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

/* y[0..ws) = or += sums */
BNBQ_INLINE void put4(float *y, __m128 sums, int64_t ws, bool first) {
    __mmask8 mask = (__mmask8)((1 << ws) - 1);
    if (!first)
        sums = _mm_add_ps(_mm_maskz_loadu_ps(mask, y), sums);
    _mm_mask_storeu_ps(y, mask, sums);
}

/* t[r], lane c becomes t[c], lane r. */
BNBQ_INLINE void transpose16(__m512i t[16]) {
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
