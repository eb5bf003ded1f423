/* s8_avx512bf16.c - the int8 family on AVX-512 with bf16 dot products: Zen 4 and later, Cooper
 * Lake, Sapphire Rapids and later. What needs no bf16 is that of s8_avx512vnni.c.
 */
#include "../kernels.h"
#include "backward_avx512bf16.h"
#include "s8_epilogue.h"

#include <assert.h>

#if !defined(__AVX512F__) || !defined(__AVX512BW__) || !defined(__AVX512BF16__)
#error "compile with the flags of s8_avx512vnni.c and -mavx512bf16"
#endif

/* ------------------------------------------------------------------ borrowed from AVX-512 */

static int64_t quantize_s8_avx512bf16(const float *x, int64_t count, float threshold, int8_t *q,
                                      float *absmax) {
    return bnbq_s8_avx512vnni.quantize(x, count, threshold, q, absmax);
}

static void dequantize_s8_avx512bf16(const int8_t *q, int64_t count, float absmax, float *w) {
    bnbq_s8_avx512vnni.dequantize(q, count, absmax, w);
}

static size_t packed_bytes_s8_avx512bf16(int64_t m, int64_t k) {
    return bnbq_s8_avx512vnni.packed_bytes(m, k);
}

static void pack_s8_avx512bf16(const int8_t *x, int64_t i, int64_t m, int64_t k, void *packed) {
    bnbq_s8_avx512vnni.pack(x, i, m, k, packed);
}

static size_t scratch_bytes_s8_avx512bf16(int64_t m, int64_t k) {
    return bnbq_s8_avx512vnni.scratch_bytes(m, k);
}

static void linear_s8_avx512bf16(const void *packed, int64_t m, const int8_t *w, int64_t ldw,
                                 int64_t rows, int64_t k, int32_t *y, int64_t ldy, void *scratch) {
    bnbq_s8_avx512vnni.run(packed, m, w, ldw, rows, k, y, ldy, scratch);
}

static void backward_s8_avx512bf16(const float *gy, int64_t ldg, int64_t m, const int8_t *w,
                                   int64_t ldw, int64_t n, int64_t cols, float *gx, int64_t ldgx,
                                   void *scratch) {
    bnbq_s8_avx512vnni.backward(gy, ldg, m, w, ldw, n, cols, gx, ldgx, scratch);
}

/* ------------------------------------------------------------------ backward in bf16 */

typedef struct s8_pairs {
    const int8_t *q;
    const float *absmax;
    int64_t rows, ldw, ldabsmax;
    __m512i interleave;
} s8_pairs;

/* As dequantize gives them. */
BNBQ_INLINE __m512 weights16(const int8_t *q, __mmask16 valid, __m512 absmax) {
    const __m512i codes = _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(valid, q));
    return _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(codes), absmax),
                         _mm512_set1_ps((float)(1.0 / 127)));
}

BNBQ_INLINE void decode_s8_pair(const void *of, int64_t row, int64_t col, int64_t left,
                                __m512i pair[4]) {
    const s8_pairs *w = of;
    const int8_t *q0 = w->q + row * w->ldw + col, *q1 = q0 + w->ldw;
    /* Rows lie in pages of their own, so nothing else would fetch them. */
    _mm_prefetch((const char *)(q0 + PAIRS_AHEAD * w->ldw), _MM_HINT_T0);
    _mm_prefetch((const char *)(q1 + PAIRS_AHEAD * w->ldw), _MM_HINT_T0);
    const bool alone = row + 1 == w->rows;
    const __m512 absmax0 = _mm512_set1_ps(w->absmax[row * w->ldabsmax]);
    const __m512 absmax1 = _mm512_set1_ps(alone ? 0.0f : w->absmax[(row + 1) * w->ldabsmax]);
    if (alone)
        q1 = q0;
#pragma GCC unroll 4
    for (int v = 0; v < 4; v++) {
        const __mmask16 valid = columns16(left - 16 * v);
        const __m512 w0 = weights16(q0 + 16 * v, valid, absmax0);
        const __m512 w1 = weights16(q1 + 16 * v, valid, absmax1);
        pair[v] = _mm512_permutexvar_epi16(w->interleave, (__m512i)_mm512_cvtne2ps_pbh(w1, w0));
    }
}

static void backward_bf16_s8(const uint16_t *gy, int64_t ldg, int64_t m, const int8_t *w,
                             int64_t ldw, const float *absmax, int64_t ldabsmax, int64_t n,
                             int64_t cols, float *gx, int64_t ldgx, void *scratch) {
    assert(m >= 1 && m <= BNBQ_TILE_M && cols >= 1 && cols <= BNBQ_TILE_K);
    /* Lanes i and 16 + i side by side. */
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const s8_pairs pairs = {
        .q = w,
        .absmax = absmax,
        .rows = n,
        .ldw = ldw,
        .ldabsmax = ldabsmax,
        .interleave = _mm512_add_epi32(_mm512_mullo_epi32(lane, _mm512_set1_epi32(0x10001)),
                                       _mm512_set1_epi32(16 << 16)),
    };
    backward_pairs(decode_s8_pair, &pairs, n, gy, ldg, m, cols, gx, ldgx, scratch);
}

const bnbq_s8_kernels bnbq_s8_avx512bf16 = {
    .isa = "avx512bf16",
    .level = BNBQ_ISA_AVX512BF16,
    .needs = BNBQ_CPU_OF_THIS_FILE,
    .quantize = quantize_s8_avx512bf16,
    .dequantize = dequantize_s8_avx512bf16,
    .packed_bytes = packed_bytes_s8_avx512bf16,
    .pack = pack_s8_avx512bf16,
    .scratch_bytes = scratch_bytes_s8_avx512bf16,
    .run = linear_s8_avx512bf16,
    .scale = scale_s8,
    .decode_columns = decode_columns_s8,
    .add_outliers = add_outliers_s8,
    .backward = backward_s8_avx512bf16,
    .backward_bf16 = backward_bf16_s8,
};
