/* cpu.h - what this processor and its operating system can run.
 *
 * BNBQ_CPU_OF_THIS_FILE is the set of features that the compiler was allowed to use in the
 * including file. A kernel table writes it into `needs`, so the build flags and the run-time check
 * are one fact.
 */
#ifndef BNBQ_CPU_H
#define BNBQ_CPU_H

#include <stdint.h>

enum {
    BNBQ_CPU_AVX2 = 1 << 0,   /* with FMA and F16C: no processor has AVX2 without them */
    BNBQ_CPU_AVX512 = 1 << 1, /* F, BW, DQ, VL */
    BNBQ_CPU_AVX512VNNI = 1 << 2,
    BNBQ_CPU_AVX512BF16 = 1 << 3,
    BNBQ_CPU_AMX = 1 << 4, /* TILE, INT8, BF16, and the permission to use the tile registers */
    BNBQ_CPU_NEON = 1 << 5,
    BNBQ_CPU_DOTPROD = 1 << 6,
    BNBQ_CPU_I8MM = 1 << 7,
    BNBQ_CPU_BF16 = 1 << 8, /* of Arm */
};

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define BNBQ_HAVE_AVX2 BNBQ_CPU_AVX2
#else
#define BNBQ_HAVE_AVX2 0
#endif
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define BNBQ_HAVE_AVX512 BNBQ_CPU_AVX512
#else
#define BNBQ_HAVE_AVX512 0
#endif
#ifdef __AVX512VNNI__
#define BNBQ_HAVE_AVX512VNNI BNBQ_CPU_AVX512VNNI
#else
#define BNBQ_HAVE_AVX512VNNI 0
#endif
#ifdef __AVX512BF16__
#define BNBQ_HAVE_AVX512BF16 BNBQ_CPU_AVX512BF16
#else
#define BNBQ_HAVE_AVX512BF16 0
#endif
/* gcc and newer clang spell them with an underscore, clang 14 without. */
#if (defined(__AMX_TILE__) && defined(__AMX_INT8__) && defined(__AMX_BF16__)) ||                   \
    (defined(__AMXTILE__) && defined(__AMXINT8__) && defined(__AMXBF16__))
#define BNBQ_HAVE_AMX BNBQ_CPU_AMX
#else
#define BNBQ_HAVE_AMX 0
#endif
#ifdef __ARM_NEON
#define BNBQ_HAVE_NEON BNBQ_CPU_NEON
#else
#define BNBQ_HAVE_NEON 0
#endif
#ifdef __ARM_FEATURE_DOTPROD
#define BNBQ_HAVE_DOTPROD BNBQ_CPU_DOTPROD
#else
#define BNBQ_HAVE_DOTPROD 0
#endif
#ifdef __ARM_FEATURE_MATMUL_INT8
#define BNBQ_HAVE_I8MM BNBQ_CPU_I8MM
#else
#define BNBQ_HAVE_I8MM 0
#endif
#ifdef __ARM_FEATURE_BF16_VECTOR_ARITHMETIC
#define BNBQ_HAVE_BF16 BNBQ_CPU_BF16
#else
#define BNBQ_HAVE_BF16 0
#endif

#define BNBQ_CPU_OF_THIS_FILE                                                                      \
    (BNBQ_HAVE_AVX2 | BNBQ_HAVE_AVX512 | BNBQ_HAVE_AVX512VNNI | BNBQ_HAVE_AVX512BF16 |             \
     BNBQ_HAVE_AMX | BNBQ_HAVE_NEON | BNBQ_HAVE_DOTPROD | BNBQ_HAVE_I8MM | BNBQ_HAVE_BF16)

/* Probed once, on the first call; safe from any thread. */
uint32_t bnbq_cpu_features(void);
/* "avx2" for BNBQ_CPU_AVX2 and so on; NULL for a bit without a name. */
const char *bnbq_cpu_feature_name(uint32_t feature);

#endif
