/* q4_avx512bf16.c - the 4-bit family on AVX-512 with bf16 dot products: Zen 4 and later, Cooper
 * Lake, Sapphire Rapids and later. What needs no bf16 is that of q4_avx512.c.
 *
 * The codebook is rounded to bf16, scales are applied in fp32 to the sums over a block, or over the
 * columns of a block that are summed together: fewer instructions than scaling the codebook for
 * every block and rounding that, and a smaller error. vdpbf16ps takes denormals for zero.
 *
 * A register holds the codebook twice, as vpermw looks up five bits: all words of packed weight can
 * be indices as they lie, shifted by 0, 4, 8, 12, without a mask.
 *
 *   few   lanes run along a row of W. 64 bytes are 32 words of four codes; x is packed in the order
 *         in which the shifts find them. Sums over the lanes at the end of each chunk of columns.
 *   many  lanes are rows of W: 16 rows of 64 bytes are transposed as dwords, before they are
 *         decoded, which costs four shuffles per 128 weights. No sums over lanes, x is broadcast
 *         and keeps its order but for a permutation of each eight columns.
 *
 * History, 4096 x 4096 nf4, one thread of a busy Zen 4 (one vdpbf16ps of 512 bits per cycle: 36.8
 * ms at m = 256), weights from DRAM: m = 1 0.49 ms (what memory allows), 4 1.0, 8 1.75, 16 3.2, 64
 * 10.5, 256 40.3. Codebooks scaled before rounding took 0.53 at m = 1; for many rows, lanes along
 * W and sums at the end of 1024 columns 42 to 43 at m = 256, lanes along x (which waste up to 15)
 * 41.3, prefetches in one burst before decoding 4.5 at m = 16, and 6 x 4 sums with the scaled ones
 * in memory as long as 3 x 4 in registers. 4096 x 14336 at m = 1: 1.8 to 2.2, with the next rows in
 * L1, which they fill, 2.9 to 4.2.
 */
#include "backward_q4_avx512bf16.h"
#include "row_lanes_avx512.h"

#define LENDER_Q4 bnbq_q4_avx512
#include "borrow_q4.h"

#include <assert.h>
#include <immintrin.h>
#include <string.h>

#if !defined(__AVX512F__) || !defined(__AVX512BW__) || !defined(__AVX512BF16__)
#error "compile with the flags of q4_avx512.c and -mavx512bf16"
#endif

enum {
    FEW_CHUNK = 1024,
    FEW_ROWS = 6, /* rows of x that a decoded row of W is multiplied with at once, at most */
};

typedef __m512bh bf16x32;

/* Sixteen columns from bf16-valued x, of which there are `left`; zero past them. */
BNBQ_INLINE __m512 load16(const float *x, int64_t left) {
    return _mm512_maskz_loadu_ps(first16(left), x);
}

/* Exact for values of bf16. */
BNBQ_INLINE __m512i load_bf16(const float *x, int64_t left) {
    return (__m512i)_mm512_cvtne2ps_pbh(load16(x + 16, left - 16), load16(x, left));
}

BNBQ_INLINE __m512i make_table(const float *codebook) {
    __m512 values = _mm512_loadu_ps(codebook);
    return (__m512i)_mm512_cvtne2ps_pbh(values, values);
}

BNBQ_INLINE __m512i load_codes(const uint8_t *q, int64_t left) {
    if (left >= GROUP)
        return _mm512_loadu_si512(q);
    return _mm512_maskz_loadu_epi32((__mmask16)((1u << left / 8) - 1), q);
}

/* Codes {1, 0, 3, 2}[j] of each four. */
BNBQ_INLINE bf16x32 decode32(__m512i codes, int j, __m512i table) {
    return (bf16x32)_mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4 * j), table);
}

/* ---------------------------------------------------------------- few rows of x */

/* x as [chunk of columns][m][FEW_CHUNK], the last chunk filled up with zeros to whole groups. */
static size_t packed_bytes_few(int64_t m, int64_t k) {
    return (size_t)(groups_of(k) * GROUP * m) * sizeof(uint16_t);
}

static int64_t few_columns(int64_t k, int64_t col) {
    int64_t left = groups_of(k) * GROUP - col;
    return left < FEW_CHUNK ? left : FEW_CHUNK;
}

/* Vector j of a group of 128 columns holds columns 4i + {1, 0, 3, 2}[j]. */
static void pack_few(const float *x, int64_t i, int64_t m, int64_t k, void *packed) {
    assert(i >= 0 && i < m && m <= BNBQ_TILE_M && k % 32 == 0);
    static const int first[4] = {1, 0, 3, 2};
    __m512i every4 = _mm512_set_epi16(60, 56, 52, 48, 44, 40, 36, 32, 28, 24, 20, 16, 12, 8, 4, 0,
                                      60, 56, 52, 48, 44, 40, 36, 32, 28, 24, 20, 16, 12, 8, 4, 0);
    for (int64_t c = 0; c < k; c += GROUP) {
        const int64_t chunk = c / FEW_CHUNK * FEW_CHUNK;
        uint16_t *out = (uint16_t *)packed + chunk * m + few_columns(k, chunk) * i + c - chunk;
        __m512i v[4];
        for (int j = 0; j < 4; j++)
            v[j] = load_bf16(x + c + 32 * j, k - c - 32 * j);
        for (int j = 0; j < 4; j++) {
            __m512i index = _mm512_add_epi16(every4, _mm512_set1_epi16((short)first[j]));
            __m512i low = _mm512_permutex2var_epi16(v[0], index, v[1]);
            __m512i high = _mm512_permutex2var_epi16(v[2], index, v[3]);
            _mm512_storeu_si512(out + 32 * j, _mm512_shuffle_i64x2(low, high, 0x44));
        }
    }
}

static size_t scratch_bytes_few(int64_t m, int64_t k) {
    (void)m, (void)k;
    return 0;
}

/* The scale of each dword of a group: of 4, 8 or 16 dwords per block. */
typedef struct spread {
    int shift, per_group; /* blocks: log2 of the columns; of one group */
    __m512i lanes;
} spread;

BNBQ_INLINE spread make_spread(int64_t blocksize) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const int per_group = blocksize < GROUP ? (int)(GROUP / blocksize) : 1;
    return (spread){
        .shift = __builtin_ctzll((unsigned long long)blocksize),
        .per_group = per_group,
        .lanes = _mm512_srlv_epi32(lane, _mm512_set1_epi32(4 - __builtin_ctz((unsigned)per_group))),
    };
}

/* absmax: of the row; blocks: of the row. */
BNBQ_INLINE __m512 scales_of(const spread *s, const float *absmax, int64_t col, int64_t blocks) {
    const int64_t block = col >> s->shift, left = blocks - block;
    __mmask8 mask = (__mmask8)((1 << (left < s->per_group ? left : s->per_group)) - 1);
    __m512 values = _mm512_castps128_ps512(_mm_maskz_loadu_ps(mask, absmax + block));
    return _mm512_permutexvar_ps(s->lanes, values);
}

/* y[i, row .. row + ws) = or += over the columns of one chunk; x: [xs][cols] of it. */
BNBQ_INLINE void dots(const int ws, const int xs, const spread *s, const bnbq_q4_rows *w,
                      int64_t row, int64_t blocks, int64_t col, int64_t cols, const uint16_t *x,
                      int64_t ahead, float *y, int64_t ldy) {
    const int64_t row_bytes = w->k / 2;
    const uint8_t *q = w->qweight + row * row_bytes + col / 2;
    const float *absmax = w->absmax + row * blocks;
    const __m512i table = make_table(w->codebook);
    __m512 sum[FEW_ROWS][4];
#pragma GCC unroll 6
    for (int i = 0; i < xs; i++)
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++)
            sum[i][r] = _mm512_setzero_ps();
    for (int64_t c = 0; c < cols; c += GROUP) {
#pragma GCC unroll 4
        for (int r = 0; r < ws; r++) {
            prefetch_rows(q + c / 2 * ws + 64 * r, ahead);
            const __m512 scale = scales_of(s, absmax + r * blocks, col + c, blocks);
            const __m512i codes = load_codes(q + r * row_bytes + c / 2, w->k - col - c);
            bf16x32 v[4];
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++)
                v[j] = decode32(codes, j, table);
#pragma GCC unroll 6
            for (int i = 0; i < xs; i++) {
                __m512 part = _mm512_setzero_ps();
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++)
                    part = _mm512_dpbf16_ps(part, v[j],
                                            (bf16x32)_mm512_loadu_si512(x + i * cols + c + 32 * j));
                sum[i][r] = _mm512_fmadd_ps(part, scale, sum[i][r]);
            }
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < xs; i++)
        put4(y + i * ldy + row, sum4(sum[i][0], sum[i][1], sum[i][2], sum[i][3]), ws, col == 0);
}

BNBQ_INLINE void gemv(const int xs, const uint16_t *packed, int64_t i, int64_t m,
                      const bnbq_q4_rows *w, int64_t rows, float *y, int64_t ldy) {
    const spread s = make_spread(w->blocksize);
    const int64_t blocks = w->k >> s.shift;
    y += i * ldy;
    for (int64_t n = 0, ws; n < rows; n += ws) {
        ws = rows - n < 4 ? 1 : 4;
        for (int64_t col = 0; col < w->k; col += FEW_CHUNK) {
            const int64_t cols = few_columns(w->k, col);
            const uint16_t *x = packed + col * m + i * cols;
            /* Prefetch the next rows, in the order in which they lie. */
            const int64_t ahead = (ws * w->k + (ws - 1) * col) / 2;
            if (ws == 4)
                dots(4, xs, &s, w, n, blocks, col, cols, x, ahead, y, ldy);
            else
                dots(1, xs, &s, w, n, blocks, col, cols, x, ahead, y, ldy);
        }
    }
}

static void linear_few(const void *packed, int64_t m, const bnbq_q4_rows *w, int64_t rows, float *y,
                       int64_t ldy, void *scratch) {
    (void)scratch;
    assert(m >= 1 && m <= BNBQ_TILE_M && rows >= 1 && rows <= BNBQ_TILE_N);
    assert(w->k % 32 == 0 && w->k % w->blocksize == 0 && ldy >= rows);
    for (int64_t i = 0, xs; i < m; i += xs) {
        xs = rows_next(m - i, FEW_ROWS);
        switch (xs) {
        case 1: gemv(1, packed, i, m, w, rows, y, ldy); break;
        case 2: gemv(2, packed, i, m, w, rows, y, ldy); break;
        case 3: gemv(3, packed, i, m, w, rows, y, ldy); break;
        case 4: gemv(4, packed, i, m, w, rows, y, ldy); break;
        case 5: gemv(5, packed, i, m, w, rows, y, ldy); break;
        default: gemv(6, packed, i, m, w, rows, y, ldy); break;
        }
    }
}

/* ---------------------------------------------------------------- many rows of x */

/* x as [group][m][GROUP], the last group filled up with zeros. */
static size_t packed_bytes_many(int64_t m, int64_t k) {
    return (size_t)(groups_of(k) * m * GROUP) * sizeof(uint16_t);
}

/* In the order of decoded pairs: columns 8g + {1, 5, 0, 4, 3, 7, 2, 6}. */
static void pack_many(const float *x, int64_t i, int64_t m, int64_t k, void *packed) {
    assert(i >= 0 && i < m && m <= BNBQ_TILE_M && k % 32 == 0);
    const __m512i order =
        _mm512_broadcast_i32x4(_mm_setr_epi8(2, 3, 10, 11, 0, 1, 8, 9, 6, 7, 14, 15, 4, 5, 12, 13));
    for (int64_t c = 0; c < groups_of(k) * GROUP; c += 32) {
        uint16_t *out = (uint16_t *)packed + (c / GROUP * m + i) * GROUP + c % GROUP;
        _mm512_storeu_si512(out, _mm512_shuffle_epi8(load_bf16(x + c, k - c), order));
    }
}

/* Up to BNBQ_TILE_N rows of W: one group of columns, and all scales. */
typedef struct decoded_rows {
    _Alignas(64) uint32_t pairs[GROUP / 2 * BNBQ_TILE_N]; /* [GROUP / 2][vectors][LANES] */
    float scales[];                                       /* [k / blocksize][BNBQ_TILE_N] */
} decoded_rows;

static size_t scratch_bytes_many(int64_t m, int64_t k) {
    (void)m;
    return sizeof(decoded_rows) + (size_t)((k / 32 + LANES) * BNBQ_TILE_N) * sizeof(float);
}

/* Columns [col, col + GROUP) of W; codes past the rows and columns are 0. */
static void decode_group(const bnbq_q4_rows *w, int64_t rows, int64_t vectors, int64_t col,
                         uint32_t *pairs) {
    const __m512i table = make_table(w->codebook);
    const int64_t row_bytes = w->k / 2, left = w->k - col;
    for (int64_t n = 0; n < rows; n += LANES, pairs += LANES) {
        __m512i t[LANES];
        load_group(w->qweight + n * row_bytes + col / 2, row_bytes, rows - n, left, t);
#pragma GCC unroll 16
        for (int g = 0; g < LANES; g++)
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++)
                _mm512_store_si512(pairs + (4 * g + j) * vectors * LANES,
                                   (__m512i)decode32(t[g], j, table));
    }
}

/* One group of columns of a tile, for the inner loops. */
typedef struct group {
    const uint32_t *pairs;
    const float *scales;
    int64_t cols, unit; /* columns; that share scales */
    float *y;
    int64_t ldy;
    __mmask16 mask; /* rows of W in the last vector */
    bool first;
    const char *next; /* lines to prefetch, one per pair of columns */
    int64_t next_stride;
} group;

/* y[xs, 16 * vs] = or += x[xs, GROUP] . pairs, scaled per unit of columns. Sums and scaled sums
 * stay in registers: xs * vs <= SUMS. */
BNBQ_INLINE void multiply(const int xs, const int vs, const uint16_t *x, const group *g) {
    const char *next = g->next, *next_x = (const char *)(x + xs * GROUP);
    const uint32_t *pairs = g->pairs;
    const float *scales = g->scales;
    const int64_t stride = g->next_stride, unit = g->unit;
    __m512 total[SUMS], sum[SUMS];
#pragma GCC unroll 12
    for (int i = 0; i < xs; i++)
#pragma GCC unroll 4
        for (int v = 0; v < vs; v++)
            total[i * vs + v] = g->first ? _mm512_setzero_ps()
                                         : _mm512_maskz_loadu_ps(v == vs - 1 ? g->mask : 0xffff,
                                                                 g->y + i * g->ldy + v * LANES);
    for (const uint16_t *end = x + g->cols; x < end; scales += BNBQ_TILE_N) {
#pragma GCC unroll 12
        for (int i = 0; i < xs * vs; i++)
            sum[i] = _mm512_setzero_ps();
        for (const uint16_t *unit_end = x + unit; x < unit_end; x += 2, pairs += vs * LANES) {
            bf16x32 wv[4];
            _mm_prefetch(next, _MM_HINT_T0);
            _mm_prefetch(next_x, _MM_HINT_T0);
            next += stride;
            next_x += 4 * xs;
#pragma GCC unroll 4
            for (int v = 0; v < vs; v++) {
                wv[v] = (bf16x32)_mm512_load_si512(pairs + v * LANES);
                __asm__("" : "+v"(wv[v])); /* or gcc loads it again for every row of x */
            }
#pragma GCC unroll 12
            for (int i = 0; i < xs; i++) {
                int32_t pair;
                memcpy(&pair, x + i * GROUP, sizeof pair);
                const bf16x32 xv = (bf16x32)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
                for (int v = 0; v < vs; v++)
                    sum[i * vs + v] = _mm512_dpbf16_ps(sum[i * vs + v], wv[v], xv);
            }
        }
#pragma GCC unroll 4
        for (int v = 0; v < vs; v++) {
            const __m512 scale = _mm512_load_ps(scales + v * LANES);
#pragma GCC unroll 12
            for (int i = 0; i < xs; i++)
                total[i * vs + v] = _mm512_fmadd_ps(sum[i * vs + v], scale, total[i * vs + v]);
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < xs; i++)
#pragma GCC unroll 4
        for (int v = 0; v < vs; v++)
            _mm512_mask_storeu_ps(g->y + i * g->ldy + v * LANES, v == vs - 1 ? g->mask : 0xffff,
                                  total[i * vs + v]);
}

typedef void multiply_fn(const uint16_t *x, const group *g);
#define MULTIPLY(what, xs, vs)                                                                     \
    static void what##_##xs##x##vs(const uint16_t *x, const group *g) {                            \
        what(xs, vs, x, g);                                                                        \
    }
#define AT(what, xs, vs) [vs - 1][xs - 1] = what##_##xs##x##vs,
EACH_SHAPE(MULTIPLY, multiply)
static multiply_fn *const multiply_of[4][6] = {EACH_SHAPE(AT, multiply)};

static void linear_many(const void *packed, int64_t m, const bnbq_q4_rows *w, int64_t rows,
                        float *y, int64_t ldy, void *scratch) {
    assert(m >= 1 && m <= BNBQ_TILE_M && rows >= 1 && rows <= BNBQ_TILE_N);
    assert(w->k % 32 == 0 && w->k % w->blocksize == 0 && ldy >= rows);
    decoded_rows *d = scratch;
    const uint16_t *x = packed;
    const int64_t vectors = (rows + LANES - 1) / LANES;
    multiply_fn *const *const functions = multiply_of[vectors - 1];
    group g = {.pairs = d->pairs,
               .unit = w->blocksize < GROUP ? w->blocksize : GROUP,
               .ldy = ldy,
               .mask = (__mmask16)(0xffff >> (vectors * LANES - rows))};
    transpose_scales(w, rows, 1.0f, d->scales);
    for (int64_t col = 0; col < w->k; col += GROUP) {
        decode_group(w, rows, vectors, col, d->pairs);
        g.cols = w->k - col < GROUP ? w->k - col : GROUP;
        g.scales = d->scales + col / w->blocksize * BNBQ_TILE_N;
        g.first = col == 0;
        g.y = y;
        /* While the first rows of x are multiplied, the next columns of W are fetched. */
        g.next = (const char *)w->qweight + (col + GROUP) / 2;
        g.next_stride = w->k / 2;
        for (int64_t i = 0, xs; i < m; i += xs, x += xs * GROUP, g.y += xs * ldy) {
            xs = rows_next(m - i, most_rows[vectors - 1]);
            functions[xs - 1](x, &g);
            g.next = (const char *)x;
            g.next_stride = 0;
        }
    }
}

const bnbq_q4_kernels bnbq_q4_avx512bf16 = {
    .isa = "avx512bf16",
    .level = BNBQ_ISA_AVX512BF16,
    .needs = BNBQ_CPU_OF_THIS_FILE,
    .quantize = borrowed_quantize_q4,
    .dequantize = borrowed_dequantize_q4,
    .linear = BORROWED_LINEAR_Q4,
    .bf16 = {{1, {packed_bytes_few, pack_few, scratch_bytes_few, linear_few}},
             {10, {packed_bytes_many, pack_many, scratch_bytes_many, linear_many}}},
    .backward = borrowed_backward_q4,
    .backward_bf16 = backward_bf16_q4,
};
