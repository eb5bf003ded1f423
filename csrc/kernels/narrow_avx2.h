/* narrow_avx2.h - fp32 rounded to a 16-bit dtype, as in float16.h: nearest even, NaN quiet. */
#ifndef BNBQ_NARROW_AVX2_H
#define BNBQ_NARROW_AVX2_H

#include "../bnbq.h"

#include <immintrin.h>

/* In the low half of each lane. */
static inline __m256i bf16_of(__m256 x) {
    __m256i bits = _mm256_castps_si256(x);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i up = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
    __m256i rounded = _mm256_add_epi32(bits, up);
    __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    __m256 nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
    rounded = _mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(nan));
    return _mm256_srli_epi32(rounded, 16);
}

/* dtype: BNBQ_BF16 or BNBQ_F16. */
static inline __m128i narrow8(__m256 x, bnbq_dtype dtype) {
    if (dtype == BNBQ_F16)
        return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
    __m256i half = bf16_of(x);
    return _mm_packus_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

#endif
