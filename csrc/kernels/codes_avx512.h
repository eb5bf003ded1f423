/* codes_avx512.h - quantise and dequantise of the 4-bit family on AVX-512.
 *
 * Encoding looks up which threshold a value could be next to (cells, below) and compares once;
 * decoding to 16 bits rounds the sixteen values of a block and looks words up.
 *
 * History, 14336 x 4096 bf16 <-> nf4, one thread of a Zen 4 at 3.65 GHz, weights in DRAM: quantise
 * 12.2 ms, dequantise 6.3. Binary search of the thresholds (Knuth 6.2.1) with permutes as loads
 * took 11.9 ns for 64 weights in L1 where this takes 6.8, two compares in one of 16 cells 9.0;
 * widening, checking and quantising in three passes 34 ms; decoding to fp32 and rounding that 14.5
 * ms.
 */
#ifndef BNBQ_CODES_AVX512_H
#define BNBQ_CODES_AVX512_H

#include "blocking.h"

#define QUANTIZE_UNIT 64
#include "quantize_q4.h"

#include <assert.h>
#include <immintrin.h>
#include <math.h>
#include <string.h>

enum { BATCH = 4096 }; /* columns quantised together: the largest block */

/* Sixteen values as fp32; `dtype` is a constant of the caller. */
BNBQ_INLINE __m512 load16(const void *w, const bnbq_dtype dtype, int64_t i) {
    if (dtype == BNBQ_F32)
        return _mm512_loadu_ps((const float *)w + i);
    __m256i halves = _mm256_loadu_si256((const __m256i *)((const uint16_t *)w + i));
    if (dtype == BNBQ_F16)
        return _mm512_cvtph_ps(halves);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

/* [-1, 1] in 32 cells ((c - 1) / CELLS, c / CELLS], -15 <= c <= 16, of which none has more than one
 * threshold inside: a look-up and one comparison replace a search. */
#define CELLS 15.5f

typedef struct cells {
    __m512 threshold[2]; /* of cell c, at index c modulo 32; +Inf for none */
    __m512i below[2];    /* how many are below the cell */
} cells;

static cells make_cells(const float *thresholds) {
    float inside[32];
    int32_t below[32];
    for (int c = -15; c <= 16; c++) {
        inside[c & 31] = INFINITY;
        below[c & 31] = 0;
        for (int t = 0; t < 15; t++) {
            double at = (double)thresholds[t] * CELLS; /* exact */
            assert(!(c - 1 < at && at < c) || inside[c & 31] == INFINITY);
            if (at <= c - 1)
                below[c & 31]++;
            else if (at < c) /* one at the upper edge is below nothing in the cell */
                inside[c & 31] = thresholds[t];
        }
    }
    return (cells){{_mm512_loadu_ps(inside), _mm512_loadu_ps(inside + 16)},
                   {_mm512_loadu_si512(below), _mm512_loadu_si512(below + 16)}};
}

/* How many thresholds are below x, |x| <= 1 (or an ulp more, which changes nothing). Rounded up,
 * the sum ends in the cell's number; the permutes ignore what is above its five bits. */
BNBQ_INLINE __m512i count16(__m512 x, const cells *s) {
    __m512 sum = _mm512_fmadd_round_ps(x, _mm512_set1_ps(CELLS), _mm512_set1_ps(0x1.8p23f),
                                       _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC);
    __m512i cell = _mm512_castps_si512(sum);
    __m512 threshold = _mm512_permutex2var_ps(s->threshold[0], cell, s->threshold[1]);
    __m512i below = _mm512_permutex2var_epi32(s->below[0], cell, s->below[1]);
    __mmask16 above = _mm512_cmp_ps_mask(threshold, x, _CMP_LT_OQ);
    return _mm512_mask_add_epi32(below, above, below, _mm512_set1_epi32(1));
}

/* absmax of each block, as an integer, of which NaN and Inf are the greatest. */
BNBQ_INLINE void absmax_of(const void *w, const bnbq_dtype dtype, int64_t start, int64_t blocks,
                           int64_t blocksize, float *absmax) {
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    for (int64_t b = 0, i = start; b < blocks; b++) {
        __m512i max0 = _mm512_setzero_si512(), max1 = max0;
        for (int64_t end = i + blocksize; i < end; i += 32) {
            __m512i w0 = _mm512_castps_si512(load16(w, dtype, i));
            __m512i w1 = _mm512_castps_si512(load16(w, dtype, i + 16));
            max0 = _mm512_max_epu32(max0, _mm512_and_si512(w0, magnitude));
            max1 = _mm512_max_epu32(max1, _mm512_and_si512(w1, magnitude));
        }
        uint32_t bits = _mm512_reduce_max_epu32(_mm512_max_epu32(max0, max1));
        memcpy(absmax + b, &bits, sizeof bits);
    }
}

/* Elements [i, i + 64), multiplied by one scale for each half. */
BNBQ_INLINE void encode64(const void *w, const bnbq_dtype dtype, int64_t i, const float scale[2],
                          const cells *s, __m512i order, uint8_t *q) {
    __m512 scale0 = _mm512_set1_ps(scale[0]), scale1 = _mm512_set1_ps(scale[1]);
    __m512i a = count16(_mm512_mul_ps(load16(w, dtype, i), scale0), s);
    __m512i b = count16(_mm512_mul_ps(load16(w, dtype, i + 16), scale0), s);
    __m512i c = count16(_mm512_mul_ps(load16(w, dtype, i + 32), scale1), s);
    __m512i d = count16(_mm512_mul_ps(load16(w, dtype, i + 48), scale1), s);
    /* To bytes, to codes, pairs of codes to bytes (high nibble first). Packing goes by 128-bit
     * lanes: each holds four codes of a, b, c and d. */
    __m512i bytes = _mm512_packus_epi16(_mm512_packus_epi32(a, b), _mm512_packus_epi32(c, d));
    bytes = _mm512_shuffle_epi8(order, bytes);
    __m512i pairs = _mm512_maddubs_epi16(bytes, _mm512_set1_epi16(1 << 8 | 16));
    const __m256i lanes = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
    const __m256i halves = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
    __m256i codes = _mm256_permutevar8x32_epi32(_mm512_cvtepi16_epi8(pairs), lanes);
    _mm256_storeu_si256((__m256i *)q, _mm256_shuffle_epi8(codes, halves));
}

BNBQ_INLINE void quantize_blocks(const void *w, const bnbq_dtype dtype, int64_t count,
                                 const bnbq_format *format, int64_t blocksize, uint8_t *qweight,
                                 float *absmax) {
    const cells s = make_cells(format->thresholds);
    const __m512i order = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)format->order));
    const int64_t size = (int64_t)bnbq_dtype_size(dtype);
    const int shift = log2_of(blocksize);
    /* In batches that stay in L1, so that no encoding waits for its own block's absmax; meanwhile
     * the next batch comes from memory. */
    float inverse[BATCH / 32];
    for (int64_t start = 0; start < count; start += BATCH) {
        int64_t end = count - start < BATCH ? count : start + BATCH;
        int64_t blocks = (end - start) / blocksize;
        float *scales = absmax + start / blocksize;
        absmax_of(w, dtype, start, blocks, blocksize, scales);
        for (int64_t b = 0; b < blocks; b++)
            inverse[b] = 1.0f / (scales[b] > tiny ? scales[b] : tiny);
        for (int64_t i = start; i < end; i += 64) {
            for (int64_t line = 0; line < 64 * size; line += 64)
                _mm_prefetch((const char *)w + (i + BATCH) * size + line, _MM_HINT_T0);
            const float scale[2] = {inverse[(i - start) >> shift],
                                    inverse[(i - start + 32) >> shift]};
            encode64(w, dtype, i, scale, &s, order, qweight + i / 2);
        }
    }
}

/* 16 packed bytes as 32 values in their natural order: each half of a register gets four bytes and
 * shifts its own code down. */
BNBQ_INLINE void decode32(const uint8_t *q, __m512 table, float *w) {
    const __m512i shifts =
        _mm512_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24, 4, 0, 12, 8, 20, 16, 28, 24);
    for (int h = 0; h < 2; h++) {
        int32_t low, high;
        memcpy(&low, q + 8 * h, 4);
        memcpy(&high, q + 8 * h + 4, 4);
        __m512i codes = _mm512_mask_set1_epi32(_mm512_set1_epi32(low), 0xff00, high);
        __m512 values = _mm512_permutexvar_ps(_mm512_srlv_epi32(codes, shifts), table);
        _mm512_storeu_ps(w + 16 * h, values);
    }
}

/* The same for fewer than 32 values. */
static void decode_short(const uint8_t *q, int64_t count, __m512 table, float *w) {
    uint8_t bytes[16] = {0};
    float values[32];
    memcpy(bytes, q, (size_t)(count + 1) / 2);
    decode32(bytes, table, values);
    memcpy(w, values, (size_t)count * sizeof *w);
}

static void dequantize_f32(const uint8_t *qweight, const float *absmax, const float *codebook,
                           int64_t count, int64_t blocksize, float *w) {
    __m512 values = _mm512_loadu_ps(codebook);
    for (int64_t start = 0; start < count; start += blocksize) {
        int64_t end = start + blocksize < count ? start + blocksize : count, i = start;
        __m512 table = _mm512_mul_ps(values, _mm512_set1_ps(*absmax++));
        for (; i + 32 <= end; i += 32)
            decode32(qweight + i / 2, table, w + i);
        if (i < end)
            decode_short(qweight + i / 2, end - i, table, w + i);
    }
}

/* Sixteen values rounded to a 16-bit dtype, twice over: vpermw uses five bits of an index, of which
 * four are the code. */
BNBQ_INLINE __m512i table_of(__m512 values, bnbq_dtype dtype) {
    if (dtype == BNBQ_F16)
        return _mm512_broadcast_i64x4(_mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT));
    __m512i bits = _mm512_castps_si512(values); /* bf16, as in float16.h */
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i up = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
    __mmask16 nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
    __m512i rounded = _mm512_add_epi32(bits, up);
    rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
    return _mm512_broadcast_i64x4(_mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}

/* Each value is one of sixteen in a block: these are rounded, and then looked up 32 at a time. */
static void dequantize_halves(const uint8_t *qweight, const float *absmax, const float *codebook,
                              int64_t count, int64_t blocksize, bnbq_dtype dtype, uint16_t *w) {
    const __m512 values = _mm512_loadu_ps(codebook);
    const __m512i first = _mm512_setr_epi32(
        0x200000, 0x210001, 0x220002, 0x230003, 0x240004, 0x250005, 0x260006, 0x270007, 0x280008,
        0x290009, 0x2a000a, 0x2b000b, 0x2c000c, 0x2d000d, 0x2e000e, 0x2f000f);
    const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
    for (int64_t start = 0; start < count; start += blocksize) {
        int64_t end = start + blocksize < count ? start + blocksize : count;
        __m512i table = table_of(_mm512_mul_ps(values, _mm512_set1_ps(*absmax++)), dtype);
        for (int64_t i = start; i < end; i += 64) {
            int64_t left = end - i < 64 ? end - i : 64;
            __mmask32 bytes = (__mmask32)((1ull << (left + 1) / 2) - 1);
            __m512i codes = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(bytes, qweight + i / 2));
            __m512i high = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4), table);
            __m512i low = _mm512_permutexvar_epi16(codes, table);
            __m512i w0 = _mm512_permutex2var_epi16(high, first, low);
            __m512i w1 = _mm512_permutex2var_epi16(high, second, low);
            if (left == 64) {
                _mm512_storeu_si512(w + i, w0);
                _mm512_storeu_si512(w + i + 32, w1);
            } else {
                uint64_t valid = (1ull << left) - 1;
                _mm512_mask_storeu_epi16(w + i, (__mmask32)valid, w0);
                _mm512_mask_storeu_epi16(w + i + 32, (__mmask32)(valid >> 32), w1);
            }
        }
    }
}

static void dequantize_q4_avx512(const uint8_t *qweight, const float *absmax, const float *codebook,
                                 int64_t count, int64_t blocksize, bnbq_dtype dtype, void *w) {
    assert(count >= 1 && bnbq_valid_blocksize(blocksize));
    if (dtype == BNBQ_F32)
        dequantize_f32(qweight, absmax, codebook, count, blocksize, w);
    else
        dequantize_halves(qweight, absmax, codebook, count, blocksize, dtype, w);
}

#endif
