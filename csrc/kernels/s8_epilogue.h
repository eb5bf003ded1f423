/* s8_epilogue.h - what follows the int8 product: scales and the outliers' float product. Plain C,
 * compiled by each table with its own flags.
 *
 * Products are rounded before they are added (the build has -ffp-contract=off), so that every table
 * gives the same bits.
 */
#ifndef BNBQ_S8_EPILOGUE_H
#define BNBQ_S8_EPILOGUE_H

#include "../kernels.h"

#include <string.h>

#if defined(__AVX512F__)
#define BNBQ_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define BNBQ_VECTOR_BYTES 32
#else
#define BNBQ_VECTOR_BYTES 16
#endif

static void scale_s8(const int32_t *restrict sums, int64_t rows, float x_scale,
                     const float *restrict w_scale, float *restrict y) {
    for (int64_t j = 0; j < rows; j++)
        y[j] += (float)sums[j] * (x_scale * w_scale[j]);
}

/* The bytes of several columns first, row by row as they lie in memory; then their values. */
static void decode_columns_s8(const int8_t *w, int64_t ldw, int64_t rows, const int64_t *columns,
                              int64_t count, const float *restrict absmax,
                              float *restrict decoded) {
    int8_t codes[BNBQ_OUTLIER_COLUMNS][BNBQ_TILE_N];
    for (int64_t j = 0; j < rows; j++)
#pragma GCC unroll 4
        for (int64_t c = 0; c < count; c++)
            codes[c][j] = w[j * ldw + columns[c]];
    for (int64_t c = 0; c < count; c++)
        for (int64_t j = 0; j < rows; j++)
            decoded[c * BNBQ_TILE_N + j] = ((float)codes[c][j] * absmax[j]) * (float)(1.0 / 127);
}

typedef float bnbq_lanes __attribute__((vector_size(BNBQ_VECTOR_BYTES), may_alias));

/* `rows` rows of sums, `vectors` vectors wide: their accumulators stay in registers. */
BNBQ_INLINE void add_outlier_rows(const int rows, const int vectors, const float *value,
                                  int64_t ldv, const int64_t *place, int64_t begin, int64_t count,
                                  const float *decoded, float *sums) {
    enum { LANES = BNBQ_VECTOR_BYTES / sizeof(float) };
    for (int64_t j = 0; j < BNBQ_TILE_N; j += vectors * LANES) {
        bnbq_lanes total[4][8];
#pragma GCC unroll 4
        for (int i = 0; i < rows; i++)
#pragma GCC unroll 8
            for (int v = 0; v < vectors; v++)
                total[i][v] = *(bnbq_lanes *)(sums + i * BNBQ_TILE_N + j + v * LANES);
        for (int64_t e = 0; e < count; e++) {
            const float *w = decoded + (place ? place[e] - begin : e) * BNBQ_TILE_N + j;
#pragma GCC unroll 4
            for (int i = 0; i < rows; i++)
#pragma GCC unroll 8
                for (int v = 0; v < vectors; v++)
                    total[i][v] += value[i * ldv + e] * *(const bnbq_lanes *)(w + v * LANES);
        }
#pragma GCC unroll 4
        for (int i = 0; i < rows; i++)
#pragma GCC unroll 8
            for (int v = 0; v < vectors; v++)
                *(bnbq_lanes *)(sums + i * BNBQ_TILE_N + j + v * LANES) = total[i][v];
    }
}

static void add_outliers_s8(const float *value, int64_t ldv, int64_t m, const int64_t *place,
                            int64_t begin, int64_t count, const float *decoded, float *sums) {
    enum { REGISTERS = BNBQ_VECTOR_BYTES == 64 ? 32 : 16 };
    int64_t i = 0;
    for (; !place && i + 4 <= m; i += 4)
        add_outlier_rows(4, REGISTERS / 8, value + i * ldv, ldv, NULL, begin, count, decoded,
                         sums + i * BNBQ_TILE_N);
    for (; i < m; i++)
        add_outlier_rows(1, BNBQ_VECTOR_BYTES == 64 ? 4 : 8, value + i * ldv, ldv, place, begin,
                         count, decoded, sums + i * BNBQ_TILE_N);
}

#endif
