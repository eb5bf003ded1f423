/* quantize_q4.h - the quantize slot of a 4-bit table, from quantize_blocks of the including file.
 */
#ifndef BNBQ_QUANTIZE_Q4_H
#define BNBQ_QUANTIZE_Q4_H

#include "../kernels.h"

#include <assert.h>

static const float tiny = 1e-38f; /* least divisor: the reciprocal stays finite */

/* Whole blocks, and a multiple of QUANTIZE_UNIT elements; `dtype` is a constant of the caller. */
BNBQ_INLINE void quantize_blocks(const void *w, const bnbq_dtype dtype, int64_t count,
                                 const bnbq_format *format, int64_t blocksize, uint8_t *qweight,
                                 float *absmax);

static void quantize_q4(const void *w, bnbq_dtype dtype, int64_t count, const bnbq_format *format,
                        int64_t blocksize, uint8_t *qweight, float *absmax) {
    assert(count >= 1 && bnbq_valid_blocksize(blocksize));
    const int64_t unit = blocksize < QUANTIZE_UNIT ? QUANTIZE_UNIT : blocksize;
    const int64_t whole = count - count % unit;
    switch (dtype) {
    case BNBQ_BF16: quantize_blocks(w, BNBQ_BF16, whole, format, blocksize, qweight, absmax); break;
    case BNBQ_F16: quantize_blocks(w, BNBQ_F16, whole, format, blocksize, qweight, absmax); break;
    default: quantize_blocks(w, BNBQ_F32, whole, format, blocksize, qweight, absmax);
    }
    /* The short block at the end of a weight has its own rule (it is divided, not multiplied). */
    if (whole < count)
        bnbq_q4_scalar.quantize((const char *)w + whole * (int64_t)bnbq_dtype_size(dtype), dtype,
                                count - whole, format, blocksize, qweight + whole / 2,
                                absmax + whole / blocksize);
}

#endif
