/* stub.c - the GPU half of a build without CUDA: it says so. */
#include "bnbq_cuda.h"

#include <string.h>

const char *bnbq_cuda_toolkit(void) {
    return NULL;
}

const char *bnbq_cuda_archs(void) {
    return "";
}

static bnbq_status refuse(bnbq_cuda_call *call) {
    static const char why[] = "this build of bnbq has no CUDA";
    memcpy(call->error, why, sizeof why);
    return BNBQ_DEVICE_ERROR;
}

bnbq_status bnbq_cuda_capability(bnbq_cuda_call *call, int *capability) {
    (void)capability;
    return refuse(call);
}

bnbq_status bnbq_cuda_quantize_4bit(bnbq_cuda_call *call, const bnbq_tensor *w,
                                    const struct bnbq_format *format, int64_t blocksize,
                                    uint8_t *qweight, float *absmax) {
    (void)w, (void)format, (void)blocksize, (void)qweight, (void)absmax;
    return refuse(call);
}

bnbq_status bnbq_cuda_dequantize_4bit(bnbq_cuda_call *call, const bnbq_weight4 *w,
                                      const bnbq_tensor *out) {
    (void)w, (void)out;
    return refuse(call);
}

bnbq_status bnbq_cuda_quantize_absmax(bnbq_cuda_call *call, const float *absmax, int64_t count,
                                      uint8_t *codes, float *absmax2, float *offset) {
    (void)absmax, (void)count, (void)codes, (void)absmax2, (void)offset;
    return refuse(call);
}

bnbq_status bnbq_cuda_dequantize_absmax(bnbq_cuda_call *call, const bnbq_absmax *absmax,
                                        int64_t count, float *out) {
    (void)absmax, (void)count, (void)out;
    return refuse(call);
}

bnbq_status bnbq_cuda_quantize_8bit(bnbq_cuda_call *call, const bnbq_tensor *w, int64_t blocksize,
                                    int8_t *qweight, float *absmax) {
    (void)w, (void)blocksize, (void)qweight, (void)absmax;
    return refuse(call);
}

bnbq_status bnbq_cuda_dequantize_8bit(bnbq_cuda_call *call, const bnbq_weight8 *w,
                                      const bnbq_tensor *out) {
    (void)w, (void)out;
    return refuse(call);
}

bnbq_status bnbq_cuda_linear_4bit(bnbq_cuda_call *call, const bnbq_tensor *x, const bnbq_weight4 *w,
                                  const bnbq_tensor *bias, bnbq_dtype compute_dtype,
                                  const bnbq_tensor *y) {
    (void)x, (void)w, (void)bias, (void)compute_dtype, (void)y;
    return refuse(call);
}

const char *bnbq_cuda_explain_4bit(int64_t m, int64_t n, int64_t k, int64_t blocksize,
                                   bnbq_dtype compute_dtype, bool batch_invariant, int capability,
                                   int multiprocessors) {
    (void)m, (void)n, (void)k, (void)blocksize, (void)compute_dtype, (void)batch_invariant;
    (void)capability, (void)multiprocessors;
    return NULL;
}

bnbq_status bnbq_cuda_linear_8bit(bnbq_cuda_call *call, const bnbq_tensor *x, const bnbq_weight8 *w,
                                  const bnbq_tensor *bias, float threshold, const bnbq_tensor *y) {
    (void)x, (void)w, (void)bias, (void)threshold, (void)y;
    return refuse(call);
}
