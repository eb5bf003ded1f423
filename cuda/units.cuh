/* units.cuh - 16 bytes of a float tensor, the unit in which the quantising kernels move weights.
 *
 * A thread holds a unit as it came from memory, in four registers, and widens its values when it
 * uses them. Neighbouring lanes hold neighbouring units, so that a warp's access is 512 bytes in a
 * row; the codes of a unit are 2, 4 or 8 bytes then, and a warp's access to those is one or two
 * lines. Wider accesses to the codes, 16 bytes a lane, would cost as many wavefronts and either
 * half-used sectors on the other side or an exchange between lanes.
 */
#ifndef BNBQ_UNITS_CUH
#define BNBQ_UNITS_CUH

#include "launch.cuh"

#include <type_traits>

/* Values of a unit. */
template <bnbq_dtype DTYPE> constexpr int UNIT = DTYPE == BNBQ_F32 ? 4 : 8;

template <bnbq_dtype DTYPE> DEVICE void widen(const uint4 &unit, float (&values)[UNIT<DTYPE>]) {
    const uint32_t words[4] = {unit.x, unit.y, unit.z, unit.w};
#pragma unroll
    for (int i = 0; i < UNIT<DTYPE>; i++) {
        if constexpr (DTYPE == BNBQ_F32)
            values[i] = bits_float(words[i]);
        else if constexpr (DTYPE == BNBQ_BF16)
            values[i] = bits_float(i % 2 ? words[i / 2] & 0xffff0000u : words[i / 2] << 16);
        else
            values[i] = f16_to_f32((uint16_t)(words[i / 2] >> i % 2 * 16));
    }
}

template <bnbq_dtype DTYPE> DEVICE uint4 narrow(const float (&values)[UNIT<DTYPE>]) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if constexpr (DTYPE == BNBQ_F32)
            words[i] = float_bits(values[i]);
        else if constexpr (DTYPE == BNBQ_BF16)
            words[i] = pack_bf16(values[2 * i], values[2 * i + 1]);
        else
            words[i] = pack_f16(values[2 * i], values[2 * i + 1]);
    }
    return {words[0], words[1], words[2], words[3]};
}

/* The greatest magnitude, as fp32 bits that compare as the magnitudes do, with Inf and NaN on top.
 * From the words as they are: the compiler would keep widened values for their next use, twice as
 * many registers. */
template <bnbq_dtype DTYPE> DEVICE uint32_t greatest_magnitude(const uint4 &unit) {
    const uint32_t words[4] = {unit.x, unit.y, unit.z, unit.w};
    uint32_t high = 0, low = 0; /* of a word, without its sign, at its upper end */
#pragma unroll
    for (int i = 0; i < 4; i++) {
        high = words[i] << 1 > high ? words[i] << 1 : high;
        low = words[i] << 17 > low ? words[i] << 17 : low;
    }
    if constexpr (DTYPE == BNBQ_F32)
        return high >> 1;
    uint32_t bits = (high > low ? high : low) >> 17;
    return DTYPE == BNBQ_BF16 ? bits << 16 : float_bits(f16_to_f32((uint16_t)bits));
}

template <bnbq_dtype DTYPE>
using element_of = std::conditional_t<DTYPE == BNBQ_F32, uint32_t, uint16_t>;

/* What is left of a tensor from an element on, as far as an int goes. */
DEVICE int left_of(int64_t count) {
    return count < INT32_MAX ? (int)count : INT32_MAX;
}

/* The unit at `from`, zeros where fewer values are left. `wide`: it is 16-byte aligned. */
template <bnbq_dtype DTYPE>
DEVICE uint4 load_unit(const element_of<DTYPE> *from, int left, bool wide) {
    constexpr int N = UNIT<DTYPE>, BITS = 128 / N;
    if (wide && left >= N)
        return load_stream128(from);
    uint64_t low = 0, high = 0;
#pragma unroll 1
    for (int i = N - 1; i >= 0; i--) {
        high = high << BITS | low >> (64 - BITS);
        low = low << BITS | (i < left ? from[i] : 0);
    }
    return {(uint32_t)low, (uint32_t)(low >> 32), (uint32_t)high, (uint32_t)(high >> 32)};
}

template <bnbq_dtype DTYPE>
DEVICE void store_unit(element_of<DTYPE> *to, int left, bool wide, const uint4 &unit) {
    constexpr int N = UNIT<DTYPE>, BITS = 128 / N;
    if (wide && left >= N) {
        *(uint4 *)to = unit;
        return;
    }
    uint64_t low = (uint64_t)unit.y << 32 | unit.x, high = (uint64_t)unit.w << 32 | unit.z;
#pragma unroll 1
    for (int i = 0; i < N && i < left; i++) {
        to[i] = (element_of<DTYPE>)low;
        low = low >> BITS | high << (64 - BITS);
        high >>= BITS;
    }
}

/* The bytes of the codes of a unit, the first one lowest: T is as long as they are. `left` counts
 * bytes. */
template <class T> DEVICE T load_codes(const void *from, int left, bool wide) {
    if (wide && left >= (int)sizeof(T))
        return *(const T *)from;
    uint64_t codes = 0;
#pragma unroll 1
    for (int i = (int)sizeof(T) - 1; i >= 0; i--)
        codes = codes << 8 | (i < left ? ((const uint8_t *)from)[i] : 0);
    return (T)codes;
}

template <class T> DEVICE void store_codes(void *to, int left, bool wide, T codes) {
    if (wide && left >= (int)sizeof(T)) {
        *(T *)to = codes;
        return;
    }
    uint64_t rest = codes;
#pragma unroll 1
    for (int i = 0; i < (int)sizeof(T) && i < left; i++, rest >>= 8)
        ((uint8_t *)to)[i] = (uint8_t)rest;
}

/* Whether units, or codes of units, which are that many bytes, may be accessed whole. */
static inline bool is_aligned_to(const void *data, size_t bytes) {
    return (uintptr_t)data % bytes == 0;
}

/* launcher(std::integral_constant<bnbq_dtype, dtype>()) for a float dtype. */
template <class F> bnbq_status with_dtype(bnbq_dtype dtype, F launcher) {
    switch (dtype) {
    case BNBQ_BF16: return launcher(std::integral_constant<bnbq_dtype, BNBQ_BF16>());
    case BNBQ_F16: return launcher(std::integral_constant<bnbq_dtype, BNBQ_F16>());
    default: return launcher(std::integral_constant<bnbq_dtype, BNBQ_F32>());
    }
}

#endif
