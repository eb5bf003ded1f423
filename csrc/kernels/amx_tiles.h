/* amx_tiles.h - the tile instructions of Intel AMX, and the 2 x 2 block that both AMX kernels use.
 *
 * Eight registers tmm0..tmm7 of up to 16 rows x 64 bytes. One instruction multiplies two of them:
 *     tdpbf16ps  C[r][c] += sum over p < 16 of A[r][2p, 2p+1] . B[p][2c, 2c+1]       bf16 -> fp32
 *     tdpbssd    C[r][c] += sum over p < 16 of A[r][4p .. 4p+3] . B[p][4c .. 4c+3]   int8 -> int32
 * Rows of W go into A as they lie in memory; x is packed into B, one row of x per column; so C is
 * a block of y transposed and amx_store_transposed() turns it round.
 *
 * Sources: Intel SDM volume 1 chapter 18 and volume 2 (LDTILECFG .. TDPBSSD: the pseudocode that
 * the emulation follows line by line, and exception classes AMX-E1 to AMX-E6 for its checks).
 *
 * With BNBQ_AMX_EMULATED the same names are plain C on a thread-local array of tiles and wrong
 * use aborts, where the processor would raise #UD or #GP: correctness can be shown on machines
 * without AMX, under sanitizers too. tests/ compile the kernels that way.
 *
 * History: gcc 12's intrinsics for tile loads lack a memory clobber and its config load declares
 * 8 bytes of its 64, so stores before them may be dropped or moved (seen as #GP in other
 * projects): the statements below are our own. Other libraries in the process reconfigure and
 * release tiles, so every kernel call configures and releases for itself.
 */
#ifndef BNBQ_AMX_TILES_H
#define BNBQ_AMX_TILES_H

#include "../cpu.h"
#include "lanes_avx512.h"

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

typedef struct amx_config {
    _Alignas(64) uint8_t palette;
    uint8_t start_row;
    uint8_t reserved[14];
    uint16_t colsb[16]; /* bytes per row; [8..] must be zero */
    uint8_t rows[16];
} amx_config;

_Static_assert(sizeof(amx_config) == 64, "LDTILECFG reads 64 bytes");

#ifdef BNBQ_AMX_EMULATED

#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>

typedef struct amx_emulated_tile {
    int rows, colsb;
    union {
        uint8_t u8[16][64];
        int8_t i8[16][64];
        uint16_t bf16[16][32];
        int32_t i32[16][16];
        float f32[16][16];
    };
} amx_emulated_tile;

static _Thread_local struct {
    bool configured;
    amx_emulated_tile tile[8];
} amx_emulated;

static inline void amx_require(bool condition, const char *what) {
    if (!condition) {
        fprintf(stderr, "AMX emulation: %s\n", what);
        abort();
    }
}

static inline amx_emulated_tile *amx_emulated_get(int tile) {
    amx_require(amx_emulated.configured, "#UD: tiles are not configured");
    amx_require(tile >= 0 && tile < 8, "#UD: no such tile");
    amx_emulated_tile *t = &amx_emulated.tile[tile];
    amx_require(t->rows > 0, "#UD: this tile is not in the configuration");
    amx_require(t->colsb % 4 == 0, "#UD: bytes per row are not a multiple of 4");
    return t;
}

static inline void amx_configure(const amx_config *c) {
    memset(&amx_emulated, 0, sizeof amx_emulated);
    if (c->palette == 0)
        return;
    amx_require(c->palette == 1 && c->start_row == 0, "#GP: palette or start row");
    for (int i = 0; i < 14; i++)
        amx_require(c->reserved[i] == 0, "#GP: reserved bytes");
    for (int i = 8; i < 16; i++)
        amx_require(c->colsb[i] == 0 && c->rows[i] == 0, "#GP: more tiles than the palette has");
    for (int i = 0; i < 8; i++) {
        amx_require(c->rows[i] <= 16 && c->colsb[i] <= 64, "#GP: tile too large");
        amx_require((c->rows[i] == 0) == (c->colsb[i] == 0), "#GP: half-empty tile");
        amx_emulated.tile[i].rows = c->rows[i];
        amx_emulated.tile[i].colsb = c->colsb[i];
    }
    amx_emulated.configured = true;
}

static inline void amx_release(void) {
    memset(&amx_emulated, 0, sizeof amx_emulated);
}

static inline void amx_zero(int tile) {
    memset(amx_emulated_get(tile)->u8, 0, 1024);
}

static inline void amx_load(int tile, const void *base, int64_t stride) {
    amx_emulated_tile *t = amx_emulated_get(tile);
    memset(t->u8, 0, 1024);
    for (int r = 0; r < t->rows; r++)
        memcpy(t->u8[r], (const uint8_t *)base + r * stride, t->colsb);
}

static inline void amx_store(int tile, void *base, int64_t stride) {
    const amx_emulated_tile *t = amx_emulated_get(tile);
    for (int r = 0; r < t->rows; r++)
        memcpy((uint8_t *)base + r * stride, t->u8[r], t->colsb);
}

static inline void amx_emulated_check(const amx_emulated_tile *c, const amx_emulated_tile *a,
                                      const amx_emulated_tile *b) {
    amx_require(c != a && c != b && a != b, "#UD: operands must be three tiles");
    amx_require(c->rows == a->rows && c->colsb == b->colsb && a->colsb / 4 == b->rows,
                "#UD: shapes do not match");
}

/* Whatever was outside the configured shape of the destination becomes zero. */
static inline void amx_emulated_zero_rest(amx_emulated_tile *c) {
    for (int r = 0; r < 16; r++) {
        int kept = r < c->rows ? c->colsb : 0;
        memset(c->u8[r] + kept, 0, 64 - kept);
    }
}

static inline float amx_emulated_float(uint32_t bits) {
    float value;
    bits = bits & 0x7f800000 ? bits : bits & 0x80000000; /* denormals are zero */
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline float amx_emulated_flush(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return amx_emulated_float(bits);
}

static inline void amx_dp_bf16(int c_tile, int a_tile, int b_tile) {
    amx_emulated_tile *c = amx_emulated_get(c_tile);
    const amx_emulated_tile *a = amx_emulated_get(a_tile), *b = amx_emulated_get(b_tile);
    amx_emulated_check(c, a, b);
    for (int r = 0; r < c->rows; r++) {
        float even[16] = {0}, odd[16] = {0};
        for (int p = 0; p < b->rows; p++) {
            float a0 = amx_emulated_float((uint32_t)a->bf16[r][2 * p] << 16);
            float a1 = amx_emulated_float((uint32_t)a->bf16[r][2 * p + 1] << 16);
            for (int i = 0; i < c->colsb / 4; i++) {
                float b0 = amx_emulated_float((uint32_t)b->bf16[p][2 * i] << 16);
                float b1 = amx_emulated_float((uint32_t)b->bf16[p][2 * i + 1] << 16);
                even[i] = amx_emulated_flush(fmaf(a0, b0, even[i]));
                odd[i] = amx_emulated_flush(fmaf(a1, b1, odd[i]));
            }
        }
        for (int i = 0; i < c->colsb / 4; i++) {
            float sum = amx_emulated_flush(even[i] + odd[i]);
            c->f32[r][i] = amx_emulated_flush(amx_emulated_flush(c->f32[r][i]) + sum);
        }
    }
    amx_emulated_zero_rest(c);
}

static inline void amx_dp_s8(int c_tile, int a_tile, int b_tile) {
    amx_emulated_tile *c = amx_emulated_get(c_tile);
    const amx_emulated_tile *a = amx_emulated_get(a_tile), *b = amx_emulated_get(b_tile);
    amx_emulated_check(c, a, b);
    for (int r = 0; r < c->rows; r++)
        for (int p = 0; p < b->rows; p++)
            for (int i = 0; i < c->colsb / 4; i++)
                for (int j = 0; j < 4; j++)
                    c->i32[r][i] += a->i8[r][4 * p + j] * b->i8[p][4 * i + j];
    amx_emulated_zero_rest(c);
}

#else

/* `needs` of the tables must name AMX, or the registry would hand them to any processor. */
_Static_assert(BNBQ_HAVE_AMX, "compile with -mamx-tile -mamx-int8 -mamx-bf16, "
                              "or with -DBNBQ_AMX_EMULATED");

/* Macros, since a tile's number is part of the instruction. Every statement is volatile (none
 * moves past another) and those that touch memory say so, which is also the compiler barrier
 * between ordinary stores and the tile loads that read them. */
#define AMX_QUOTE(tile) #tile
#define AMX_TMM(tile) "%%tmm" AMX_QUOTE(tile)

static inline void amx_configure(const amx_config *config) {
    __asm__ volatile("ldtilecfg %0" ::"m"(*config) : "memory");
}

static inline void amx_release(void) {
    __asm__ volatile("tilerelease" ::: "memory");
}

#define amx_zero(tile) __asm__ volatile("tilezero " AMX_TMM(tile)::)
#define amx_load(tile, base, stride)                                                               \
    __asm__ volatile("tileloadd (%0,%1,1), " AMX_TMM(tile)::"r"((const void *)(base)),             \
                     "r"((int64_t)(stride))                                                        \
                     : "memory")
#define amx_store(tile, base, stride)                                                              \
    __asm__ volatile("tilestored " AMX_TMM(tile) ", (%0,%1,1)" ::"r"((void *)(base)),              \
                     "r"((int64_t)(stride))                                                        \
                     : "memory")
#define amx_dp_bf16(c, a, b)                                                                       \
    __asm__ volatile("tdpbf16ps " AMX_TMM(b) ", " AMX_TMM(a) ", " AMX_TMM(c)::)
#define amx_dp_s8(c, a, b) __asm__ volatile("tdpbssd " AMX_TMM(b) ", " AMX_TMM(a) ", " AMX_TMM(c)::)

#endif

/* The block: A0, A1 (16 rows of W each) times B0, B1 (16 rows of x each) into Cab. 2 x 2 gives
 * each loaded tile two uses, as many as eight registers allow. */
#define AMX_C00 0
#define AMX_C01 1
#define AMX_C10 2
#define AMX_C11 3
#define AMX_A0 4
#define AMX_A1 5
#define AMX_B0 6
#define AMX_B1 7

enum { AMX_TILE_BYTES = 1024, AMX_PANEL = 16 /* rows of W in A, rows of x in B */ };

/* Bytes per row of the B tiles of x[m]. A few rows of x get narrow tiles: packed x must stay in L1
 * beside the stream of weights (128 KB -> 32 KB of x halved the time at m = 1). */
static inline int64_t amx_width(int64_t m) {
    return m <= 4 ? 16 : m <= 8 ? 32 : 64;
}

/* Configure the block for rows0 + rows1 rows of W (rows1 may be 0) and B tiles of `width` bytes. */
static inline void amx_configure_block(int64_t rows0, int64_t rows1, int64_t width) {
    amx_config config;
    memset(&config, 0, sizeof config);
    config.palette = 1;
    const uint8_t rows[8] = {
        [AMX_C00] = rows0, [AMX_C01] = rows0, [AMX_C10] = rows1, [AMX_C11] = rows1,
        [AMX_A0] = rows0,  [AMX_A1] = rows1,  [AMX_B0] = 16,     [AMX_B1] = 16,
    };
    for (int i = 0; i < 8; i++) {
        config.rows[i] = rows[i];
        if (rows[i])
            config.colsb[i] = i == AMX_A0 || i == AMX_A1 ? 64 : width;
    }
    amx_configure(&config);
}

/* The tiles Cab that are in use: of two panels of W (tall) or one, by two of x (wide) or one. */
static inline void amx_zero_block(int wide, int tall) {
    amx_zero(AMX_C00);
    if (wide)
        amx_zero(AMX_C01);
    if (tall)
        amx_zero(AMX_C10);
    if (wide && tall)
        amx_zero(AMX_C11);
}

static inline void amx_store_block(int wide, int tall, uint8_t *c) {
    amx_store(AMX_C00, c, 64);
    if (wide)
        amx_store(AMX_C01, c + AMX_TILE_BYTES, 64);
    if (tall)
        amx_store(AMX_C10, c + 2 * AMX_TILE_BYTES, 64);
    if (wide && tall)
        amx_store(AMX_C11, c + 3 * AMX_TILE_BYTES, 64);
}

/* y[c * ldy + r] = tile[r][c] for r < rows, c < cols; 32-bit elements, 64 bytes per row of tile. */
static inline void amx_store_transposed(const void *tile, int64_t rows, int64_t cols, void *y,
                                        int64_t ldy) {
    __m512i t[16];
    for (int r = 0; r < 16; r++)
        t[r] = _mm512_maskz_loadu_epi32(r < rows ? 0xffff : 0, (const uint8_t *)tile + 64 * r);
    transpose16(t);
    __mmask16 mask = (__mmask16)((1u << rows) - 1);
    for (int64_t c = 0; c < cols; c++)
        _mm512_mask_storeu_epi32((int32_t *)y + c * ldy, mask, t[c]);
}

#endif
