/* w4a8_scalar.c - int8 activations times 4-bit weights in plain C: short, obviously right, and what
 * the tests compare every other instruction set with, bit for bit. It follows reference.py.
 */
#include "w4a8.h"

#include <assert.h>

#ifdef __AVX2__
#error "w4a8_scalar.c is baseline code: compile it without -mavx2 or -march"
#endif

static void pack(int64_t block, const float *x, int64_t i, int64_t m, int64_t k, void *packed) {
    int8_t *q = (int8_t *)packed + i * k;
    float *steps = steps_of(packed, m, k) + i * (k / block);
    assert(i >= 0 && i < m && m <= BNBQ_TILE_M && k % block == 0);
    for (int64_t c = 0; c < k; c += block)
        steps[c / block] = quantize_block(&bnbq_s8_scalar, x + c, block, q + c);
}

static int32_t dot(const int8_t *x, const int8_t *w, int64_t count) {
    int32_t sum = 0;
    for (int64_t i = 0; i < count; i++)
        sum += x[i] * w[i];
    return sum;
}

static void run(int64_t block, const void *packed, int64_t m, const bnbq_q4_rows *w, int64_t rows,
                float *y, int64_t ldy, int8_t *row) {
    const int64_t k = w->k;
    int8_t codes[16];
    const float step = round_codebook(w->codebook, codes);
    assert(m >= 1 && m <= BNBQ_TILE_M && rows >= 1 && rows <= BNBQ_TILE_N && ldy >= rows);
    assert(k % w->blocksize == 0 && w->blocksize % block == 0);
    for (int64_t n = 0; n < rows; n++) {
        const uint8_t *qweight = w->qweight + n * (k / 2);
        const float *absmax = w->absmax + n * (k / w->blocksize);
        for (int64_t c = 0; c < k; c += 2) {
            row[c] = codes[qweight[c / 2] >> 4];
            row[c + 1] = codes[qweight[c / 2] & 15];
        }
        for (int64_t i = 0; i < m; i++) {
            const int8_t *q = (const int8_t *)packed + i * k;
            const float *steps = steps_of(packed, m, k) + i * (k / block);
            float total = 0.0f;
            for (int64_t c = 0; c < k; c += block)
                total += (float)dot(q + c, row + c, block) *
                         (steps[c / block] * (absmax[c / w->blocksize] * step));
            y[i * ldy + n] = total;
        }
    }
}

static size_t scratch_bytes(int64_t m, int64_t k) {
    (void)m;
    return (size_t)k;
}

W4A8_FORM(32, rows_bytes)
W4A8_FORM(64, rows_bytes)

const bnbq_w4a8_kernels bnbq_w4a8_scalar = {
    .isa = "scalar",
    .level = BNBQ_ISA_SCALAR,
    .needs = BNBQ_CPU_OF_THIS_FILE,
    .blocks32 = W4A8_FUNCTIONS(32),
    .blocks64 = W4A8_FUNCTIONS(64),
};
