/* q4_amx.c - 4-bit weights times bf16 activations on AMX tiles (Sapphire Rapids and later).
 *
 * W is the A operand in its stored order, x the B operand, packed once in the same order, C = y
 * transposed. 64 bytes of a row of W are 32 words of four weights: shifted right by 0, 4, 8 and 12
 * they index a 32-entry table directly (vpermw looks at five bits) and give four rows of A tiles
 * with the elements 4j + {1, 0, 3, 2}, j < 32. No mask, no widening, no interleaving. The table
 * holds codebook * absmax in fp32, rounded once to bf16: the very values of a bf16 dequantised
 * weight. Sums are fp32, in the same order for every m: C is kept in tiles or spilled in fp32.
 *
 * Decoded tiles live in two chunks in L1. While one is multiplied the next is decoded, a few rows
 * after each step: decoding and multiplying use different parts of the core.
 *
 * Sources: Intel SDM (see amx_tiles.h); the layout is bitsandbytes'. History: measured as bare
 * loops before this file existed, 4096 x 4096 from DRAM, one thread of a 3.8 GHz core: m = 16
 * 0.97 ms (2 x 1 tiles), m = 64 1.60 ms (2 x 2, 128 columns, interleaved; 1.85 without), m = 256
 * 6.6 ms (256 columns; 512 lost a third). A 256 KB ring, wide B tiles at small m and prefetching
 * along each row instead of linearly all lost. With the tile instructions left out, decoding took
 * 0.75 ms for weights in cache on a Zen 4 (with integer divisions per unit 1.8) and 2.0 ms from
 * DRAM (without the prefetch 5.3). With them this file has only run emulated.
 */
#include "amx_tiles.h"

#define LENDER_Q4 bnbq_q4_avx512
#include "borrow_q4.h"

#include <assert.h>

#if !defined(__AVX512BW__) || !defined(__AVX512VL__) || !defined(__AVX512BF16__)
#error "compile with -mavx2 -mfma -mf16c -mavx512{f,bw,dq,vl,vnni,bf16} -mamx-{tile,int8,bf16}"
#endif

enum {
    GROUP = 128,          /* weights decoded at once: 64 bytes, four rows of A */
    STEPS = 4,            /* tile steps per group */
    ROWS = 2 * AMX_PANEL, /* rows of W per panel */
    CHUNK_GROUPS = 2,     /* at most, in one chunk of decoded tiles */
    CHUNK = CHUNK_GROUPS * STEPS * 2 * AMX_TILE_BYTES,
};

static int64_t groups_of(int64_t k) {
    return (k + GROUP - 1) / GROUP;
}

static int64_t panels_of(int64_t m) {
    return (m + AMX_PANEL - 1) / AMX_PANEL;
}

/* ------------------------------------------------------------------ packing x */

/* Bytes of one panel: 16 rows of x as [k / 2 pairs][16 columns], padded to whole groups. */
static int64_t panel_bytes(int64_t k, int64_t width) {
    return groups_of(k) * STEPS * AMX_PANEL * width;
}

static size_t packed_bytes_q4_amx(int64_t m, int64_t k) {
    return panels_of(m) * panel_bytes(k, amx_width(m));
}

/* Row i is column i % 16 of its panel; columns without a row keep what was there, and the columns
 * of C that they give are never stored. The four words 4j + q of eight neighbouring elements that
 * make one pair (j = 2p, 2p + 1) in each of the four steps are first brought together. */
static void pack_q4_amx(const float *x, int64_t i, int64_t m, int64_t k, void *packed) {
    assert(i >= 0 && i < m && m <= BNBQ_TILE_M && k % 32 == 0);
    const int64_t width = amx_width(m);
    uint8_t *out = (uint8_t *)packed + i / AMX_PANEL * panel_bytes(k, width) + i % AMX_PANEL * 4;
    const __m512i pairs =
        _mm512_broadcast_i32x4(_mm_setr_epi8(2, 3, 10, 11, 0, 1, 8, 9, 6, 7, 14, 15, 4, 5, 12, 13));
    const __m512i lanes = _mm512_setr_epi32(0, 16, 32, 48, 1, 17, 33, 49, 2, 18, 34, 50, 3, 19, 35,
                                            51); /* pair p of step s: row 16 s + p */
    const __m512i rows = _mm512_mullo_epi32(lanes, _mm512_set1_epi32((int)width));
    for (int64_t j = 0; j < groups_of(k) * GROUP; j += 32) {
        __m512i pair = _mm512_setzero_si512();
        if (j < k)
            pair =
                (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + j + 16), _mm512_loadu_ps(x + j));
        pair = _mm512_shuffle_epi8(pair, pairs);
        uint8_t *to = out + (j / GROUP * STEPS * AMX_PANEL + j % GROUP / 8) * width;
        _mm512_i32scatter_epi32(to, rows, pair, 1);
    }
}

/* ------------------------------------------------------------------ decoding W */

/* bf16 tables of `scales` blocks' weights, two in each vector (low and high 16 words). */
static inline void scaled_tables(const float *codebook, const float *absmax, int scales,
                                 int64_t left, __m512i table[2]) {
    const __m512 values = _mm512_loadu_ps(codebook);
    __m512 v[4];
    for (int i = 0; i < scales; i++)
        v[i] = _mm512_mul_ps(values, _mm512_set1_ps(i < left ? absmax[i] : 0.0f));
    table[0] = (__m512i)_mm512_cvtne2ps_pbh(v[scales > 1], v[0]);
    table[1] = scales > 2 ? (__m512i)_mm512_cvtne2ps_pbh(v[3], v[2]) : table[0];
}

/* 64 bytes (the last group of a row may have 16, 32 or 48) to one row of four A tiles, which are
 * 2 * AMX_TILE_BYTES apart. `scales` is a constant where this is inlined: blocks per group. */
static inline void decode_group(const uint8_t *q, int64_t bytes, const float *codebook,
                                const float *absmax, int scales, int64_t left, uint8_t *out) {
    const __mmask32 valid = bytes >= 64 ? 0xffffffff : (1u << bytes / 2) - 1;
    const __m512i words = _mm512_maskz_loadu_epi16(valid, q);
    const __m512i nibble = _mm512_set1_epi16(15);
    /* Bits of the index above the nibble: which block of the group word j is in. */
    const __m512i block =
        scales == 2
            ? _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1)
            : _mm512_set_epi64(0x0030003000300030, 0x0030003000300030, 0x0020002000200020,
                               0x0020002000200020, 0x0010001000100010, 0x0010001000100010, 0, 0);
    __m512i table[2];
    scaled_tables(codebook, absmax, scales, left, table);
    const __m512i shifted[STEPS] = {words, _mm512_srli_epi16(words, 4), _mm512_srli_epi16(words, 8),
                                    _mm512_srli_epi16(words, 12)};
    for (int s = 0; s < STEPS; s++) {
        __m512i index = shifted[s];
        if (scales > 1) /* index & nibble | block */
            index = _mm512_ternarylogic_epi64(index, nibble, block, 0xea);
        const __m512i row = scales > 2
                                ? _mm512_maskz_permutex2var_epi16(valid, table[0], index, table[1])
                                : _mm512_maskz_permutexvar_epi16(valid, index, table[0]);
        _mm512_store_si512(out + s * 2 * AMX_TILE_BYTES, row);
    }
}

/* Decodes a panel chunk by chunk, some units (one row, one group) at a time. */
typedef struct decoder {
    const bnbq_q4_rows *w;
    int64_t row, rows; /* the panel: rows of w */
    int64_t blocks;    /* per row */
    int block_shift;   /* blocksize is 1 << block_shift */
    int64_t chunk_groups;
    const uint8_t *ahead;
    uint8_t *ring; /* two chunks: tile [group][step][row / 16] */
    /* The chunk: its groups, which are none past the end, its place, and the next unit. */
    int64_t group, groups;
    uint8_t *chunk;
    int64_t next_row, next_group;
} decoder;

/* Returns where the chunk will be. */
static uint8_t *start_chunk(decoder *d, int64_t group) {
    const int64_t left = groups_of(d->w->k) - group;
    d->group = group;
    d->groups = left < d->chunk_groups ? left : d->chunk_groups;
    d->chunk = d->ring + (d->chunk == d->ring ? CHUNK : 0);
    d->next_row = d->groups > 0 ? 0 : d->rows;
    d->next_group = 0;
    return d->chunk;
}

static inline void decode_unit(decoder *d) {
    const bnbq_q4_rows *w = d->w;
    const int64_t r = d->next_row, g = d->next_group, column = (d->group + g) * GROUP;
    const int64_t row = d->row + r, first = column >> d->block_shift;
    const uint8_t *q = w->qweight + (row * w->k + column) / 2;
    const float *absmax = w->absmax + row * d->blocks + first;
    const int64_t bytes = (w->k - column) / 2, left = d->blocks - first;
    uint8_t *out = d->chunk + (g * STEPS * 2 + r / AMX_PANEL) * AMX_TILE_BYTES + r % AMX_PANEL * 64;
    if (++d->next_group == d->groups) {
        d->next_group = 0;
        d->next_row++;
    }
    /* One line of the next panel per unit, in the order of DRAM and not in that of the chunks. */
    _mm_prefetch((const char *)d->ahead, _MM_HINT_T1);
    d->ahead += 64;
    if (d->block_shift >= 7)
        decode_group(q, bytes, w->codebook, absmax, 1, left, out);
    else if (d->block_shift == 6)
        decode_group(q, bytes, w->codebook, absmax, 2, left, out);
    else
        decode_group(q, bytes, w->codebook, absmax, 4, left, out);
}

static void decode_some(decoder *d, int64_t count) {
    for (; count > 0 && d->next_row < d->rows; count--)
        decode_unit(d);
}

/* ------------------------------------------------------------------ the product */

/* Add `steps` tile steps to the block C, decoding `share` units of the next chunk after each. */
static inline void multiply(int wide, int tall, const uint8_t *a, const uint8_t *b0,
                            const uint8_t *b1, int64_t width, int64_t steps, decoder *next,
                            int64_t share) {
    for (int64_t s = 0; s < steps; s++) {
        const uint8_t *tiles = a + s * 2 * AMX_TILE_BYTES;
        amx_load(AMX_A0, tiles, 64);
        amx_load(AMX_B0, b0 + s * AMX_PANEL * width, width);
        amx_dp_bf16(AMX_C00, AMX_A0, AMX_B0);
        if (wide) {
            amx_load(AMX_B1, b1 + s * AMX_PANEL * width, width);
            amx_dp_bf16(AMX_C01, AMX_A0, AMX_B1);
        }
        if (tall) {
            amx_load(AMX_A1, tiles + AMX_TILE_BYTES, 64);
            amx_dp_bf16(AMX_C10, AMX_A1, AMX_B0);
            if (wide)
                amx_dp_bf16(AMX_C11, AMX_A1, AMX_B1);
        }
        decode_some(next, share);
    }
}

static inline void load_block(int wide, int tall, const uint8_t *c) {
    amx_load(AMX_C00, c, 64);
    if (wide)
        amx_load(AMX_C01, c + AMX_TILE_BYTES, 64);
    if (tall)
        amx_load(AMX_C10, c + 2 * AMX_TILE_BYTES, 64);
    if (wide && tall)
        amx_load(AMX_C11, c + 3 * AMX_TILE_BYTES, 64);
}

/* y[m, rows of the panel]; the pairs of x panels share each decoded chunk. */
static void run_panel(const uint8_t *packed, int64_t m, decoder *d, float *y, int64_t ldy,
                      uint8_t *c) {
    const int64_t k = d->w->k, width = amx_width(m), panels = panels_of(m);
    const int64_t pairs = (panels + 1) / 2, groups = groups_of(k), bytes = panel_bytes(k, width);
    const int tall = d->rows > AMX_PANEL;
    const uint8_t *next = start_chunk(d, 0);
    decode_some(d, d->rows * d->groups);
    for (int64_t g = 0; g < groups; g += d->chunk_groups) {
        const uint8_t *a = next;
        const int64_t steps = d->groups * STEPS, parts = pairs * steps;
        next = start_chunk(d, g + d->chunk_groups);
        const int64_t share = d->groups > 0 ? (d->rows * d->groups + parts - 1) / parts : 0;
        for (int64_t p = 0; p < pairs; p++) {
            const int wide = 2 * p + 1 < panels;
            const uint8_t *b0 = packed + 2 * p * bytes + g * STEPS * AMX_PANEL * width;
            const uint8_t *b1 = wide ? b0 + bytes : b0;
            uint8_t *block = c + p * 4 * AMX_TILE_BYTES;
            if (g == 0)
                amx_zero_block(wide, tall);
            else if (pairs > 1)
                load_block(wide, tall, block);
            if (wide && tall)
                multiply(1, 1, a, b0, b1, width, steps, d, share);
            else if (wide)
                multiply(1, 0, a, b0, b1, width, steps, d, share);
            else if (tall)
                multiply(0, 1, a, b0, b1, width, steps, d, share);
            else
                multiply(0, 0, a, b0, b1, width, steps, d, share);
            if (pairs > 1 || d->groups <= 0)
                amx_store_block(wide, tall, block);
        }
    }
    for (int64_t i = 0; i < panels; i++)
        for (int64_t h = 0; h <= tall; h++) {
            const int64_t rows = d->rows - h * AMX_PANEL, cols = m - i * AMX_PANEL;
            amx_store_transposed(c + (i / 2 * 4 + h * 2 + i % 2) * AMX_TILE_BYTES,
                                 rows < AMX_PANEL ? rows : AMX_PANEL,
                                 cols < AMX_PANEL ? cols : AMX_PANEL,
                                 y + i * AMX_PANEL * ldy + h * AMX_PANEL, ldy);
        }
}

static size_t scratch_bytes_q4_amx(int64_t m, int64_t k) {
    (void)k;
    return 2 * CHUNK + (panels_of(m) + 1) / 2 * 4 * AMX_TILE_BYTES;
}

static void linear_q4_amx(const void *packed, int64_t m, const bnbq_q4_rows *w, int64_t rows,
                          float *y, int64_t ldy, void *scratch) {
    assert(m >= 1 && m <= BNBQ_TILE_M && rows >= 1 && rows <= BNBQ_TILE_N);
    assert(w->k % 32 == 0 && w->k % w->blocksize == 0 && ldy >= rows);
    for (int64_t n = 0; n < rows; n += ROWS) {
        decoder d = {
            .w = w,
            .row = n,
            .rows = rows - n < ROWS ? rows - n : ROWS,
            .blocks = w->k / w->blocksize,
            .block_shift = __builtin_ctzll((uint64_t)w->blocksize),
            /* From 65 rows of x on the spilled C wants long chunks, below it L1 wants short. */
            .chunk_groups = m <= 64 ? 1 : CHUNK_GROUPS,
            .ring = scratch,
        };
        d.ahead = w->qweight + (n + d.rows) * (w->k / 2);
        const int64_t rows1 = d.rows - AMX_PANEL;
        amx_configure_block(d.rows < AMX_PANEL ? d.rows : AMX_PANEL, rows1 > 0 ? rows1 : 0,
                            amx_width(m));
        run_panel(packed, m, &d, y + n, ldy, (uint8_t *)scratch + 2 * CHUNK);
    }
    amx_release();
}

const bnbq_q4_kernels bnbq_q4_amx = {
    .isa = "amx",
    .level = BNBQ_ISA_AMX,
    .needs = BNBQ_CPU_OF_THIS_FILE,
    .quantize = borrowed_quantize_q4,
    .dequantize = borrowed_dequantize_q4,
    .linear = BORROWED_LINEAR_Q4,
    /* 16: from the table of bare loops above (below it fp32 vectors are as fast and exact); to be
     * measured again with these kernels on a processor that has AMX. */
    .bf16 = {{16, {packed_bytes_q4_amx, pack_q4_amx, scratch_bytes_q4_amx, linear_q4_amx}}},
    .backward = borrowed_backward_q4,
};
