/* borrow_q4.h - what a 4-bit table takes from the one of an earlier processor, LENDER_Q4.
 *
 * Functions, because a field of another table is no constant to initialise a table with.
 */
#ifndef BNBQ_BORROW_Q4_H
#define BNBQ_BORROW_Q4_H

#include "../kernels.h"

static void borrowed_quantize_q4(const void *w, bnbq_dtype dtype, int64_t count,
                                 const bnbq_format *format, int64_t blocksize, uint8_t *qweight,
                                 float *absmax) {
    LENDER_Q4.quantize(w, dtype, count, format, blocksize, qweight, absmax);
}

static void borrowed_dequantize_q4(const uint8_t *qweight, const float *absmax,
                                   const float *codebook, int64_t count, int64_t blocksize,
                                   bnbq_dtype dtype, void *w) {
    LENDER_Q4.dequantize(qweight, absmax, codebook, count, blocksize, dtype, w);
}

static size_t borrowed_packed_bytes_q4(int64_t m, int64_t k) {
    return LENDER_Q4.linear.packed_bytes(m, k);
}

static void borrowed_pack_q4(const float *x, int64_t i, int64_t m, int64_t k, void *packed) {
    LENDER_Q4.linear.pack(x, i, m, k, packed);
}

static size_t borrowed_scratch_bytes_q4(int64_t m, int64_t k) {
    return LENDER_Q4.linear.scratch_bytes(m, k);
}

static void borrowed_run_q4(const void *packed, int64_t m, const bnbq_q4_rows *w, int64_t rows,
                            float *y, int64_t ldy, void *scratch) {
    LENDER_Q4.linear.run(packed, m, w, rows, y, ldy, scratch);
}

static void borrowed_backward_q4(const float *gy, int64_t ldg, int64_t m, const bnbq_q4_rows *w,
                                 int64_t n, int64_t k0, int64_t cols, float *gx, int64_t ldgx,
                                 void *scratch) {
    LENDER_Q4.backward(gy, ldg, m, w, n, k0, cols, gx, ldgx, scratch);
}

#define BORROWED_LINEAR_Q4                                                                         \
    { borrowed_packed_bytes_q4, borrowed_pack_q4, borrowed_scratch_bytes_q4, borrowed_run_q4 }

#endif
