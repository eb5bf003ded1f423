/* q4_avx512.c - the 4-bit family on AVX-512 F, BW, DQ, VL: Skylake-X and later, Zen 4 and later.
 *
 * Exact fp32: a weight is codebook[code] * absmax rounded once, as dequantize gives it. Sixteen
 * fp32 values are one register, so the codebook is multiplied by the absmax of a block once and a
 * permute (vpermps, which ignores all but four bits of each index) looks sixteen codes up.
 *
 * Forward: 32 packed bytes become 16 dwords of four codes (vpmovzxwd), and shifts by 0, 4, 8, 12
 * give four index vectors without a mask. That is columns 4i + {1, 0, 3, 2} of 64, an order in
 * which x is packed once; the weight is never rearranged. Up to GEMV_ROWS rows of x use each
 * decoded vector at once; for more, chunks of W are decoded to L1 (blocking.h).
 *
 * Sources: the word trick and the order of prefetches are from measured bare loops (4096 x 4096,
 * one thread of a Sapphire Rapids: m = 1 0.62 ms where memory allows 0.45; weights in bf16 or
 * vdpbf16ps gained nothing).
 * History, 4096 x 4096 nf4, one thread of a busy Zen 4 at 3.65 GHz (one FMA of 512 bits per cycle),
 * weights from DRAM: m = 1 0.67 ms, 4 1.5, 16 5.8, 64 20, 256 83 (the FMA unit allows 73).
 * Multiplications instead of shifts (vpmulhuw) were slower there; four rows of W at a time beat
 * four pieces of one row, by a third where x[k] exceeds L1.
 */
#include "../kernels.h"
#include "backward_avx512.h"
#include "blocking.h"
#include "codes_avx512.h"
#include "lanes_avx512.h"

#include <assert.h>
#include <string.h>

#if !defined(__AVX512F__) || !defined(__AVX512BW__) || !defined(__AVX512DQ__) ||                   \
    !defined(__AVX512VL__) || !defined(__FMA__)
#error "compile with -mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl"
#endif

enum {
    GROUP = 64,                          /* columns decoded together */
    CHUNK = PIECE_BYTES / sizeof(float), /* columns per partial sum */
    GEMV_ROWS = 4,                       /* rows of x that decode W directly, at most */
};

/* ---------------------------------------------------------------- forward */

static size_t packed_bytes_q4_avx512(int64_t m, int64_t k) {
    return blocked_bytes(m, k, CHUNK);
}

static size_t scratch_bytes_q4_avx512(int64_t m, int64_t k) {
    (void)k;
    return blocked_scratch_bytes(m);
}

/* Vector j of a group of 64 columns holds columns 4i + {1, 0, 3, 2}[j]. A last group of 32 columns
 * is filled up with zeros. */
static void pack_q4_avx512(const float *x, int64_t i, int64_t m, int64_t k, void *packed) {
    assert(i >= 0 && i < m && m <= BNBQ_TILE_M && k % 32 == 0);
    const __m512i every4 =
        _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
    static const int first[4] = {1, 0, 3, 2};
    for (int64_t c = 0; c < k; c += GROUP) {
        float *out = (float *)packed + (c / CHUNK * m + i) * CHUNK + c % CHUNK;
        __mmask16 rest = k - c >= GROUP ? 0xffff : 0;
        __m512 a = _mm512_loadu_ps(x + c), b = _mm512_loadu_ps(x + c + 16);
        __m512 d = _mm512_maskz_loadu_ps(rest, x + c + 32);
        __m512 e = _mm512_maskz_loadu_ps(rest, x + c + 48);
        for (int j = 0; j < 4; j++) {
            __m512i index = _mm512_add_epi32(every4, _mm512_set1_epi32(first[j]));
            __m512 low = _mm512_permutex2var_ps(a, index, b);
            __m512 high = _mm512_permutex2var_ps(d, index, e);
            _mm512_storeu_ps(out + 16 * j, _mm512_shuffle_f32x4(low, high, 0x44));
        }
    }
}

/* Scales of a group of 64 columns. Blocks of 32 have two, one for each half of a vector (and the
 * second one may be past the end of the row). */
BNBQ_INLINE __m512 scale_of(const float *absmax, int64_t col, int shift, const bool narrow,
                            int64_t left) {
    if (!narrow)
        return _mm512_set1_ps(absmax[col >> shift]);
    const float *a = absmax + col / 32;
    __m512 high = _mm512_set1_ps(left > 32 ? a[1] : 0.0f);
    return _mm512_mask_mov_ps(_mm512_set1_ps(a[0]), 0xff00, high);
}

BNBQ_INLINE __m512i codes_of(const uint8_t *q, const bool narrow, int64_t left) {
    if (narrow && left <= 32)
        return _mm512_cvtepu16_epi32(_mm256_zextsi128_si256(_mm_loadu_si128((const __m128i *)q)));
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)q));
}

/* Vector j of a group; `table` is the codebook, scaled already unless blocks are narrow. */
BNBQ_INLINE __m512 decode16(__m512i codes, int j, __m512 table, __m512 scale, const bool narrow) {
    __m512 w = _mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4 * j), table);
    return narrow ? _mm512_mul_ps(w, scale) : w;
}

/* sum[r][i] = row + r of W . row i of x, over cols columns (<= CHUNK) from column col. Each is one
 * chain of FMAs, so several rows of W are needed to hide their latency. */
BNBQ_INLINE void dots(const int ws, const int xs, const bool narrow, const bnbq_q4_rows *w,
                      int64_t row, int64_t col, int64_t cols, const float *x, int64_t ahead,
                      __m512 sum[4][GEMV_ROWS]) {
    const int64_t row_bytes = w->k / 2, blocks = w->k / w->blocksize;
    const uint8_t *q = w->qweight + row * row_bytes + col / 2;
    const float *absmax = w->absmax + row * blocks;
    const __m512 codebook = _mm512_loadu_ps(w->codebook);
    const int shift = log2_of(w->blocksize);
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++)
#pragma GCC unroll 4
        for (int i = 0; i < xs; i++)
            sum[r][i] = _mm512_setzero_ps();
    for (int64_t c = 0; c < cols; c += GROUP) {
        __m512 table[4], scale[4];
        __m512i codes[4];
        for (int b = 0; b < ws * GROUP / 2; b += 64)
            prefetch_rows(q + c / 2 * ws + b, ahead);
#pragma GCC unroll 4
        for (int r = 0; r < ws; r++) {
            scale[r] = scale_of(absmax + r * blocks, col + c, shift, narrow, cols - c);
            table[r] = narrow ? codebook : _mm512_mul_ps(codebook, scale[r]);
            codes[r] = codes_of(q + r * row_bytes + c / 2, narrow, cols - c);
        }
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
#pragma GCC unroll 4
            for (int r = 0; r < ws; r++) {
                __m512 v = decode16(codes[r], j, table[r], scale[r], narrow);
#pragma GCC unroll 4
                for (int i = 0; i < xs; i++) {
                    __m512 xv = _mm512_load_ps(x + i * CHUNK + c + 16 * j);
                    sum[r][i] = _mm512_fmadd_ps(v, xv, sum[r][i]);
                }
            }
        }
    }
}

BNBQ_INLINE void gemv(const int xs, const bool narrow, const float *x, const bnbq_q4_rows *w,
                      int64_t rows, float *y, int64_t ldy) {
    __m512 sum[4][GEMV_ROWS];
    for (int64_t n = 0, ws; n < rows; n += ws) {
        ws = rows - n < 4 ? 1 : 4;
        for (int64_t col = 0; col < w->k; col += CHUNK) {
            int64_t cols = w->k - col < CHUNK ? w->k - col : CHUNK;
            /* Prefetch the next rows, in the order in which they lie. */
            int64_t ahead = (ws * w->k + (ws - 1) * col) / 2;
            if (ws == 4)
                dots(4, xs, narrow, w, n, col, cols, x + col * xs, ahead, sum);
            else
                dots(1, xs, narrow, w, n, col, cols, x + col * xs, ahead, sum);
#pragma GCC unroll 4
            for (int i = 0; i < xs; i++)
                put4(y + i * ldy + n, sum4(sum[0][i], sum[1][i], sum[2][i], sum[3][i]), ws,
                     col == 0);
        }
    }
}

BNBQ_INLINE void decode_rows(const bool narrow, const bnbq_q4_rows *w, int64_t row, int64_t ws,
                             int64_t col, int64_t cols, float *dst) {
    const __m512 codebook = _mm512_loadu_ps(w->codebook);
    const int shift = log2_of(w->blocksize);
    for (int64_t r = 0; r < ws; r++) {
        const uint8_t *q = w->qweight + (row + r) * (w->k / 2) + col / 2;
        const float *absmax = w->absmax + (row + r) * (w->k / w->blocksize);
        float *out = dst + r * CHUNK;
        for (int64_t c = 0; c < cols; c += GROUP) {
            _mm_prefetch((const char *)q + c / 2 + W_GROUP * (w->k / 2), _MM_HINT_T0);
            __m512 scale = scale_of(absmax, col + c, shift, narrow, cols - c);
            __m512 table = narrow ? codebook : _mm512_mul_ps(codebook, scale);
            __m512i codes = codes_of(q + c / 2, narrow, cols - c);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++)
                _mm512_storeu_ps(out + c + 16 * j, decode16(codes, j, table, scale, narrow));
        }
    }
    for (int64_t r = ws; r < W_GROUP; r++)
        memset(dst + r * CHUNK, 0, PIECE_BYTES);
}

static void prepare(const void *weight, int64_t row, int64_t ws, int64_t col, int64_t cols,
                    uint8_t *dst) {
    const bnbq_q4_rows *w = weight;
    if (w->blocksize == 32)
        decode_rows(true, w, row, ws, col, cols, (float *)dst);
    else
        decode_rows(false, w, row, ws, col, cols, (float *)dst);
}

/* Four rows of W times up to six of x: 24 accumulators. */
BNBQ_INLINE void multiply(const int xs, const float *x, const float *w, int64_t cols, int64_t ws,
                          bool first, float *y, int64_t ldy) {
    __m512 sum[6][4];
#pragma GCC unroll 6
    for (int i = 0; i < xs; i++)
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++)
            sum[i][r] = _mm512_setzero_ps();
    for (int64_t c = 0; c < cols; c += 16) {
        __m512 v[4];
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++)
            v[r] = _mm512_load_ps(w + r * CHUNK + c);
#pragma GCC unroll 6
        for (int i = 0; i < xs; i++) {
            __m512 xv = _mm512_load_ps(x + i * CHUNK + c);
#pragma GCC unroll 4
            for (int r = 0; r < 4; r++)
                sum[i][r] = _mm512_fmadd_ps(v[r], xv, sum[i][r]);
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < xs; i++)
        put4(y + i * ldy, sum4(sum[i][0], sum[i][1], sum[i][2], sum[i][3]), ws, first);
}

static void multiply_any(int64_t xs, const uint8_t *x_piece, const uint8_t *w_piece, int64_t cols,
                         int64_t ws, int first, void *y, int64_t ldy) {
    const float *x = (const float *)x_piece, *w = (const float *)w_piece;
    cols = (cols + GROUP - 1) / GROUP * GROUP;
    switch (xs) {
    case 1: multiply(1, x, w, cols, ws, first, y, ldy); break;
    case 2: multiply(2, x, w, cols, ws, first, y, ldy); break;
    case 3: multiply(3, x, w, cols, ws, first, y, ldy); break;
    case 4: multiply(4, x, w, cols, ws, first, y, ldy); break;
    case 5: multiply(5, x, w, cols, ws, first, y, ldy); break;
    default: multiply(6, x, w, cols, ws, first, y, ldy); break;
    }
}

/* A function of its own for each m and width of block, chosen here. */
static void gemv_any(const float *x, int64_t m, const bnbq_q4_rows *w, int64_t rows, float *y,
                     int64_t ldy) {
    switch (m + (w->blocksize == 32 ? GEMV_ROWS : 0)) {
    case 1: gemv(1, false, x, w, rows, y, ldy); break;
    case 2: gemv(2, false, x, w, rows, y, ldy); break;
    case 3: gemv(3, false, x, w, rows, y, ldy); break;
    case 4: gemv(4, false, x, w, rows, y, ldy); break;
    case 5: gemv(1, true, x, w, rows, y, ldy); break;
    case 6: gemv(2, true, x, w, rows, y, ldy); break;
    case 7: gemv(3, true, x, w, rows, y, ldy); break;
    case 8: gemv(4, true, x, w, rows, y, ldy); break;
    }
}

static void linear_q4_avx512(const void *packed, int64_t m, const bnbq_q4_rows *w, int64_t rows,
                             float *y, int64_t ldy, void *scratch) {
    assert(m >= 1 && m <= BNBQ_TILE_M && rows >= 1 && rows <= BNBQ_TILE_N);
    assert(w->k % 32 == 0 && w->k % w->blocksize == 0 && ldy >= rows);
    if (m <= GEMV_ROWS) {
        gemv_any(packed, m, w, rows, y, ldy);
        return;
    }
    const blocked_product product = {
        .packed = packed,
        .m = m,
        .rows = rows,
        .k = w->k,
        .ldy = ldy,
        .chunk = CHUNK,
        .x_group = 6,
        .w = w,
        .prepare = prepare,
        .multiply = multiply_any,
    };
    run_blocked(product, y, scratch);
}

/* ---------------------------------------------------------------- backward */

static void decode_panel(const void *of, int64_t row, int64_t rows, int64_t col, int64_t cols,
                         float *panel) {
    const bnbq_q4_rows *w = ((const backward_q4 *)of)->w;
    const int64_t k0 = ((const backward_q4 *)of)->k0 + col, blocks = w->k / w->blocksize;
    const __m512 codebook = _mm512_loadu_ps(w->codebook);
    const int shift = log2_of(w->blocksize);
    for (int64_t r = row; r < row + rows; r++, panel += BACKWARD_PANEL) {
        const uint8_t *q = w->qweight + (r * w->k + k0) / 2;
        const float *absmax = w->absmax + r * blocks;
        _mm_prefetch((const char *)(q + BACKWARD_AHEAD * w->k / 2), _MM_HINT_T0);
        _mm_prefetch((const char *)(absmax + BACKWARD_AHEAD * blocks + (k0 >> shift)), _MM_HINT_T0);
        for (int64_t c = 0; c < cols; c += 32) {
            __m512 table = _mm512_mul_ps(codebook, _mm512_set1_ps(absmax[(k0 + c) >> shift]));
            if (cols - c >= 32)
                decode32(q + c / 2, table, panel + c);
            else
                decode_short(q + c / 2, cols - c, table, panel + c);
        }
    }
}

static void backward_q4_avx512(const float *gy, int64_t ldg, int64_t m, const bnbq_q4_rows *w,
                               int64_t n, int64_t k0, int64_t cols, float *gx, int64_t ldgx,
                               void *scratch) {
    assert(m >= 1 && m <= BNBQ_TILE_M && k0 % 32 == 0 && cols >= 1 && cols <= BNBQ_TILE_K);
    const backward_q4 of = {w, k0};
    run_backward(backward_fp32, decode_panel, &of, gy, ldg, m, n, cols, gx, ldgx, scratch);
}

const bnbq_q4_kernels bnbq_q4_avx512 = {
    .isa = "avx512",
    .level = BNBQ_ISA_AVX512,
    .needs = BNBQ_CPU_OF_THIS_FILE,
    .quantize = quantize_q4,
    .dequantize = dequantize_q4_avx512,
    .linear = {packed_bytes_q4_avx512, pack_q4_avx512, scratch_bytes_q4_avx512, linear_q4_avx512},
    .backward = backward_q4_avx512,
};
