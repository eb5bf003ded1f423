/* w4a8.h - what the kernels of the w4a8 family share: the int8 form of a codebook and of a block of
 * activations. reference.py (linear_4bit_int8) defines every bit.
 */
#ifndef BNBQ_W4A8_H
#define BNBQ_W4A8_H

#include "../kernels.h"

#include <math.h>

/* The codebook in steps of the result, as large as fits: code c stands for codes[c] * step. */
static inline float round_codebook(const float *codebook, int8_t codes[16]) {
    float least = codebook[0], greatest = codebook[0];
    for (int i = 1; i < 16; i++) {
        least = codebook[i] < least ? codebook[i] : least;
        greatest = codebook[i] > greatest ? codebook[i] : greatest;
    }
    const float up = 127.0f / greatest, down = 128.0f / -least, scale = up < down ? up : down;
    const float shift = 0x1.8p23f; /* to the nearest integer, ties to even */
    for (int i = 0; i < 16; i++)
        codes[i] = (int8_t)((codebook[i] * scale + shift) - shift);
    return 1.0f / scale;
}

/* One block of x to int8; returns its step, NaN if one of its elements is not finite. */
static inline float quantize_block(const bnbq_s8_kernels *s8, const float *x, int64_t count,
                                   int8_t *q) {
    float absmax;
    return s8->quantize(x, count, INFINITY, q, &absmax) > 0 ? NAN : absmax * (float)(1.0 / 127);
}

/* A packed form: the rows of x as int8, then the steps of their blocks, [m, k / block]. */
static inline size_t rows_bytes(int64_t block, int64_t m, int64_t k) {
    return (size_t)(m * k) + (size_t)(m * (k / block)) * sizeof(float);
}

static inline float *steps_of(const void *packed, int64_t m, int64_t k) {
    return (float *)((char *)packed + m * k);
}

/* The functions of a table for a block of x from those of its file: `bytes`, pack and run, whose
 * first argument is the block, and scratch_bytes. */
#define W4A8_FORM(block, bytes)                                                                    \
    static size_t packed_bytes_##block(int64_t m, int64_t k) {                                     \
        return bytes(block, m, k);                                                                 \
    }                                                                                              \
    static void pack_##block(const float *x, int64_t i, int64_t m, int64_t k, void *packed) {      \
        pack(block, x, i, m, k, packed);                                                           \
    }                                                                                              \
    static void run_##block(const void *packed, int64_t m, const bnbq_q4_rows *w, int64_t rows,    \
                            float *y, int64_t ldy, void *scratch) {                                \
        run(block, packed, m, w, rows, y, ldy, scratch);                                           \
    }
#define W4A8_FUNCTIONS(block)                                                                      \
    { packed_bytes_##block, pack_##block, scratch_bytes, run_##block }

#endif
