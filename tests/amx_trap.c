/* amx_trap.c - runs the real AMX machine code on a processor without AMX.
 *
 * Linked beside kernels that were compiled for AMX, it catches the invalid-opcode signal of each
 * tile instruction, decodes it, performs it with the emulation in amx_tiles.h and resumes behind
 * it. So the compiler's output is what is tested: operand order, addresses, statement order. Where
 * the processor has AMX it asks for the permission to use it and stays out of the way.
 *
 * Source: Intel SDM volume 2, chapter 2 (VEX, ModRM, SIB) and the encodings of the instructions.
 */
#define _GNU_SOURCE
#define BNBQ_AMX_EMULATED
#include "../csrc/kernels/amx_tiles.h"

#include <signal.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

static int64_t trapped;

static int64_t general_register(const ucontext_t *context, int number) {
    static const int places[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                                   REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                                   REG_R12, REG_R13, REG_R14, REG_R15};
    return context->uc_mcontext.gregs[places[number]];
}

/* Where a memory operand is: base + displacement, and index << scale, which tile loads and stores
 * take as the stride. `p` points at ModRM, extend_* are the inverted VEX bits. Returns the end. */
static const uint8_t *memory_operand(const ucontext_t *context, const uint8_t *p, int extend_x,
                                     int extend_b, int64_t *address, int64_t *stride) {
    const int mod = p[0] >> 6, rm = p[0] & 7;
    int base = rm, index = 4, scale = 0;
    p++;
    if (rm == 4) {
        base = p[0] & 7;
        index = (p[0] >> 3 & 7) | extend_x << 3;
        scale = p[0] >> 6;
        p++;
    }
    int32_t displacement = 0;
    const int no_base = mod == 0 && base == 5;
    if (mod == 1) {
        displacement = (int8_t)*p++;
    } else if (mod == 2 || no_base) {
        memcpy(&displacement, p, 4);
        p += 4;
    }
    *address = displacement;
    if (!no_base)
        *address += general_register(context, base | extend_b << 3);
    else if (rm == 5)
        *address += (int64_t)(uintptr_t)p; /* relative to the next instruction */
    *stride = index == 4 ? 0 : (int64_t)((uint64_t)general_register(context, index) << scale);
    return p;
}

/* Performs the instruction at `p`; returns what follows it, or NULL if it is not one of ours. */
static const uint8_t *perform(const ucontext_t *context, const uint8_t *p) {
    const int zero_three = p[0] == 0xc4 && (p[1] & 31) == 2; /* VEX, map 0F38 */
    if (!zero_three || (p[2] & 0x84) != 0)                   /* W0, 128 bits */
        return NULL;
    const int extend_r = !(p[1] & 0x80), extend_x = !(p[1] & 0x40), extend_b = !(p[1] & 0x20);
    const int third = ~(p[2] >> 3) & 15, prefix = p[2] & 3, opcode = p[3];
    const int reg = (p[4] >> 3 & 7) | extend_r << 3, rm = (p[4] & 7) | extend_b << 3;
    const int in_registers = p[4] >> 6 == 3;
    enum { NONE, P66, PF3, PF2 };
    int64_t address = 0, stride = 0;
    const uint8_t *end = p + 5;
    if (!in_registers)
        end = memory_operand(context, p + 4, extend_x, extend_b, &address, &stride);
    void *memory = (void *)(uintptr_t)address;
    if (opcode == 0x49 && prefix == NONE && in_registers && reg == 0 && rm == 0)
        amx_release();
    else if (opcode == 0x49 && prefix == NONE && !in_registers && reg == 0)
        amx_configure(memory);
    else if (opcode == 0x49 && prefix == PF2 && in_registers && rm == 0)
        amx_zero(reg);
    else if (opcode == 0x4b && prefix == PF2 && !in_registers && (p[4] & 7) == 4)
        amx_load(reg, memory, stride);
    else if (opcode == 0x4b && prefix == PF3 && !in_registers && (p[4] & 7) == 4)
        amx_store(reg, memory, stride);
    else if (opcode == 0x5c && prefix == PF3 && in_registers)
        amx_dp_bf16(reg, rm, third);
    else if (opcode == 0x5e && prefix == PF2 && in_registers)
        amx_dp_s8(reg, rm, third);
    else
        return NULL;
    return end;
}

static void on_invalid_opcode(int number, siginfo_t *info, void *context) {
    (void)info;
    ucontext_t *u = context;
    const uint8_t *end = perform(u, (const uint8_t *)u->uc_mcontext.gregs[REG_RIP]);
    if (end == NULL) {
        signal(number, SIG_DFL); /* a real one: run into it again */
        return;
    }
    trapped++;
    u->uc_mcontext.gregs[REG_RIP] = (greg_t)end;
}

__attribute__((constructor)) static void install(void) {
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };
    if (syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0) {
        fprintf(stderr, "tiles: this processor's\n");
        return;
    }
    struct sigaction action = {.sa_sigaction = on_invalid_opcode, .sa_flags = SA_SIGINFO};
    sigaction(SIGILL, &action, NULL);
}

__attribute__((destructor)) static void report(void) {
    if (trapped)
        fprintf(stderr, "tiles: %lld instructions trapped and emulated\n", (long long)trapped);
}

bool amx_trap_released(void) {
    return !amx_emulated.configured;
}
