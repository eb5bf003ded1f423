/* bnbq_cuda.h - the GPU half as the rest of the extension sees it: plain C, no CUDA header.
 *
 * Either cuda/stub.c or the .cu files of this folder define these functions, never both; setup.py
 * decides and build_info() tells.
 *
 * The operations are those of bnbq.h, with the same tensors, layouts and definitions; all memory
 * lies on call->device. They are enqueued on call->stream and return without waiting for it, so
 * they can be captured in a CUDA graph. They allocate through the call alone.
 */
#ifndef BNBQ_CUDA_H
#define BNBQ_CUDA_H

#include "bnbq.h"

#ifdef __cplusplus
extern "C" {
#endif

/* "13.0": the toolkit that compiled the GPU half. NULL: built without CUDA. */
const char *bnbq_cuda_toolkit(void);
/* "sm_80 sm_90a": what it was compiled for. "" without CUDA. */
const char *bnbq_cuda_archs(void);

typedef struct bnbq_cuda_call {
    int device;
    void *stream;         /* cudaStream_t */
    bool batch_invariant; /* a row's result must not depend on m: kernels.h */
    /* Working space on the device, 256-byte aligned, which the caller may hand to later work on
     * this stream once the operation has returned; NULL: there is none. */
    void *(*allocate)(void *owner, size_t bytes);
    void *owner;
    char error[256]; /* after BNBQ_DEVICE_ERROR: what CUDA said */
} bnbq_cuda_call;

/* The device: its compute capability as 10 * major + minor. */
bnbq_status bnbq_cuda_capability(bnbq_cuda_call *call, int *capability);

/* A NaN or an Inf in a weight makes the absmax of its block one of them, and its codes mean
 * nothing: nobody waits for the GPU here to say so. */
bnbq_status bnbq_cuda_quantize_4bit(bnbq_cuda_call *call, const bnbq_tensor *w,
                                    const struct bnbq_format *format, int64_t blocksize,
                                    uint8_t *qweight, float *absmax);
bnbq_status bnbq_cuda_dequantize_4bit(bnbq_cuda_call *call, const bnbq_weight4 *w,
                                      const bnbq_tensor *out);
bnbq_status bnbq_cuda_quantize_absmax(bnbq_cuda_call *call, const float *absmax, int64_t count,
                                      uint8_t *codes, float *absmax2, float *offset);
bnbq_status bnbq_cuda_dequantize_absmax(bnbq_cuda_call *call, const bnbq_absmax *absmax,
                                        int64_t count, float *out);
bnbq_status bnbq_cuda_quantize_8bit(bnbq_cuda_call *call, const bnbq_tensor *w, int64_t blocksize,
                                    int8_t *qweight, float *absmax);
bnbq_status bnbq_cuda_dequantize_8bit(bnbq_cuda_call *call, const bnbq_weight8 *w,
                                      const bnbq_tensor *out);

/* There is no backward here: its products are large, and a fused dequantisation followed by the
 * caller's dense product is within a few percent of what a fused kernel could reach. */
bnbq_status bnbq_cuda_linear_4bit(bnbq_cuda_call *call, const bnbq_tensor *x, const bnbq_weight4 *w,
                                  const bnbq_tensor *bias, bnbq_dtype compute_dtype,
                                  const bnbq_tensor *y);
/* Which kernel such a call takes on such a device: "mma 8x2", tokens x tiles of 16 rows per warp
 * (q4_mma.cuh), "fma stream", "fma tile" (q4_fma.cu). NULL without CUDA. */
const char *bnbq_cuda_explain_4bit(int64_t m, int64_t n, int64_t k, int64_t blocksize,
                                   bnbq_dtype compute_dtype, bool batch_invariant, int capability,
                                   int multiprocessors);
bnbq_status bnbq_cuda_linear_8bit(bnbq_cuda_call *call, const bnbq_tensor *x, const bnbq_weight8 *w,
                                  const bnbq_tensor *bias, float threshold, const bnbq_tensor *y);

#ifdef __cplusplus
}
#endif

#endif
