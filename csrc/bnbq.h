/* bnbq.h - the C API of the core: dtypes, tensor views, status codes, one function per operation.
 *
 * Shapes mean one thing everywhere:  x[m, k]   weight[n, k]   y[m, n]
 *   m  rows of activations (all leading dimensions of x flattened)
 *   n  output features, rows of the weight
 *   k  input features, columns of the weight
 *
 * The core knows nothing of Python. It never prints, never exits; every failure is a bnbq_status
 * and the caller's outputs are then unspecified, but nothing else has changed.
 */
#ifndef BNBQ_H
#define BNBQ_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef enum bnbq_dtype {
    BNBQ_F32,
    BNBQ_BF16,
    BNBQ_F16,
    BNBQ_U8,
    BNBQ_I8,
} bnbq_dtype;

static inline size_t bnbq_dtype_size(bnbq_dtype dtype) {
    return dtype == BNBQ_F32 ? 4 : dtype == BNBQ_U8 || dtype == BNBQ_I8 ? 1 : 2;
}

typedef enum bnbq_status {
    BNBQ_OK = 0,
    BNBQ_NO_MEMORY,    /* scratch could not be allocated */
    BNBQ_NOT_FINITE,   /* a weight is NaN or Inf; the flat index of the first one is reported */
    BNBQ_DEVICE_ERROR, /* a GPU reported one; bnbq_cuda.h */
} bnbq_status;

enum { BNBQ_MAX_DIMS = 8 };

/* A borrowed view. Strides count elements, may be zero or negative, never bytes. The fronts see
 * the leading dimensions flattened: "row i" of [..., c] is the i-th in row-major order. */
typedef struct bnbq_tensor {
    void *data;
    bnbq_dtype dtype;
    int ndim; /* 1..BNBQ_MAX_DIMS */
    int64_t shape[BNBQ_MAX_DIMS];
    int64_t strides[BNBQ_MAX_DIMS];
} bnbq_tensor;

struct bnbq_format; /* formats.h */

/* Block scales of a 4-bit weight. Plain: absmax holds f32. Double quantised: codes, absmax2 and
 * offset describe absmax[i] = dynamic_map[codes[i]] * absmax2[i / 256] + offset[0]. Exactly one of
 * absmax and codes is not NULL. */
typedef struct bnbq_absmax {
    const float *absmax;
    const uint8_t *codes;
    const float *absmax2;
    const float *offset;
} bnbq_absmax;

/* A packed 4-bit weight [n, k]: element j of the flattened weight is the high nibble of byte j/2
 * when j is even and the low nibble when j is odd; blocks of `blocksize` run over the flattened
 * weight, so when k % blocksize != 0 a block may cross rows and a row may start mid-byte. */
typedef struct bnbq_weight4 {
    const uint8_t *qweight;
    bnbq_absmax absmax;
    const struct bnbq_format *format;
    int64_t n, k;
    int64_t blocksize;
} bnbq_weight4;

/* An int8 weight [n, k]. blocksize 0: absmax[n]. Otherwise blocks of `blocksize` columns restart
 * at every row, the last one short: absmax[n, ceil(k / blocksize)]. */
typedef struct bnbq_weight8 {
    const int8_t *qweight;
    const float *absmax;
    int64_t n, k;
    int64_t blocksize;
} bnbq_weight8;

/* quantize.c. `w` may have any float dtype and any strides; its elements are taken in row-major
 * order. On BNBQ_NOT_FINITE *bad is the flat index of the first NaN or Inf. */
bnbq_status bnbq_quantize_4bit(const bnbq_tensor *w, const struct bnbq_format *format,
                               int64_t blocksize, uint8_t *qweight, float *absmax, int64_t *bad);
bnbq_status bnbq_dequantize_4bit(const bnbq_weight4 *w, const bnbq_tensor *out);
/* Second level of double quantisation, in blocks of 256; offset is the mean of absmax.
 * BNBQ_NOT_FINITE when a scale is NaN or Inf. */
bnbq_status bnbq_quantize_absmax(const float *absmax, int64_t count, uint8_t *codes, float *absmax2,
                                 float *offset);
/* absmax[start .. start+count) as f32, from either form. */
void bnbq_load_absmax(const bnbq_absmax *absmax, int64_t start, int64_t count, float *out);
bnbq_status bnbq_quantize_8bit(const bnbq_tensor *w, int64_t blocksize, int8_t *qweight,
                               float *absmax, int64_t *bad);
bnbq_status bnbq_dequantize_8bit(const bnbq_weight8 *w, const bnbq_tensor *out);

/* linear_q4.c. y = round(x) . dequant(W)^T + bias, where x[..., k] is first rounded to
 * `compute_dtype` (a float dtype) and the sum is kept in fp32; y[..., n] may have another dtype
 * than x. bias[n] may be NULL, of any float dtype and stride. int8_activations: x is then rounded
 * to int8 too, unless blocks cross rows. Backward: gx[..., k] = gy . W. */
bnbq_status bnbq_linear_4bit(const bnbq_tensor *x, const bnbq_weight4 *w, const bnbq_tensor *bias,
                             bnbq_dtype compute_dtype, bool int8_activations, const bnbq_tensor *y);
bnbq_status bnbq_linear_4bit_backward(const bnbq_tensor *gy, const bnbq_weight4 *w,
                                      bnbq_dtype compute_dtype, const bnbq_tensor *gx);

/* linear_s8.c, linear_s8_backward.c: LLM.int8(). A column of x with |x| >= threshold (or NaN, Inf)
 * in any row of the batch is an outlier column: it is multiplied in float with the dequantised
 * weight, which is rounded to bf16 where that is faster if x is bf16 and one column in 16 or more
 * is an outlier. With batch invariance on (kernels.h) each row has outlier elements of its own
 * instead, in fp32. The rest of each row is quantised by its own absmax; the int8 product is exact
 * in int32. threshold 0: no outliers but NaN and Inf, and those per row. */
bnbq_status bnbq_linear_8bit(const bnbq_tensor *x, const bnbq_weight8 *w, const bnbq_tensor *bias,
                             float threshold, const bnbq_tensor *y);
bnbq_status bnbq_linear_8bit_backward(const bnbq_tensor *gy, const bnbq_weight8 *w,
                                      const bnbq_tensor *gx);

/* Rows of activations by expert: expert e has the rows [ends[e - 1], ends[e]), the first from 0;
 * `ends` ascends. Rows from the last end on have no expert, and their results are zero. */
typedef struct bnbq_experts {
    int64_t count; /* at least 1 */
    const int64_t *ends;
} bnbq_experts;

/* linear_experts.c: the products above with a weight for each expert, of one shape and format. `w`
 * is the first one; the tensors of the others follow its own without gaps, those of double
 * quantisation too. x[m, k], y[m, n] and bias[count, n] are matrices. */
bnbq_status bnbq_linear_4bit_experts(const bnbq_tensor *x, const bnbq_weight4 *w,
                                     const bnbq_experts *experts, const bnbq_tensor *bias,
                                     bnbq_dtype compute_dtype, bool int8_activations,
                                     const bnbq_tensor *y);
bnbq_status bnbq_linear_4bit_experts_backward(const bnbq_tensor *gy, const bnbq_weight4 *w,
                                              const bnbq_experts *experts, bnbq_dtype compute_dtype,
                                              const bnbq_tensor *gx);
bnbq_status bnbq_linear_8bit_experts(const bnbq_tensor *x, const bnbq_weight8 *w,
                                     const bnbq_experts *experts, const bnbq_tensor *bias,
                                     float threshold, const bnbq_tensor *y);
bnbq_status bnbq_linear_8bit_experts_backward(const bnbq_tensor *gy, const bnbq_weight8 *w,
                                              const bnbq_experts *experts, const bnbq_tensor *gx);

#endif
