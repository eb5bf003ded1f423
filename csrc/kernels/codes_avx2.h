/* codes_avx2.h - quantise and dequantise of the 4-bit family on AVX2.
 *
 * Source: encoding is a binary search (Knuth 6.2.1) whose loads are blends and permutes.
 * History, 14336 x 4096 bf16 <-> nf4, one thread of a Zen 4 at 3.65 GHz, weights in DRAM: quantise
 * 19.5 ms, dequantise 6.3; widening, checking and quantising in three passes took 35 and 15 ms.
 */
#ifndef BNBQ_CODES_AVX2_H
#define BNBQ_CODES_AVX2_H

#include "blocking.h"
#include "narrow_avx2.h"

#define QUANTIZE_UNIT 32
#include "quantize_q4.h"

#include <assert.h>
#include <immintrin.h>
#include <string.h>

enum { BATCH = 4096 }; /* columns quantised together: the largest block */

typedef struct search {
    __m256 step8, low4, high4; /* thresholds[7]; [3]; [11] */
    __m256 step2, step1;       /* thresholds[1, 5, 9, 13] twice; [0, 2, .. 14] */
} search;

static search make_search(const float *t) {
    return (search){
        .step8 = _mm256_set1_ps(t[7]),
        .low4 = _mm256_set1_ps(t[3]),
        .high4 = _mm256_set1_ps(t[11]),
        .step2 = _mm256_setr_ps(t[1], t[5], t[9], t[13], t[1], t[5], t[9], t[13]),
        .step1 = _mm256_setr_ps(t[0], t[2], t[4], t[6], t[8], t[10], t[12], t[14]),
    };
}

/* 2 * i, and 1 more where t < x. */
static inline __m256i descend(__m256i i, __m256 t, __m256 x) {
    __m256i below = _mm256_castps_si256(_mm256_cmp_ps(t, x, _CMP_LT_OQ));
    return _mm256_sub_epi32(_mm256_add_epi32(i, i), below);
}

/* Eight values as fp32; `dtype` is a constant of the caller. */
BNBQ_INLINE __m256 load8(const void *w, const bnbq_dtype dtype, int64_t i) {
    if (dtype == BNBQ_F32)
        return _mm256_loadu_ps((const float *)w + i);
    __m128i halves = _mm_loadu_si128((const __m128i *)((const uint16_t *)w + i));
    if (dtype == BNBQ_F16)
        return _mm256_cvtph_ps(halves);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

/* The number of thresholds below x, |x| <= 1 or an ulp more. */
BNBQ_INLINE __m256i count8(__m256 x, const search *s) {
    __m256 above = _mm256_cmp_ps(s->step8, x, _CMP_LT_OQ);
    __m256i i = _mm256_srli_epi32(_mm256_castps_si256(above), 31);
    i = descend(i, _mm256_blendv_ps(s->low4, s->high4, above), x);
    i = descend(i, _mm256_permutevar_ps(s->step2, i), x);
    return descend(i, _mm256_permutevar8x32_ps(s->step1, i), x);
}

static inline int32_t greatest_of(__m256i x) {
    __m128i half = _mm_max_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    half = _mm_max_epi32(half, _mm_unpackhi_epi64(half, half));
    return _mm_cvtsi128_si32(_mm_max_epi32(half, _mm_shuffle_epi32(half, 1)));
}

/* absmax of each block, as an integer, of which NaN and Inf are the greatest. */
BNBQ_INLINE void absmax_of(const void *w, const bnbq_dtype dtype, int64_t start, int64_t blocks,
                           int64_t blocksize, float *absmax) {
    const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
    for (int64_t b = 0, i = start; b < blocks; b++) {
        __m256i max0 = _mm256_setzero_si256(), max1 = max0;
        for (int64_t end = i + blocksize; i < end; i += 16) {
            __m256i w0 = _mm256_castps_si256(load8(w, dtype, i));
            __m256i w1 = _mm256_castps_si256(load8(w, dtype, i + 8));
            max0 = _mm256_max_epi32(max0, _mm256_and_si256(w0, magnitude));
            max1 = _mm256_max_epi32(max1, _mm256_and_si256(w1, magnitude));
        }
        int32_t bits = greatest_of(_mm256_max_epi32(max0, max1));
        memcpy(absmax + b, &bits, sizeof bits);
    }
}

BNBQ_INLINE void quantize_blocks(const void *w, const bnbq_dtype dtype, int64_t count,
                                 const bnbq_format *format, int64_t blocksize, uint8_t *qweight,
                                 float *absmax) {
    const search s = make_search(format->thresholds);
    const __m128i codes = _mm_loadu_si128((const __m128i *)format->order);
    const __m256i order = _mm256_broadcastsi128_si256(codes);
    const int64_t size = (int64_t)bnbq_dtype_size(dtype);
    /* In batches that stay in L1, so that no encoding waits for its own block's absmax; meanwhile
     * the next batch comes from memory. */
    float inverse[BATCH / 32];
    const int shift = log2_of(blocksize);
    for (int64_t start = 0; start < count; start += BATCH) {
        int64_t end = count - start < BATCH ? count : start + BATCH;
        int64_t blocks = (end - start) / blocksize;
        float *scales = absmax + start / blocksize;
        absmax_of(w, dtype, start, blocks, blocksize, scales);
        for (int64_t b = 0; b < blocks; b++)
            inverse[b] = 1.0f / (scales[b] > tiny ? scales[b] : tiny);
        for (int64_t i = start; i < end; i += 32) {
            for (int64_t line = 0; line < 32 * size; line += 64)
                _mm_prefetch((const char *)w + (i + BATCH) * size + line, _MM_HINT_T0);
            __m256 scale = _mm256_set1_ps(inverse[(i - start) >> shift]);
            __m256i n[4];
#pragma GCC unroll 4
            for (int v = 0; v < 4; v++)
                n[v] = count8(_mm256_mul_ps(load8(w, dtype, i + 8 * v), scale), &s);
            /* To bytes, to codes, pairs of codes to bytes (high nibble first). Packing goes by
             * 128-bit lanes: each holds four codes of every vector. */
            __m256i bytes = _mm256_packus_epi16(_mm256_packus_epi32(n[0], n[1]),
                                                _mm256_packus_epi32(n[2], n[3]));
            bytes = _mm256_shuffle_epi8(order, bytes);
            __m256i pairs = _mm256_maddubs_epi16(bytes, _mm256_set1_epi16(1 << 8 | 16));
            pairs = _mm256_packus_epi16(pairs, pairs);
            __m128i low = _mm256_castsi256_si128(pairs), high = _mm256_extracti128_si256(pairs, 1);
            _mm_storeu_si128((__m128i *)(qweight + i / 2), _mm_unpacklo_epi16(low, high));
        }
    }
}

typedef struct table {
    __m256 low, high; /* values of codes 0..7 and 8..15 */
} table;

BNBQ_INLINE table scaled(const float *codebook, float absmax) {
    __m256 scale = _mm256_set1_ps(absmax);
    return (table){_mm256_mul_ps(_mm256_loadu_ps(codebook), scale),
                   _mm256_mul_ps(_mm256_loadu_ps(codebook + 8), scale)};
}

/* Four packed bytes as eight values. */
BNBQ_INLINE __m256 decode8(const uint8_t *q, table t) {
    int32_t bytes;
    memcpy(&bytes, q, 4);
    /* Code i to the top of lane i: its first bit is the sign that the blend looks at. */
    __m256i top =
        _mm256_sllv_epi32(_mm256_set1_epi32(bytes), _mm256_setr_epi32(24, 28, 16, 20, 8, 12, 0, 4));
    __m256i index = _mm256_srli_epi32(top, 28);
    __m256 low = _mm256_permutevar8x32_ps(t.low, index);
    __m256 high = _mm256_permutevar8x32_ps(t.high, index);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(top));
}

/* Any count of values. */
BNBQ_INLINE void decode(const uint8_t *q, int64_t count, table t, float *w) {
    int64_t i = 0;
    for (; i + 8 <= count; i += 8)
        _mm256_storeu_ps(w + i, decode8(q + i / 2, t));
    if (i < count) {
        uint8_t bytes[4] = {0};
        float values[8];
        memcpy(bytes, q + i / 2, (size_t)(count - i + 1) / 2);
        _mm256_storeu_ps(values, decode8(bytes, t));
        memcpy(w + i, values, (size_t)(count - i) * sizeof *w);
    }
}

/* 16 packed bytes as 32 values of two bytes: vpshufb looks their low and their high bytes up. */
BNBQ_INLINE void decode_halves(const uint8_t *q, __m256i low, __m256i high, uint16_t *w) {
    __m256i pairs = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)q));
    __m256i codes = _mm256_or_si256(_mm256_slli_epi16(pairs, 8), _mm256_srli_epi16(pairs, 4));
    codes = _mm256_and_si256(codes, _mm256_set1_epi8(15));
    __m256i b0 = _mm256_shuffle_epi8(low, codes), b1 = _mm256_shuffle_epi8(high, codes);
    /* Interleaving goes by 128-bit lanes. */
    __m256i w0 = _mm256_unpacklo_epi8(b0, b1), w1 = _mm256_unpackhi_epi8(b0, b1);
    _mm256_storeu_si256((__m256i *)w, _mm256_permute2x128_si256(w0, w1, 0x20));
    _mm256_storeu_si256((__m256i *)(w + 16), _mm256_permute2x128_si256(w0, w1, 0x31));
}

/* Each value is one of sixteen in a block: these are rounded to 16 bits, and then vpshufb looks
 * their low and their high bytes up for 32 codes at a time. */
static void dequantize_halves(const uint8_t *qweight, const float *absmax, const float *codebook,
                              int64_t count, int64_t blocksize, bnbq_dtype dtype, uint16_t *w) {
    const __m128i bytes_apart = _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
    for (int64_t start = 0; start < count; start += blocksize) {
        int64_t end = start + blocksize < count ? start + blocksize : count;
        table t = scaled(codebook, *absmax++);
        __m128i t0 = _mm_shuffle_epi8(narrow8(t.low, dtype), bytes_apart);
        __m128i t1 = _mm_shuffle_epi8(narrow8(t.high, dtype), bytes_apart);
        __m256i low = _mm256_broadcastsi128_si256(_mm_unpacklo_epi64(t0, t1));
        __m256i high = _mm256_broadcastsi128_si256(_mm_unpackhi_epi64(t0, t1));
        int64_t i = start;
        for (; i + 32 <= end; i += 32)
            decode_halves(qweight + i / 2, low, high, w + i);
        if (i < end) {
            uint8_t bytes[16] = {0};
            uint16_t rest[32];
            memcpy(bytes, qweight + i / 2, (size_t)(end - i + 1) / 2);
            decode_halves(bytes, low, high, rest);
            memcpy(w + i, rest, (size_t)(end - i) * sizeof *w);
        }
    }
}

static void dequantize_q4_avx2(const uint8_t *qweight, const float *absmax, const float *codebook,
                               int64_t count, int64_t blocksize, bnbq_dtype dtype, void *w) {
    assert(count >= 1 && bnbq_valid_blocksize(blocksize));
    if (dtype != BNBQ_F32) {
        dequantize_halves(qweight, absmax, codebook, count, blocksize, dtype, w);
        return;
    }
    for (int64_t i = 0; i < count; i += blocksize) {
        int64_t left = count - i < blocksize ? count - i : blocksize;
        decode(qweight + i / 2, left, scaled(codebook, *absmax++), (float *)w + i);
    }
}

#endif
