/* registry.c - every kernel table, and which one is in use.
 *
 * The rows of a family are ordered slowest first. The last one that this processor can run and that
 * the cap (BNBQ_ISA, set_isa) allows wins; the scalar row always can.
 */
#include "kernels.h"

#include <stdatomic.h>
#include <string.h>

#ifdef __AVX2__
#error "registry.c is baseline code: compile it without -mavx2 or -march"
#endif

static const bnbq_edge_kernels *const edge_rows[] = {
    &bnbq_edge_scalar,
#ifdef __x86_64__
    &bnbq_edge_avx2,
#endif
};

static const bnbq_q4_kernels *const q4_rows[] = {
    &bnbq_q4_scalar,
#ifdef __x86_64__
    &bnbq_q4_avx2,   &bnbq_q4_avx512, &bnbq_q4_avx512bf16, &bnbq_q4_amx,
#elif defined(__aarch64__)
    &bnbq_q4_neon,
    &bnbq_q4_neon_bf16,
#endif
};

static const bnbq_s8_kernels *const s8_rows[] = {
    &bnbq_s8_scalar,
#ifdef __x86_64__
    &bnbq_s8_avx2,   &bnbq_s8_avx512vnni, &bnbq_s8_avx512bf16, &bnbq_s8_amx,
#elif defined(__aarch64__)
    &bnbq_s8_neon,
    &bnbq_s8_neon_i8mm,
#endif
};

static const bnbq_w4a8_kernels *const w4a8_rows[] = {
    &bnbq_w4a8_scalar,
#ifdef __x86_64__
    &bnbq_w4a8_avx2,
    &bnbq_w4a8_avx512vnni,
#endif
};

static const char *const isa_names[BNBQ_ISAS] = {
    [BNBQ_ISA_SCALAR] = "scalar",         [BNBQ_ISA_NEON] = "neon", [BNBQ_ISA_I8MM] = "i8mm",
    [BNBQ_ISA_NEONBF16] = "neonbf16",     [BNBQ_ISA_AVX2] = "avx2", [BNBQ_ISA_AVX512] = "avx512",
    [BNBQ_ISA_AVX512BF16] = "avx512bf16", [BNBQ_ISA_AMX] = "amx",
};

static _Atomic int isa_cap = BNBQ_ISAS - 1;
static atomic_bool batch_invariant;

static uint32_t missing_of(uint32_t needs) {
    return needs & ~bnbq_cpu_features();
}

/* The same three functions for each type of table: the row in use, its index, row i for listings.
 */
#define FAMILY(name)                                                                               \
    static int name##_in_use(void) {                                                               \
        int i = sizeof name##_rows / sizeof *name##_rows - 1;                                      \
        while (i > 0 && (missing_of(name##_rows[i]->needs) != 0 ||                                 \
                         (int)name##_rows[i]->level > atomic_load(&isa_cap)))                      \
            i--;                                                                                   \
        return i;                                                                                  \
    }                                                                                              \
    const bnbq_##name##_kernels *bnbq_##name(void) {                                               \
        return name##_rows[name##_in_use()];                                                       \
    }                                                                                              \
    static bool name##_row(int i, bnbq_row_info *info) {                                           \
        if (i < 0 || i >= (int)(sizeof name##_rows / sizeof *name##_rows))                         \
            return false;                                                                          \
        *info = (bnbq_row_info){                                                                   \
            .family = #name,                                                                       \
            .isa = name##_rows[i]->isa,                                                            \
            .level = name##_rows[i]->level,                                                        \
            .needs = name##_rows[i]->needs,                                                        \
            .missing = missing_of(name##_rows[i]->needs),                                          \
            .in_use = i == name##_in_use(),                                                        \
        };                                                                                         \
        return true;                                                                               \
    }

FAMILY(edge)
FAMILY(q4)
FAMILY(s8)
FAMILY(w4a8)

bool bnbq_row(const char *family, int i, bnbq_row_info *info) {
    if (strcmp(family, "edge") == 0)
        return edge_row(i, info);
    if (strcmp(family, "q4") == 0) {
        if (!q4_row(i, info))
            return false;
        const bnbq_q4_kernels *q4 = q4_rows[i];
        info->bf16_min_m = q4->bf16[0].min_m;
        info->bf16_max_m = info->bf16_min_m > 0 ? INT64_MAX : 0;
        for (int f = BNBQ_BF16_FORMS - 1; f > 0; f--)
            if (q4->bf16[f].min_m > 0 && q4->bf16[f].linear.run == q4->linear.run)
                info->bf16_max_m = q4->bf16[f].min_m - 1;
        return true;
    }
    if (strcmp(family, "w4a8") == 0)
        return w4a8_row(i, info);
    return strcmp(family, "s8") == 0 && s8_row(i, info);
}

const char *bnbq_isa_name(bnbq_isa isa) {
    return isa_names[isa];
}

bool bnbq_parse_isa(const char *name, bnbq_isa *isa) {
    for (int i = 0; i < BNBQ_ISAS; i++) {
        if (strcmp(name, isa_names[i]) == 0) {
            *isa = (bnbq_isa)i;
            return true;
        }
    }
    return false;
}

void bnbq_set_isa(bnbq_isa cap) {
    atomic_store(&isa_cap, (int)cap);
}

/* The highest level that any family runs at. */
bnbq_isa bnbq_get_isa(void) {
    bnbq_isa highest = bnbq_q4()->level;
    if (bnbq_s8()->level > highest)
        highest = bnbq_s8()->level;
    return highest;
}

void bnbq_set_batch_invariant(bool on) {
    atomic_store(&batch_invariant, on);
}

bool bnbq_batch_invariant(void) {
    return atomic_load(&batch_invariant);
}
