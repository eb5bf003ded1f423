/* edge_avx2.c - fp16, bf16 <-> fp32 eight or sixteen at a time: Haswell and later, Zen and later.
 *
 * fp16 by the F16C instructions, which round to nearest even whatever MXCSR says and ignore flush
 * to zero; bf16 by integer arithmetic, as in float16.h. Ends are done by the scalar table.
 *
 * Source: Intel SDM volume 2, VCVTPH2PS and VCVTPS2PH (NaN becomes quiet and keeps its payload).
 */
#include "../kernels.h"
#include "narrow_avx2.h"

#include <immintrin.h>
#include <string.h>

#if !defined(__AVX2__) || !defined(__FMA__) || !defined(__F16C__)
#error "compile with -mavx2 -mfma -mf16c"
#endif

static void widen_edge_avx2(const void *src, bnbq_dtype dtype, int64_t count, float *dst) {
    const uint16_t *halves = src;
    int64_t i = 0;
    if (dtype == BNBQ_BF16) {
        for (; i + 8 <= count; i += 8) {
            __m128i h = _mm_loadu_si128((const __m128i *)(halves + i));
            __m256i bits = _mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16);
            _mm256_storeu_si256((__m256i *)(dst + i), bits);
        }
    } else if (dtype == BNBQ_F16) {
        for (; i + 8 <= count; i += 8) {
            __m128i h = _mm_loadu_si128((const __m128i *)(halves + i));
            _mm256_storeu_ps(dst + i, _mm256_cvtph_ps(h));
        }
    } else {
        memcpy(dst, src, (size_t)count * sizeof *dst);
        return;
    }
    if (i < count)
        bnbq_edge_scalar.widen(halves + i, dtype, count - i, dst + i);
}

static void narrow_edge_avx2(const float *src, int64_t count, bnbq_dtype dtype, void *dst) {
    uint16_t *halves = dst;
    int64_t i = 0;
    if (dtype == BNBQ_BF16) {
        for (; i + 16 <= count; i += 16) {
            __m256i a = bf16_of(_mm256_loadu_ps(src + i));
            __m256i b = bf16_of(_mm256_loadu_ps(src + i + 8));
            /* Packing goes by 128-bit lanes. */
            __m256i both = _mm256_permute4x64_epi64(_mm256_packus_epi32(a, b), 0xd8);
            _mm256_storeu_si256((__m256i *)(halves + i), both);
        }
    } else if (dtype == BNBQ_F16) {
        for (; i + 8 <= count; i += 8) {
            __m128i h = narrow8(_mm256_loadu_ps(src + i), BNBQ_F16);
            _mm_storeu_si128((__m128i *)(halves + i), h);
        }
    } else {
        memcpy(dst, src, (size_t)count * sizeof *src);
        return;
    }
    if (i < count)
        bnbq_edge_scalar.narrow(src + i, count - i, dtype, halves + i);
}

const bnbq_edge_kernels bnbq_edge_avx2 = {
    .isa = "avx2",
    .level = BNBQ_ISA_AVX2,
    .needs = BNBQ_CPU_OF_THIS_FILE,
    .widen = widen_edge_avx2,
    .narrow = narrow_edge_avx2,
};
