/* cpu.c - CPUID (x86-64) or the auxiliary vector (aarch64), and what the operating system allows.
 *
 * A feature counts only if the kernel saves its registers: XCR0 says so for AVX and AVX-512. AMX
 * needs in addition the permission of the process (Linux, arch_prctl), which is asked for here;
 * Documentation/arch/x86/xstate.rst of Linux describes it.
 */
#ifdef __linux__
#define _GNU_SOURCE /* syscall */
#endif
#include "cpu.h"

#include <stdatomic.h>
#include <stddef.h>

#ifdef __AVX2__
#error "cpu.c is baseline code: compile it without -mavx2 or -march"
#endif

#if defined(__x86_64__)

#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

/* The register sets that the operating system saves. Only after CPUID said OSXSAVE. */
static uint64_t read_xcr0(void) {
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t)high << 32 | low;
}

static int may_use_amx(void) {
#if defined(__linux__) && defined(SYS_arch_prctl)
    enum { REQUEST_XCOMP_PERMISSION = 0x1023, XTILEDATA = 18 };
    return syscall(SYS_arch_prctl, REQUEST_XCOMP_PERMISSION, XTILEDATA) == 0;
#else
    return 0;
#endif
}

static uint32_t probe(void) {
    enum { XCR0_AVX = 0x6, XCR0_AVX512 = 0xe6, XCR0_AMX = 0x60000 };
    uint32_t a, b, c, d, features = 0;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE))
        return 0;
    uint64_t saved = read_xcr0();
    uint32_t avx_fma_f16c = bit_AVX | bit_FMA | bit_F16C;
    if ((saved & XCR0_AVX) != XCR0_AVX || (c & avx_fma_f16c) != avx_fma_f16c)
        return 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b & 1u << 5))
        return 0;
    features |= BNBQ_CPU_AVX2;
    uint32_t subleaves = a;
    uint32_t f_dq_bw_vl = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;
    if ((saved & XCR0_AVX512) != XCR0_AVX512 || (b & f_dq_bw_vl) != f_dq_bw_vl)
        return features;
    features |= BNBQ_CPU_AVX512;
    if (c & 1u << 11)
        features |= BNBQ_CPU_AVX512VNNI;
    uint32_t bf16_tile_int8 = 1u << 22 | 1u << 24 | 1u << 25;
    int has_amx = (d & bf16_tile_int8) == bf16_tile_int8 && (saved & XCR0_AMX) == XCR0_AMX;
    if (has_amx && may_use_amx())
        features |= BNBQ_CPU_AMX;
    if (subleaves >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 5))
        features |= BNBQ_CPU_AVX512BF16;
    return features;
}

#elif defined(__aarch64__) && defined(__linux__)

#include <sys/auxv.h>

static uint32_t probe(void) {
    enum { ASIMD = 1 << 1, ASIMDDP = 1 << 20 }; /* asm/hwcap.h */
    enum { I8MM = 1 << 13, BF16 = 1 << 14 };    /* of the second word */
    unsigned long capabilities = getauxval(AT_HWCAP), second = getauxval(AT_HWCAP2);
    uint32_t features = 0;
    if (capabilities & ASIMD)
        features |= BNBQ_CPU_NEON;
    if (capabilities & ASIMDDP)
        features |= BNBQ_CPU_DOTPROD;
    if (second & I8MM)
        features |= BNBQ_CPU_I8MM;
    if (second & BF16)
        features |= BNBQ_CPU_BF16;
    return features;
}

#else

static uint32_t probe(void) {
    return BNBQ_CPU_OF_THIS_FILE;
}

#endif

uint32_t bnbq_cpu_features(void) {
    /* Two threads may both probe: they find the same bits. */
    enum { PROBED = 1u << 30 };
    static _Atomic uint32_t cache;
    uint32_t features = atomic_load_explicit(&cache, memory_order_relaxed);
    if (!features) {
        features = probe() | PROBED;
        atomic_store_explicit(&cache, features, memory_order_relaxed);
    }
    return features & ~(uint32_t)PROBED;
}

const char *bnbq_cpu_feature_name(uint32_t feature) {
    switch (feature) {
    case BNBQ_CPU_AVX2: return "avx2";
    case BNBQ_CPU_AVX512: return "avx512";
    case BNBQ_CPU_AVX512VNNI: return "avx512vnni";
    case BNBQ_CPU_AVX512BF16: return "avx512bf16";
    case BNBQ_CPU_AMX: return "amx";
    case BNBQ_CPU_NEON: return "neon";
    case BNBQ_CPU_DOTPROD: return "dotprod";
    case BNBQ_CPU_I8MM: return "i8mm";
    case BNBQ_CPU_BF16: return "bf16";
    default: return NULL;
    }
}
