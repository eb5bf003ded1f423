/* absmax.cuh - scales of 4-bit weights on the device: the second level of double quantisation. */
#ifndef BNBQ_ABSMAX_CUH
#define BNBQ_ABSMAX_CUH

#include "launch.cuh"

/* A kernel parameter: constant memory, so lanes should look up few values at a time. */
struct dynamic_map {
    float values[256];
};

static inline dynamic_map get_dynamic_map() {
    dynamic_map map;
    for (int i = 0; i < 256; i++)
        map.values[i] = bnbq_dynamic_map[i];
    return map;
}

/* As reference.dequantize_absmax: a multiplication, then an addition. */
DEVICE float decode_absmax(float value, float absmax2, float offset) {
    return add_rn(mul_rn(value, absmax2), offset);
}

/* Of a power of two. */
static inline int log2_of(int64_t power) {
    int log2 = 0;
    while (power >> log2 > 1)
        log2++;
    return log2;
}

#endif
