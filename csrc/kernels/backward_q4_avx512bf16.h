/* backward_q4_avx512bf16.h - the backward product of the 4-bit family on AVX-512 BF16.
 *
 * The codebook is scaled by the absmax of two rows of W and rounded to bf16: a table of 32 words
 * for vpermw. The fifth bit of an index, which is the row, depends on the lane alone. For the other
 * four, each lane takes a word of four codes and shifts its own one down.
 */
#ifndef BNBQ_BACKWARD_Q4_AVX512BF16_H
#define BNBQ_BACKWARD_Q4_AVX512BF16_H

#include "backward_avx512bf16.h"

#include <assert.h>

typedef struct q4_pairs {
    const uint8_t *q;    /* of the product's first column */
    const float *absmax; /* of W */
    int64_t rows, row_bytes, blocks, k0;
    int shift;
    __m512 codebook;
    __m512i words[4], shifts; /* of each lane of each vector */
} q4_pairs;

static inline q4_pairs q4_pairs_of(const bnbq_q4_rows *w, int64_t n, int64_t k0) {
    const int64_t both = 0x10001; /* in both words of a dword */
    q4_pairs p = {
        .q = w->qweight + k0 / 2,
        .absmax = w->absmax,
        .rows = n,
        .row_bytes = w->k / 2,
        .blocks = w->k / w->blocksize,
        .k0 = k0,
        .shift = __builtin_ctzll((unsigned long long)w->blocksize),
        .codebook = _mm512_loadu_ps(w->codebook),
        .shifts = _mm512_set4_epi32(8 * both, 12 * both, 0, 4 * both),
    };
    for (int v = 0; v < 4; v++) {
        __m512i word = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
        word = _mm512_add_epi32(word, _mm512_set1_epi32(4 * v));
        p.words[v] = _mm512_add_epi32(_mm512_mullo_epi32(word, _mm512_set1_epi32(both)),
                                      _mm512_set1_epi32(16 << 16));
    }
    return p;
}

BNBQ_INLINE __m512i pair_table(__m512 codebook, float absmax0, float absmax1) {
    return (__m512i)_mm512_cvtne2ps_pbh(_mm512_mul_ps(codebook, _mm512_set1_ps(absmax1)),
                                        _mm512_mul_ps(codebook, _mm512_set1_ps(absmax0)));
}

BNBQ_INLINE void decode_q4_pair(const void *of, int64_t row, int64_t col, int64_t left,
                                __m512i pair[4]) {
    const q4_pairs *w = of;
    const uint8_t *q0 = w->q + row * w->row_bytes + col / 2, *q1 = q0 + w->row_bytes;
    const float *absmax0 = w->absmax + row * w->blocks + ((w->k0 + col) >> w->shift);
    const float *absmax1 = absmax0 + w->blocks;
    /* Rows lie in pages of their own, so nothing else would fetch them. */
    _mm_prefetch((const char *)(q0 + PAIRS_AHEAD * w->row_bytes), _MM_HINT_T0);
    _mm_prefetch((const char *)(q1 + PAIRS_AHEAD * w->row_bytes), _MM_HINT_T0);
    _mm_prefetch((const char *)(absmax0 + PAIRS_AHEAD * w->blocks), _MM_HINT_T0);
    _mm_prefetch((const char *)(absmax1 + PAIRS_AHEAD * w->blocks), _MM_HINT_T0);
    const bool alone = row + 1 == w->rows;
    if (alone)
        q1 = q0;
    __m512i codes, table[2];
    if (left > 32)
        codes = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256((const void *)q0)),
                                   _mm256_loadu_si256((const void *)q1), 1);
    else
        codes = _mm512_inserti32x4(_mm512_castsi128_si512(_mm_loadu_si128((const void *)q0)),
                                   _mm_loadu_si128((const void *)q1), 2);
    table[0] = table[1] = pair_table(w->codebook, absmax0[0], alone ? 0.0f : absmax1[0]);
    if (w->shift == 5 && left > 32)
        table[1] = pair_table(w->codebook, absmax0[1], alone ? 0.0f : absmax1[1]);
#pragma GCC unroll 4
    for (int v = 0; v < 4; v++) {
        __m512i index = _mm512_srlv_epi16(_mm512_permutexvar_epi16(w->words[v], codes), w->shifts);
        /* (index & 15) | row << 4 */
        index = _mm512_ternarylogic_epi32(index, _mm512_set1_epi16(15), _mm512_set1_epi32(16 << 16),
                                          0xea);
        pair[v] = _mm512_permutexvar_epi16(index, table[v / 2]);
    }
}

static void backward_bf16_q4(const uint16_t *gy, int64_t ldg, int64_t m, const bnbq_q4_rows *w,
                             int64_t n, int64_t k0, int64_t cols, float *gx, int64_t ldgx,
                             void *scratch) {
    assert(m >= 1 && m <= BNBQ_TILE_M && cols >= 1 && cols <= BNBQ_TILE_K);
    assert(w->blocksize == 32 ? (k0 | cols) % 32 == 0 : (k0 | cols) % 64 == 0);
    const q4_pairs pairs = q4_pairs_of(w, n, k0);
    backward_pairs(decode_q4_pair, &pairs, n, gy, ldg, m, cols, gx, ldgx, scratch);
}

#endif
