/* q4_scalar.c - the 4-bit family in plain C: short, obviously right, and what the tests compare
 * every other instruction set with. It follows reference.py line by line.
 */
#include "../float16.h"
#include "../kernels.h"

#include <assert.h>
#include <string.h>

#ifdef __AVX2__
#error "q4_scalar.c is baseline code: compile it without -mavx2 or -march"
#endif

/* Least divisor of a block: keeps the reciprocal finite, as bitsandbytes does. */
static const float tiny = 1e-38f;

static uint8_t encode(float x, const bnbq_format *format) {
    int below = 0;
    for (int i = 0; i < 15; i++)
        below += format->thresholds[i] < x;
    return format->order[below];
}

static uint8_t code_at(const uint8_t *qweight, int64_t i) {
    return i % 2 == 0 ? qweight[i / 2] >> 4 : qweight[i / 2] & 15;
}

static void store_code(uint8_t *qweight, int64_t i, uint8_t code) {
    if (i % 2 == 0)
        qweight[i / 2] = (uint8_t)(code << 4);
    else
        qweight[i / 2] |= code;
}

static float clip(float x) {
    return x < -1.0f ? -1.0f : x > 1.0f ? 1.0f : x;
}

static float value_at(const void *w, bnbq_dtype dtype, int64_t i) {
    switch (dtype) {
    case BNBQ_BF16: return bnbq_bf16_to_f32(((const uint16_t *)w)[i]);
    case BNBQ_F16: return bnbq_f16_to_f32(((const uint16_t *)w)[i]);
    default: return ((const float *)w)[i];
    }
}

static void quantize_q4_scalar(const void *w, bnbq_dtype dtype, int64_t count,
                               const bnbq_format *format, int64_t blocksize, uint8_t *qweight,
                               float *absmax) {
    assert(count >= 1 && bnbq_valid_blocksize(blocksize));
    for (int64_t start = 0; start < count; start += blocksize) {
        int64_t end = start + blocksize < count ? start + blocksize : count;
        uint32_t bits = 0; /* ordered like the magnitudes, with Inf and NaN on top */
        for (int64_t i = start; i < end; i++)
            if ((bnbq_bits(value_at(w, dtype, i)) & 0x7fffffff) > bits)
                bits = bnbq_bits(value_at(w, dtype, i)) & 0x7fffffff;
        float greatest = bnbq_float(bits), divisor = greatest < tiny ? tiny : greatest;
        float inverse = 1.0f / divisor;
        bool whole = end - start == blocksize;
        absmax[start / blocksize] = whole ? greatest : divisor;
        /* A whole block is multiplied, the short one divided: bitsandbytes' bytes. */
        for (int64_t i = start; i < end; i++) {
            float x = value_at(w, dtype, i);
            store_code(qweight, i, encode(clip(whole ? x * inverse : x / divisor), format));
        }
    }
    if (count % 2)
        store_code(qweight, count, encode(0.0f, format));
}

static void dequantize_q4_scalar(const uint8_t *qweight, const float *absmax, const float *codebook,
                                 int64_t count, int64_t blocksize, bnbq_dtype dtype, void *w) {
    for (int64_t i = 0; i < count; i++) {
        float value = codebook[code_at(qweight, i)] * absmax[i / blocksize];
        switch (dtype) {
        case BNBQ_BF16: ((uint16_t *)w)[i] = bnbq_f32_to_bf16(value); break;
        case BNBQ_F16: ((uint16_t *)w)[i] = bnbq_f32_to_f16(value); break;
        default: ((float *)w)[i] = value;
        }
    }
}

/* Packed form: the rows of x as they are. */
static size_t packed_bytes_q4_scalar(int64_t m, int64_t k) {
    return (size_t)(m * k) * sizeof(float);
}

static void pack_q4_scalar(const float *x, int64_t i, int64_t m, int64_t k, void *packed) {
    (void)m;
    memcpy((float *)packed + i * k, x, (size_t)k * sizeof(float));
}

static size_t scratch_bytes_q4_scalar(int64_t m, int64_t k) {
    (void)m;
    return (size_t)k * sizeof(float);
}

/* Sixteen partial sums: less rounding error than one, and baseline vector code for the compiler. */
static float dot(const float *x, const float *w, int64_t k) {
    float sums[16] = {0};
    for (int64_t i = 0; i < k; i += 16)
        for (int j = 0; j < 16; j++)
            sums[j] += x[i + j] * w[i + j];
    for (int width = 8; width > 0; width /= 2)
        for (int j = 0; j < width; j++)
            sums[j] += sums[j + width];
    return sums[0];
}

static void linear_q4_scalar(const void *packed, int64_t m, const bnbq_q4_rows *w, int64_t rows,
                             float *y, int64_t ldy, void *scratch) {
    const float *x = packed;
    float *row = scratch;
    assert(m >= 1 && m <= BNBQ_TILE_M && rows >= 1 && rows <= BNBQ_TILE_N && w->k % 32 == 0);
    for (int64_t n = 0; n < rows; n++) {
        dequantize_q4_scalar(w->qweight + n * (w->k / 2), w->absmax + n * (w->k / w->blocksize),
                             w->codebook, w->k, w->blocksize, BNBQ_F32, row);
        for (int64_t i = 0; i < m; i++)
            y[i * ldy + n] = dot(x + i * w->k, row, w->k);
    }
}

static void backward_q4_scalar(const float *gy, int64_t ldg, int64_t m, const bnbq_q4_rows *w,
                               int64_t n, int64_t k0, int64_t cols, float *gx, int64_t ldgx,
                               void *scratch) {
    float *row = scratch;
    assert(m >= 1 && m <= BNBQ_TILE_M && cols >= 1 && cols <= BNBQ_TILE_K && cols % 2 == 0);
    assert(k0 % 32 == 0 && k0 + cols <= w->k);
    for (int64_t i = 0; i < m; i++)
        for (int64_t c = 0; c < cols; c++)
            gx[i * ldgx + c] = 0.0f;
    for (int64_t r = 0; r < n; r++) {
        const uint8_t *qweight = w->qweight + r * (w->k / 2);
        const float *absmax = w->absmax + r * (w->k / w->blocksize);
        for (int64_t c = 0; c < cols; c++)
            row[c] = w->codebook[code_at(qweight, k0 + c)] * absmax[(k0 + c) / w->blocksize];
        for (int64_t i = 0; i < m; i++)
            for (int64_t c = 0; c < cols; c++)
                gx[i * ldgx + c] += gy[i * ldg + r] * row[c];
    }
}

const bnbq_q4_kernels bnbq_q4_scalar = {
    .isa = "scalar",
    .level = BNBQ_ISA_SCALAR,
    .needs = BNBQ_CPU_OF_THIS_FILE,
    .quantize = quantize_q4_scalar,
    .dequantize = dequantize_q4_scalar,
    .linear = {packed_bytes_q4_scalar, pack_q4_scalar, scratch_bytes_q4_scalar, linear_q4_scalar},
    .backward = backward_q4_scalar,
};
