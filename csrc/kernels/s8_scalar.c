/* s8_scalar.c - the int8 family in plain C: short, obviously right, and what the tests compare
 * every other instruction set with. It follows reference.py line by line.
 */
#include "../kernels.h"
#include "s8_epilogue.h"

#include <assert.h>
#include <math.h>
#include <string.h>

#ifdef __AVX2__
#error "s8_scalar.c is baseline code: compile it without -mavx2 or -march"
#endif

/* Least divisor of a row: 127 * (1 / 1e-36) is finite. */
static const float tiny = 1e-36f;

/* Nearest integer, ties to even, for |x| < 2^22: the sum has no bits left below 1. */
static float round_to_even(float x) {
    const float shift = 0x1.8p23f;
    return (x + shift) - shift;
}

static bool is_outlier(float x, float threshold) {
    return !(fabsf(x) < threshold); /* NaN is one; with a threshold of Inf so is Inf */
}

static int64_t quantize_s8_scalar(const float *x, int64_t count, float threshold, int8_t *q,
                                  float *absmax) {
    float greatest = 0.0f;
    int64_t outliers = 0;
    assert(threshold > 0);
    for (int64_t i = 0; i < count; i++) {
        if (is_outlier(x[i], threshold))
            outliers++;
        else if (fabsf(x[i]) > greatest)
            greatest = fabsf(x[i]);
    }
    float scale = 127.0f * (1.0f / (greatest > tiny ? greatest : tiny));
    for (int64_t i = 0; i < count; i++)
        q[i] = is_outlier(x[i], threshold) ? 0 : (int8_t)round_to_even(x[i] * scale);
    *absmax = greatest;
    return outliers;
}

static void dequantize_s8_scalar(const int8_t *q, int64_t count, float absmax, float *w) {
    for (int64_t i = 0; i < count; i++)
        w[i] = ((float)q[i] * absmax) * (float)(1.0 / 127);
}

/* Packed form: the rows of x as they are. */
static size_t packed_bytes_s8_scalar(int64_t m, int64_t k) {
    return (size_t)(m * k);
}

static void pack_s8_scalar(const int8_t *x, int64_t i, int64_t m, int64_t k, void *packed) {
    (void)m;
    memcpy((int8_t *)packed + i * k, x, (size_t)k);
}

static size_t scratch_bytes_s8_scalar(int64_t m, int64_t k) {
    (void)m;
    (void)k;
    return 0;
}

static void linear_s8_scalar(const void *packed, int64_t m, const int8_t *w, int64_t ldw,
                             int64_t rows, int64_t k, int32_t *y, int64_t ldy, void *scratch) {
    (void)scratch;
    const int8_t *x = packed;
    assert(m >= 1 && m <= BNBQ_TILE_M && rows >= 1 && rows <= BNBQ_TILE_N);
    assert(k >= 1 && k <= BNBQ_MAX_K_S8);
    for (int64_t i = 0; i < m; i++) {
        for (int64_t n = 0; n < rows; n++) {
            int32_t sum = 0;
            for (int64_t c = 0; c < k; c++)
                sum += x[i * k + c] * w[n * ldw + c];
            y[i * ldy + n] = sum;
        }
    }
}

static void backward_s8_scalar(const float *gy, int64_t ldg, int64_t m, const int8_t *w,
                               int64_t ldw, int64_t n, int64_t cols, float *gx, int64_t ldgx,
                               void *scratch) {
    float *row = scratch;
    assert(m >= 1 && m <= BNBQ_TILE_M && cols >= 1 && cols <= BNBQ_TILE_K);
    for (int64_t i = 0; i < m; i++)
        for (int64_t c = 0; c < cols; c++)
            gx[i * ldgx + c] = 0.0f;
    for (int64_t r = 0; r < n; r++) {
        for (int64_t c = 0; c < cols; c++)
            row[c] = w[r * ldw + c];
        for (int64_t i = 0; i < m; i++)
            for (int64_t c = 0; c < cols; c++)
                gx[i * ldgx + c] += gy[i * ldg + r] * row[c];
    }
}

const bnbq_s8_kernels bnbq_s8_scalar = {
    .isa = "scalar",
    .level = BNBQ_ISA_SCALAR,
    .needs = BNBQ_CPU_OF_THIS_FILE,
    .quantize = quantize_s8_scalar,
    .dequantize = dequantize_s8_scalar,
    .packed_bytes = packed_bytes_s8_scalar,
    .pack = pack_s8_scalar,
    .scratch_bytes = scratch_bytes_s8_scalar,
    .run = linear_s8_scalar,
    .scale = scale_s8,
    .decode_columns = decode_columns_s8,
    .add_outliers = add_outliers_s8,
    .backward = backward_s8_scalar,
};
