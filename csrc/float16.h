/* float16.h - fp16 and bf16 as bit patterns, to and from fp32.
 *
 * Integer arithmetic only, so the floating-point environment (flush to zero, rounding mode) cannot
 * change a result. NaN keeps its sign and upper payload bits and becomes quiet, as F16C does.
 */
#ifndef BNBQ_FLOAT16_H
#define BNBQ_FLOAT16_H

#include <stdint.h>
#include <string.h>

static inline uint32_t bnbq_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float bnbq_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline float bnbq_bf16_to_f32(uint16_t value) {
    return bnbq_float((uint32_t)value << 16);
}

/* Round to nearest, ties to even; overflow gives Inf. */
static inline uint16_t bnbq_f32_to_bf16(float value) {
    uint32_t bits = bnbq_bits(value);
    if ((bits & 0x7fffffff) > 0x7f800000)
        return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static inline float bnbq_f16_to_f32(uint16_t value) {
    uint32_t sign = (uint32_t)(value & 0x8000) << 16;
    uint32_t exponent = value >> 10 & 31, mantissa = value & 0x3ff;
    if (exponent == 0) /* zero or subnormal: a multiple of 2^-24, exact in fp32 */
        return bnbq_float(sign | bnbq_bits((float)(int32_t)mantissa * 0x1p-24f));
    if (exponent == 31)
        return bnbq_float(sign | 0x7f800000 | mantissa << 13 | (mantissa ? 0x400000 : 0));
    return bnbq_float(sign | (exponent + 127 - 15) << 23 | mantissa << 13);
}

/* Round to nearest, ties to even; 65520 and more give Inf. */
static inline uint16_t bnbq_f32_to_f16(float value) {
    uint32_t bits = bnbq_bits(value);
    uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000)
        return (uint16_t)(sign | 0x7e00 | (magnitude >> 13 & 0x3ff));
    if (magnitude >= 0x477ff000)
        return (uint16_t)(sign | 0x7c00);
    uint32_t exponent = magnitude >> 23, shift = 13;
    uint32_t wide = magnitude - ((127u - 15u) << 23); /* exponent and mantissa, to be rounded */
    if (exponent < 113) {                             /* below 2^-14: subnormal, or zero */
        if (exponent < 102)
            return (uint16_t)sign;
        wide = (magnitude & 0x7fffff) | 0x800000;
        shift = 126 - exponent;
    }
    uint32_t half = 1u << (shift - 1), rest = wide & (2 * half - 1), rounded = wide >> shift;
    rounded += rest > half || (rest == half && (rounded & 1));
    return (uint16_t)(sign | rounded);
}

#endif
