/* w4a8_avx2.c - int8 activations times 4-bit weights on AVX2.
 *
 * vpmaddubsw multiplies unsigned by signed bytes and adds pairs with saturation: |w| times x with
 * the sign of w, at most 2 * 128 * 127 = 32512. Lanes run along a row of W; 32 columns are 16
 * packed bytes, of which the low nibbles (odd columns) go to one half of a register and the high
 * ones to the other. Four rows of W are decoded and serve all rows of x.
 */
#include "blocking.h"
#include "w4a8.h"

#include <assert.h>
#include <immintrin.h>
#include <string.h>

#if !defined(__AVX2__) || !defined(__FMA__) || !defined(__F16C__)
#error "compile with the flags of s8_avx2.c"
#endif

enum { UNIT = 32 }; /* columns of one register */

/* In the order of decoded codes. */
BNBQ_INLINE void pack(const int block, const float *x, int64_t i, int64_t m, int64_t k,
                      void *packed) {
    const __m256i odd_first = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(1, 3, 5, 7, 9, 11, 13, 15, 0, 2, 4, 6, 8, 10, 12, 14));
    int8_t *q = (int8_t *)packed + i * k;
    float *steps = steps_of(packed, m, k) + i * (k / block);
    assert(i >= 0 && i < m && m <= BNBQ_TILE_M && k % block == 0);
    for (int64_t c = 0; c < k; c += block)
        steps[c / block] = quantize_block(&bnbq_s8_avx2, x + c, block, q + c);
    for (int64_t c = 0; c < k; c += UNIT) {
        __m256i v = _mm256_shuffle_epi8(_mm256_loadu_si256((const __m256i *)(q + c)), odd_first);
        _mm256_storeu_si256((__m256i *)(q + c), _mm256_permute4x64_epi64(v, 0xd8));
    }
}

/* Up to W_GROUP rows of W; those past them are zero. */
typedef struct decoded_rows {
    int8_t *codes; /* [k / UNIT][W_GROUP][UNIT] */
    float *scales; /* [k / blocksize][W_GROUP] */
} decoded_rows;

static size_t scratch_bytes(int64_t m, int64_t k) {
    (void)m;
    return (size_t)(k * W_GROUP) + (size_t)(k / 32 * W_GROUP) * sizeof(float);
}

static decoded_rows decode(const bnbq_q4_rows *w, int64_t row, int64_t ws, void *scratch) {
    const decoded_rows d = {scratch, (float *)((char *)scratch + w->k * W_GROUP)};
    const int64_t blocks = w->k / w->blocksize;
    int8_t codes[16];
    const float step = round_codebook(w->codebook, codes);
    const __m256i table = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)codes));
    for (int64_t r = 0; r < W_GROUP; r++) {
        const uint8_t *q = w->qweight + (row + r) * (w->k / 2);
        for (int64_t c = 0; c < w->k; c += UNIT) {
            __m256i v = _mm256_setzero_si256();
            if (r < ws) {
                __m128i low = _mm_loadu_si128((const __m128i *)(q + c / 2));
                v = _mm256_set_m128i(_mm_srli_epi16(low, 4), low);
                v = _mm256_shuffle_epi8(table, _mm256_and_si256(v, _mm256_set1_epi8(15)));
            }
            _mm256_store_si256((__m256i *)(d.codes + c * W_GROUP + r * UNIT), v);
        }
        for (int64_t b = 0; b < blocks; b++)
            d.scales[b * W_GROUP + r] = r < ws ? w->absmax[(row + r) * blocks + b] * step : 0.0f;
    }
    return d;
}

/* The sums over the lanes of four vectors. */
BNBQ_INLINE __m128i sum4(const __m256i s[W_GROUP]) {
    __m256i all = _mm256_hadd_epi32(_mm256_hadd_epi32(s[0], s[1]), _mm256_hadd_epi32(s[2], s[3]));
    return _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
}

/* y[xs, ws] for rows [i, i + xs) of x. */
BNBQ_INLINE void multiply(const int block, const int xs, const void *packed, int64_t i, int64_t m,
                          const bnbq_q4_rows *w, const decoded_rows *d, int64_t ws, float *y,
                          int64_t ldy) {
    const int64_t k = w->k;
    const int8_t *q = (const int8_t *)packed + i * k;
    const float *steps = steps_of(packed, m, k) + i * (k / block);
    const int shift = log2_of(w->blocksize);
    __m128 total[2] = {_mm_setzero_ps(), _mm_setzero_ps()};
    for (int64_t c = 0; c < k; c += block) {
        __m256i sum[2][W_GROUP];
        for (int j = 0; j < xs; j++)
            for (int r = 0; r < W_GROUP; r++)
                sum[j][r] = _mm256_setzero_si256();
        for (int64_t u = c; u < c + block; u += UNIT)
#pragma GCC unroll 4
            for (int r = 0; r < W_GROUP; r++) {
                __m256i v = _mm256_load_si256((const __m256i *)(d->codes + u * W_GROUP + r * UNIT));
                __m256i size = _mm256_abs_epi8(v);
#pragma GCC unroll 2
                for (int j = 0; j < xs; j++) {
                    __m256i xv = _mm256_loadu_si256((const __m256i *)(q + j * k + u));
                    __m256i pairs = _mm256_maddubs_epi16(size, _mm256_sign_epi8(xv, v));
                    pairs = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
                    sum[j][r] = _mm256_add_epi32(sum[j][r], pairs);
                }
            }
        const __m128 scales = _mm_load_ps(d->scales + (c >> shift) * W_GROUP);
#pragma GCC unroll 2
        for (int j = 0; j < xs; j++) {
            __m128 scale = _mm_mul_ps(_mm_set1_ps(steps[j * (k / block) + c / block]), scales);
            __m128 part = _mm_mul_ps(_mm_cvtepi32_ps(sum4(sum[j])), scale);
            total[j] = _mm_add_ps(total[j], part);
        }
    }
    for (int j = 0; j < xs; j++) {
        float out[W_GROUP];
        _mm_storeu_ps(out, total[j]);
        memcpy(y + j * ldy, out, (size_t)ws * sizeof *out);
    }
}

BNBQ_INLINE void run(const int block, const void *packed, int64_t m, const bnbq_q4_rows *w,
                     int64_t rows, float *y, int64_t ldy, void *scratch) {
    assert(m >= 1 && m <= BNBQ_TILE_M && rows >= 1 && rows <= BNBQ_TILE_N && ldy >= rows);
    assert(w->k % w->blocksize == 0 && w->blocksize % block == 0);
    for (int64_t n = 0; n < rows; n += W_GROUP) {
        const int64_t ws = rows - n < W_GROUP ? rows - n : W_GROUP;
        const decoded_rows d = decode(w, n, ws, scratch);
        int64_t i = 0;
        for (; i + 2 <= m; i += 2)
            multiply(block, 2, packed, i, m, w, &d, ws, y + i * ldy + n, ldy);
        if (i < m)
            multiply(block, 1, packed, i, m, w, &d, ws, y + i * ldy + n, ldy);
    }
}

W4A8_FORM(32, rows_bytes)
W4A8_FORM(64, rows_bytes)

const bnbq_w4a8_kernels bnbq_w4a8_avx2 = {
    .isa = "avx2",
    .level = BNBQ_ISA_AVX2,
    .needs = BNBQ_CPU_OF_THIS_FILE,
    .blocks32 = W4A8_FUNCTIONS(32),
    .blocks64 = W4A8_FUNCTIONS(64),
};
