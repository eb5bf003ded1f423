/* w4a8_avx512vnni.c - int8 activations times 4-bit weights on AVX-512 VNNI.
 *
 * Lanes are rows of W: 16 rows of 64 bytes are transposed as dwords, before they are decoded; then
 * a dword holds eight codes of one row, and vpshufb looks 64 up at once. vpdpbusd wants one operand
 * unsigned: the codebook is, offset by 128, and what this adds is known when x is packed, so each
 * sum starts from -128 * sum(x) instead of 0.
 *
 *   few   codes are multiplied as they are decoded, in registers
 *   many  a group of columns of up to 64 rows is decoded to L1, for all rows of x
 *
 * Sums over a block are exact; these are added one block after the other, so that both give the
 * bits of reference.py. The float part is a conversion, two products and an addition per 64
 * columns: as a fused product it would take as long, since additions have units of their own.
 *
 * History, 4096 x 4096 nf4, one thread of a busy Zen 4, weights from DRAM: m = 1 0.42 ms, 4 0.64,
 * 16 2.1, 64 6.6, 256 24.5 (one vpdpbusd of 512 bits per cycle allows 18.4). At m = 1 the next rows
 * prefetched to L1, where 16 rows 2 KB apart share two sets, took 0.75, scales without prefetches
 * 0.6; prefetches of the next x and y gave nothing at m = 256.
 */
#include "row_lanes_avx512.h"
#include "w4a8.h"

#include <assert.h>
#include <immintrin.h>
#include <string.h>

#if !defined(__AVX512F__) || !defined(__AVX512BW__) || !defined(__AVX512VNNI__)
#error "compile with the flags of s8_avx512vnni.c"
#endif

enum { FEW_ROWS = 4 };

/* A row of x, one group of columns. In the order of decoded quads: columns 8g + {1, 3, 5, 7}, then
 * {0, 2, 4, 6}. Packed form: [group][m]. */
typedef struct x_group {
    int8_t q[GROUP];
    int32_t start[GROUP / 32]; /* of the sum over each block */
    float step[GROUP / 32];
} x_group;

static size_t groups_bytes(int block, int64_t m, int64_t k) {
    (void)block;
    return (size_t)(groups_of(k) * m) * sizeof(x_group);
}

BNBQ_INLINE void pack(const int block, const float *x, int64_t i, int64_t m, int64_t k,
                      void *packed) {
    assert(i >= 0 && i < m && m <= BNBQ_TILE_M && k % block == 0);
    const __m256i order = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(1, 3, 5, 7, 0, 2, 4, 6, 9, 11, 13, 15, 8, 10, 12, 14));
    for (int64_t c = 0; c < k; c += block) {
        x_group *out = (x_group *)packed + c / GROUP * m + i;
        const int64_t at = c % GROUP;
        int8_t q[64];
        out->step[at / block] = quantize_block(&bnbq_s8_avx512vnni, x + c, block, q);
        __m256i sums = _mm256_setzero_si256();
        for (int j = 0; j < block; j += 32) {
            __m256i v = _mm256_loadu_si256((const __m256i *)(q + j));
            sums = _mm256_dpbusd_epi32(sums, _mm256_set1_epi8(1), v);
            _mm256_storeu_si256((__m256i *)(out->q + at + j), _mm256_shuffle_epi8(v, order));
        }
        __m128i s = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
        s = _mm_hadd_epi32(s, s);
        s = _mm_hadd_epi32(s, s);
        out->start[at / block] = -128 * _mm_cvtsi128_si32(s);
    }
}

typedef struct scratch {
    _Alignas(64) uint32_t quads[GROUP / 4 * BNBQ_TILE_N]; /* [GROUP / 4][vectors][LANES] */
    float scales[];                                       /* [k / blocksize][BNBQ_TILE_N] */
} scratch;

static size_t scratch_bytes(int64_t m, int64_t k) {
    (void)m;
    return sizeof(scratch) + (size_t)((k / 32 + LANES) * BNBQ_TILE_N) * sizeof(float);
}

/* The codebook + 128, and what its step is. */
static inline __m512i make_table(const float *codebook, float *step) {
    int8_t codes[16];
    *step = round_codebook(codebook, codes);
    __m128i values = _mm_xor_si128(_mm_loadu_si128((const __m128i *)codes), _mm_set1_epi8(-128));
    return _mm512_broadcast_i32x4(values);
}

/* The low nibbles, which are the odd columns, or the high ones. */
BNBQ_INLINE __m512i decode(__m512i codes, const int high, __m512i table) {
    codes = high ? _mm512_srli_epi32(codes, 4) : codes;
    return _mm512_shuffle_epi8(table, _mm512_and_si512(codes, _mm512_set1_epi8(15)));
}

BNBQ_INLINE __m512i broadcast4(const int8_t *q) {
    int32_t quad;
    memcpy(&quad, q, sizeof quad);
    return _mm512_set1_epi32(quad);
}

BNBQ_INLINE __m512 add_block(__m512 total, __m512i sum, __m512 scale, float step) {
    scale = _mm512_mul_ps(_mm512_set1_ps(step), scale);
    return _mm512_add_ps(total, _mm512_mul_ps(_mm512_cvtepi32_ps(sum), scale));
}

/* Floats from the scales of one block of x to those of the next in a group. */
static inline int64_t scales_step(const bnbq_q4_rows *w) {
    return w->blocksize < GROUP ? BNBQ_TILE_N : 0;
}

/* ---------------------------------------------------------------- few rows of x */

/* y[xs, rows], rows <= LANES. */
BNBQ_INLINE void few(const int block, const int xs, const x_group *x, int64_t m,
                     const bnbq_q4_rows *w, int64_t row, int64_t rows, __m512i table,
                     const float *scales, float *y, int64_t ldy) {
    const int64_t row_bytes = w->k / 2;
    const uint8_t *q = w->qweight + row * row_bytes, *next = q + LANES * row_bytes;
    const int shift = log2_of(w->blocksize);
    const float *next_absmax = w->absmax + (row + BNBQ_TILE_N) * (w->k >> shift);
    __m512 total[FEW_ROWS];
#pragma GCC unroll 4
    for (int i = 0; i < xs; i++)
        total[i] = _mm512_setzero_ps();
    for (int64_t col = 0; col < w->k; col += GROUP, x += m) {
        const float *scale = scales + (col >> shift) * BNBQ_TILE_N;
        __m512i t[LANES];
        load_group(q + col / 2, row_bytes, rows, w->k - col, t);
#pragma GCC unroll 4
        for (int b = 0; b < GROUP / block; b++) {
            const int64_t c = col + b * block;
            __m512i sum[FEW_ROWS];
            if (c >= w->k)
                break;
            _mm_prefetch((const char *)(next_absmax + (c >> shift) * LANES), _MM_HINT_T1);
#pragma GCC unroll 4
            for (int i = 0; i < xs; i++)
                sum[i] = _mm512_set1_epi32(x[i].start[b]);
#pragma GCC unroll 8
            for (int g = b * block / 8; g < (b + 1) * block / 8; g++) {
                /* The next rows, in the order in which they lie; to L2, as L1 is full of these. */
                _mm_prefetch((const char *)next, _MM_HINT_T1);
                next += 64;
#pragma GCC unroll 2
                for (int high = 0; high < 2; high++) {
                    const __m512i v = decode(t[g], high, table);
#pragma GCC unroll 4
                    for (int i = 0; i < xs; i++)
                        sum[i] =
                            _mm512_dpbusd_epi32(sum[i], v, broadcast4(x[i].q + 8 * g + 4 * high));
                }
            }
#pragma GCC unroll 4
            for (int i = 0; i < xs; i++)
                total[i] = add_block(total[i], sum[i], _mm512_load_ps(scale), x[i].step[b]);
            scale += scales_step(w);
        }
    }
    const __mmask16 mask = rows < LANES ? (__mmask16)((1u << rows) - 1) : 0xffff;
#pragma GCC unroll 4
    for (int i = 0; i < xs; i++)
        _mm512_mask_storeu_ps(y + i * ldy + row, mask, total[i]);
}

BNBQ_INLINE void run_few(const int block, const x_group *x, int64_t m, const bnbq_q4_rows *w,
                         int64_t rows, __m512i table, const float *scales, float *y, int64_t ldy) {
    for (int64_t n = 0; n < rows; n += LANES, scales += LANES)
        switch (m) {
        case 1: few(block, 1, x, m, w, n, rows - n, table, scales, y, ldy); break;
        case 2: few(block, 2, x, m, w, n, rows - n, table, scales, y, ldy); break;
        case 3: few(block, 3, x, m, w, n, rows - n, table, scales, y, ldy); break;
        default: few(block, 4, x, m, w, n, rows - n, table, scales, y, ldy);
        }
}

/* ---------------------------------------------------------------- many rows of x */

/* One group of columns of a tile, for the inner loops. */
typedef struct group {
    const uint32_t *quads;
    const float *scales;
    int64_t blocks, scales_step;
    float *y;
    int64_t ldy;
    __mmask16 mask; /* rows of W in the last vector */
    bool first;
    const char *next; /* lines to prefetch, one per quad of columns */
    int64_t next_stride;
} group;

/* y[xs, 16 * vs] = or += x[xs, GROUP] . quads, scaled per block. Sums and scaled sums stay in
 * registers: xs * vs <= SUMS. */
BNBQ_INLINE void multiply(const int block, const int xs, const int vs, const x_group *x,
                          const group *g) {
    const char *next = g->next;
    const uint32_t *quads = g->quads;
    const float *scales = g->scales;
    const int64_t stride = g->next_stride;
    __m512 total[SUMS];
    __m512i sum[SUMS];
#pragma GCC unroll 12
    for (int i = 0; i < xs; i++)
#pragma GCC unroll 4
        for (int v = 0; v < vs; v++)
            total[i * vs + v] = g->first ? _mm512_setzero_ps()
                                         : _mm512_maskz_loadu_ps(v == vs - 1 ? g->mask : 0xffff,
                                                                 g->y + i * g->ldy + v * LANES);
    for (int64_t b = 0; b < g->blocks; b++, scales += g->scales_step) {
#pragma GCC unroll 12
        for (int i = 0; i < xs; i++)
#pragma GCC unroll 4
            for (int v = 0; v < vs; v++)
                sum[i * vs + v] = _mm512_set1_epi32(x[i].start[b]);
        const int8_t *q = x->q + b * block;
        for (const int8_t *end = q + block; q < end; q += 4, quads += vs * LANES) {
            __m512i wv[4];
            _mm_prefetch(next, _MM_HINT_T0);
            next += stride;
#pragma GCC unroll 4
            for (int v = 0; v < vs; v++) {
                wv[v] = _mm512_load_si512(quads + v * LANES);
                __asm__("" : "+v"(wv[v])); /* or gcc loads it again for every row of x */
            }
#pragma GCC unroll 12
            for (int i = 0; i < xs; i++) {
                const __m512i xv = broadcast4(q + i * (int64_t)sizeof(x_group));
#pragma GCC unroll 4
                for (int v = 0; v < vs; v++)
                    sum[i * vs + v] = _mm512_dpbusd_epi32(sum[i * vs + v], wv[v], xv);
            }
        }
#pragma GCC unroll 4
        for (int v = 0; v < vs; v++) {
            const __m512 scale = _mm512_load_ps(scales + v * LANES);
#pragma GCC unroll 12
            for (int i = 0; i < xs; i++)
                total[i * vs + v] =
                    add_block(total[i * vs + v], sum[i * vs + v], scale, x[i].step[b]);
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < xs; i++)
#pragma GCC unroll 4
        for (int v = 0; v < vs; v++)
            _mm512_mask_storeu_ps(g->y + i * g->ldy + v * LANES, v == vs - 1 ? g->mask : 0xffff,
                                  total[i * vs + v]);
}

typedef void multiply_fn(const x_group *x, const group *g);
#define MULTIPLY(block, xs, vs)                                                                    \
    static void multiply_##block##_##xs##x##vs(const x_group *x, const group *g) {                 \
        multiply(block, xs, vs, x, g);                                                             \
    }
#define AT(block, xs, vs) [vs - 1][xs - 1] = multiply_##block##_##xs##x##vs,
EACH_SHAPE(MULTIPLY, 32)
EACH_SHAPE(MULTIPLY, 64)
static multiply_fn *const multiply_32[4][6] = {EACH_SHAPE(AT, 32)};
static multiply_fn *const multiply_64[4][6] = {EACH_SHAPE(AT, 64)};

/* Columns [col, col + GROUP) of W. */
static void decode_group(const bnbq_q4_rows *w, int64_t rows, int64_t vectors, int64_t col,
                         __m512i table, uint32_t *quads) {
    for (int64_t n = 0; n < rows; n += LANES, quads += LANES) {
        __m512i t[LANES];
        load_group(w->qweight + n * (w->k / 2) + col / 2, w->k / 2, rows - n, w->k - col, t);
#pragma GCC unroll 16
        for (int g = 0; g < LANES; g++)
#pragma GCC unroll 2
            for (int high = 0; high < 2; high++)
                _mm512_store_si512(quads + (2 * g + high) * vectors * LANES,
                                   decode(t[g], high, table));
    }
}

static void run_many(int block, multiply_fn *const functions_of[4][6], const x_group *x, int64_t m,
                     const bnbq_q4_rows *w, int64_t rows, __m512i table, scratch *s, float *y,
                     int64_t ldy) {
    const int64_t vectors = (rows + LANES - 1) / LANES;
    multiply_fn *const *const functions = functions_of[vectors - 1];
    group g = {.quads = s->quads,
               .scales_step = scales_step(w),
               .ldy = ldy,
               .mask = (__mmask16)(0xffff >> (vectors * LANES - rows))};
    for (int64_t col = 0; col < w->k; col += GROUP) {
        decode_group(w, rows, vectors, col, table, s->quads);
        g.blocks = (w->k - col < GROUP ? w->k - col : GROUP) / block;
        g.scales = s->scales + col / w->blocksize * BNBQ_TILE_N;
        g.first = col == 0;
        g.y = y;
        /* While the first rows of x are multiplied, the next columns of W are fetched. */
        const uint8_t *next = w->qweight + (col + GROUP) / 2;
        int64_t lines = rows;
        for (int64_t i = 0, xs; i < m; i += xs, x += xs, g.y += xs * ldy) {
            xs = rows_next(m - i, most_rows[vectors - 1]);
            g.next = lines > 0 ? (const char *)next : (const char *)x;
            g.next_stride = lines > 0 ? w->k / 2 : 0;
            functions[xs - 1](x, &g);
            next += GROUP / 4 * (w->k / 2);
            lines -= GROUP / 4;
        }
    }
}

/* ---------------------------------------------------------------- table */

BNBQ_INLINE void run(const int block, const void *packed, int64_t m, const bnbq_q4_rows *w,
                     int64_t rows, float *y, int64_t ldy, void *memory) {
    assert(m >= 1 && m <= BNBQ_TILE_M && rows >= 1 && rows <= BNBQ_TILE_N && ldy >= rows);
    assert(w->k % w->blocksize == 0 && w->blocksize % block == 0);
    scratch *s = memory;
    float step;
    const __m512i table = make_table(w->codebook, &step);
    transpose_scales(w, rows, step, s->scales);
    if (m <= FEW_ROWS)
        run_few(block, packed, m, w, rows, table, s->scales, y, ldy);
    else
        run_many(block, block == 32 ? multiply_32 : multiply_64, packed, m, w, rows, table, s, y,
                 ldy);
}

W4A8_FORM(32, groups_bytes)
W4A8_FORM(64, groups_bytes)

const bnbq_w4a8_kernels bnbq_w4a8_avx512vnni = {
    .isa = "avx512vnni",
    .level = BNBQ_ISA_AVX512,
    .needs = BNBQ_CPU_OF_THIS_FILE,
    .blocks32 = W4A8_FUNCTIONS(32),
    .blocks64 = W4A8_FUNCTIONS(64),
};
