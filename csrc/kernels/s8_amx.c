/* s8_amx.c - the exact int8 product on AMX tiles (Sapphire Rapids and later).
 *
 * Rows of W are tile-loaded straight from memory, 16 rows of 64 columns; x is packed once into B
 * tiles (four columns of a row in each 32-bit element). The whole k is summed in the tile
 * registers, so nothing is decoded, copied or spilled. Only a last group of fewer than 64 columns
 * goes through a padded copy, since a tile load would read past the row.
 *
 * Sources: Intel SDM (see amx_tiles.h). History: measured as bare loops before this file existed,
 * 4096 x 4096 from DRAM, one thread of a 3.8 GHz core: m = 1 0.84 ms and m = 16 0.97 ms with one
 * tile of 16 rows of W at a time and no software prefetch (the limit of memory is 0.88; prefetching
 * made it 1.05 and more), m = 64 1.63 ms and m = 256 4.2 ms with 2 x 2 tiles; copying W to a
 * chunk first was slower at m = 64 and equal at 256. This file itself has only run emulated.
 */
#include "../kernels.h"
#include "amx_tiles.h"
#include "s8_epilogue.h"

#define LENDER_S8 bnbq_s8_avx512vnni
#include "borrow_s8.h"

#include <assert.h>

#if !defined(__AVX512BW__) || !defined(__AVX512VL__) || !defined(__AVX512VNNI__)
#error "compile with -mavx2 -mfma -mf16c -mavx512{f,bw,dq,vl,vnni,bf16} -mamx-{tile,int8,bf16}"
#endif

enum {
    STEP = 64, /* columns of one tile step */
    ROWS = 2 * AMX_PANEL,
};

static int64_t steps_of(int64_t k) {
    return (k + STEP - 1) / STEP;
}

/* Bytes of one panel: 16 rows of x as [k / 4][16 columns][4], padded to whole steps. */
static int64_t panel_bytes(int64_t k, int64_t width) {
    return steps_of(k) * AMX_PANEL * width;
}

static size_t packed_bytes_s8_amx(int64_t m, int64_t k) {
    return (m + AMX_PANEL - 1) / AMX_PANEL * panel_bytes(k, amx_width(m));
}

/* Row i is column i % 16 of its panel; columns without a row keep what was there, and the columns
 * of C that they give are never stored. */
static void pack_s8_amx(const int8_t *x, int64_t i, int64_t m, int64_t k, void *packed) {
    assert(i >= 0 && i < m && m <= BNBQ_TILE_M && k >= 1 && k <= BNBQ_MAX_K_S8);
    const int64_t width = amx_width(m);
    uint8_t *out = (uint8_t *)packed + i / AMX_PANEL * panel_bytes(k, width) + i % AMX_PANEL * 4;
    for (int64_t c = 0; c < steps_of(k) * STEP; c += 4, out += width) {
        if (c + 4 <= k) {
            memcpy(out, x + c, 4);
        } else {
            memset(out, 0, 4);
            if (c < k)
                memcpy(out, x + c, k - c);
        }
    }
}

/* Where the tiles of one panel of W are: in W itself, the last step in a copy if k is ragged. */
typedef struct w_panel {
    const int8_t *w;
    int64_t ldw, whole;  /* steps that lie in W */
    const uint8_t *tail; /* [32][64] */
    int64_t steps;
} w_panel;

static inline void add_step(int wide, int tall, const void *a, int64_t lda, const uint8_t *b0,
                            const uint8_t *b1, int64_t width) {
    amx_load(AMX_A0, a, lda);
    amx_load(AMX_B0, b0, width);
    amx_dp_s8(AMX_C00, AMX_A0, AMX_B0);
    if (wide) {
        amx_load(AMX_B1, b1, width);
        amx_dp_s8(AMX_C01, AMX_A0, AMX_B1);
    }
    if (tall) {
        amx_load(AMX_A1, (const uint8_t *)a + AMX_PANEL * lda, lda);
        amx_dp_s8(AMX_C10, AMX_A1, AMX_B0);
        if (wide)
            amx_dp_s8(AMX_C11, AMX_A1, AMX_B1);
    }
}

/* One block of C to four tiles of memory. */
static inline void multiply(int wide, int tall, const w_panel *p, const uint8_t *b0,
                            const uint8_t *b1, int64_t width, uint8_t *c) {
    amx_zero_block(wide, tall);
    for (int64_t s = 0; s < p->whole; s++)
        add_step(wide, tall, p->w + s * STEP, p->ldw, b0 + s * AMX_PANEL * width,
                 b1 + s * AMX_PANEL * width, width);
    if (p->whole < p->steps)
        add_step(wide, tall, p->tail, STEP, b0 + p->whole * AMX_PANEL * width,
                 b1 + p->whole * AMX_PANEL * width, width);
    amx_store_block(wide, tall, c);
}

static size_t scratch_bytes_s8_amx(int64_t m, int64_t k) {
    (void)m;
    (void)k;
    return ROWS * STEP + 4 * AMX_TILE_BYTES;
}

static void linear_s8_amx(const void *packed, int64_t m, const int8_t *w, int64_t ldw, int64_t rows,
                          int64_t k, int32_t *y, int64_t ldy, void *scratch) {
    assert(m >= 1 && m <= BNBQ_TILE_M && rows >= 1 && rows <= BNBQ_TILE_N);
    assert(k >= 1 && k <= BNBQ_MAX_K_S8 && ldw >= k && ldy >= rows);
    const int64_t width = amx_width(m), bytes = panel_bytes(k, width);
    uint8_t *tail = scratch, *c = tail + ROWS * STEP;
    const __mmask64 columns = ((uint64_t)1 << k % STEP) - 1;
    /* Few rows of x: memory decides, and 16 streams at a time are its best pattern. */
    const int64_t panel = m <= AMX_PANEL ? AMX_PANEL : ROWS;
    for (int64_t n = 0; n < rows; n += panel) {
        const int64_t left = rows - n, rows_here = left < panel ? left : panel;
        const int64_t rows0 = rows_here < AMX_PANEL ? rows_here : AMX_PANEL;
        const int64_t rows1 = rows_here - rows0;
        const w_panel p = {w + n * ldw, ldw, k / STEP, tail, steps_of(k)};
        if (p.whole < p.steps)
            for (int64_t r = 0; r < rows_here; r++)
                _mm512_store_si512(tail + r * STEP, _mm512_maskz_loadu_epi8(
                                                        columns, p.w + r * ldw + p.whole * STEP));
        amx_configure_block(rows0, rows1, width);
        for (int64_t i = 0; i < m; i += 2 * AMX_PANEL) {
            const uint8_t *b0 = (const uint8_t *)packed + i / AMX_PANEL * bytes, *b1 = b0 + bytes;
            const int wide = i + AMX_PANEL<m, tall = rows1> 0;
            if (wide && tall)
                multiply(1, 1, &p, b0, b1, width, c);
            else if (wide)
                multiply(1, 0, &p, b0, b1, width, c);
            else if (tall)
                multiply(0, 1, &p, b0, b1, width, c);
            else
                multiply(0, 0, &p, b0, b1, width, c);
            for (int64_t a = 0; a <= tall; a++)
                for (int64_t b = 0; b <= wide; b++) {
                    const int64_t from = i + b * AMX_PANEL;
                    amx_store_transposed(c + (2 * a + b) * AMX_TILE_BYTES, a ? rows1 : rows0,
                                         m - from < AMX_PANEL ? m - from : AMX_PANEL,
                                         y + from * ldy + n + a * AMX_PANEL, ldy);
                }
        }
    }
    amx_release();
}

/* ------------------------------------------------------------------ borrowed from AVX-512 */

static void multiply_outliers_s8_amx(const uint16_t *value, int64_t ldv, int64_t m,
                                     const bnbq_s8_rows *w, int64_t rows, const int64_t *columns,
                                     int64_t count, float *sums, void *scratch) {
    bnbq_s8_avx512bf16.multiply_outliers_bf16(value, ldv, m, w, rows, columns, count, sums,
                                              scratch);
}

const bnbq_s8_kernels bnbq_s8_amx = {
    .isa = "amx",
    .level = BNBQ_ISA_AMX,
    .needs = BNBQ_CPU_OF_THIS_FILE,
    .quantize = borrowed_quantize_s8,
    .dequantize = borrowed_dequantize_s8,
    .packed_bytes = packed_bytes_s8_amx,
    .pack = pack_s8_amx,
    .scratch_bytes = scratch_bytes_s8_amx,
    .run = linear_s8_amx,
    .scale = scale_s8,
    .decode_columns = decode_columns_s8,
    .add_outliers = add_outliers_s8,
    .multiply_outliers_bf16 = multiply_outliers_s8_amx,
    .backward = borrowed_backward_s8,
};
