/* borrow_s8.h - what an int8 table takes from the one of an earlier processor, LENDER_S8.
 *
 * Functions, because a field of another table is no constant to initialise a table with.
 */
#ifndef BNBQ_BORROW_S8_H
#define BNBQ_BORROW_S8_H

#include "../kernels.h"

static int64_t borrowed_quantize_s8(const float *x, int64_t count, float threshold, int8_t *q,
                                    float *absmax) {
    return LENDER_S8.quantize(x, count, threshold, q, absmax);
}

static void borrowed_dequantize_s8(const int8_t *q, int64_t count, float absmax, float *w) {
    LENDER_S8.dequantize(q, count, absmax, w);
}

static void borrowed_backward_s8(const float *gy, int64_t ldg, int64_t m, const int8_t *w,
                                 int64_t ldw, int64_t n, int64_t cols, float *gx, int64_t ldgx,
                                 void *scratch) {
    LENDER_S8.backward(gy, ldg, m, w, ldw, n, cols, gx, ldgx, scratch);
}

#endif
