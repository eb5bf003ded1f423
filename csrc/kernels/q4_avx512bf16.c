/* q4_avx512bf16.c - the 4-bit family on AVX-512 with bf16 dot products: Zen 4 and later, Cooper
 * Lake, Sapphire Rapids and later. What needs no bf16 is that of q4_avx512.c.
 */
#include "borrow_q4_avx512.h"

#include "blocking.h"

#include <assert.h>
#include <immintrin.h>
#include <string.h>

#if !defined(__AVX512F__) || !defined(__AVX512BW__) || !defined(__AVX512BF16__)
#error "compile with the flags of q4_avx512.c and -mavx512bf16"
#endif

const bnbq_q4_kernels bnbq_q4_avx512bf16 = {
    .isa = "avx512bf16",
    .level = BNBQ_ISA_AVX512BF16,
    .needs = BNBQ_CPU_OF_THIS_FILE,
    .quantize = borrowed_quantize_q4,
    .dequantize = borrowed_dequantize_q4,
    .linear = BORROWED_LINEAR_Q4,
    .backward = borrowed_backward_q4,
};
