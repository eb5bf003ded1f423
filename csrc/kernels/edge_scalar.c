/* edge_scalar.c - fp16, bf16 <-> fp32, one element at a time. The truth for the other edge tables.
 */
#include "../float16.h"
#include "../kernels.h"

#include <string.h>

#ifdef __AVX2__
#error "edge_scalar.c is baseline code: compile it without -mavx2 or -march"
#endif

static void widen_edge_scalar(const void *src, bnbq_dtype dtype, int64_t count, float *dst) {
    const uint16_t *halves = src;
    switch (dtype) {
    case BNBQ_BF16:
        for (int64_t i = 0; i < count; i++)
            dst[i] = bnbq_bf16_to_f32(halves[i]);
        break;
    case BNBQ_F16:
        for (int64_t i = 0; i < count; i++)
            dst[i] = bnbq_f16_to_f32(halves[i]);
        break;
    default: memcpy(dst, src, (size_t)count * sizeof *dst);
    }
}

static void narrow_edge_scalar(const float *src, int64_t count, bnbq_dtype dtype, void *dst) {
    uint16_t *halves = dst;
    switch (dtype) {
    case BNBQ_BF16:
        for (int64_t i = 0; i < count; i++)
            halves[i] = bnbq_f32_to_bf16(src[i]);
        break;
    case BNBQ_F16:
        for (int64_t i = 0; i < count; i++)
            halves[i] = bnbq_f32_to_f16(src[i]);
        break;
    default: memcpy(dst, src, (size_t)count * sizeof *src);
    }
}

const bnbq_edge_kernels bnbq_edge_scalar = {
    .isa = "scalar",
    .level = BNBQ_ISA_SCALAR,
    .needs = BNBQ_CPU_OF_THIS_FILE,
    .widen = widen_edge_scalar,
    .narrow = narrow_edge_scalar,
};
