/* emulator.cpp - fibers, barriers and warp collectives; see emulator.h. */
#include "emulator.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <random>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace emulator {

dim3 thread, block, block_size, grid_size;
device current_device = {90, 4, 227 * 1024};
call last_call;
const char *next_failure;

namespace {

enum { STACK_BYTES = 256 * 1024, LANES = 32, GROUP = 4 * LANES };

/* ---------------------------------------------------------------- fibers */

#if defined(__x86_64__)
/* Save the callee-saved registers on the stack, swap stacks, restore. */
extern "C" void emulator_switch(void **save, void *load);
__asm__(".text\n"
        ".globl emulator_switch\n"
        ".hidden emulator_switch\n"
        "emulator_switch:\n"
        "push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n"
        "mov %rsp, (%rdi)\n"
        "mov %rsi, %rsp\n"
        "pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n"
        "ret\n");
typedef void *context;
void switch_context(context *save, context *load) {
    emulator_switch(save, *load);
}
void make_context(context *made, char *stack, void (*entry)()) {
    void **top = (void **)(stack + STACK_BYTES);
    *--top =
        nullptr; /* the entry's return address, which it never uses; keeps the ABI's alignment */
    *--top = (void *)entry;
    for (int i = 0; i < 6; i++)
        *--top = nullptr;
    *made = top;
}
#else
#include <ucontext.h>
typedef ucontext_t context;
void switch_context(context *save, context *load) {
    swapcontext(save, load);
}
void make_context(context *made, char *stack, void (*entry)()) {
    getcontext(made);
    made->uc_stack.ss_sp = stack;
    made->uc_stack.ss_size = STACK_BYTES;
    made->uc_link = nullptr;
    makecontext(made, entry, 0);
}
#endif

struct copy {
    void *shared;
    const void *global;
    bool valid;
};

/* Of a warpgroup, with A in registers (16-bit) or in shared memory (8-bit). */
struct product {
    void *d;
    int columns;
    const uint32_t *a;
    uint64_t tile_a, tile_b;
    float (*widen)(uint16_t);
};

struct fiber {
    context registers;
    char *stack = nullptr;
    void *fake_stack = nullptr; /* AddressSanitizer's */
    dim3 index;
    int warp, lane;
    bool done, waits_for_warp, waits_for_group, waits_for_block;
    bool wrote_unfenced;  /* copies arrived that products may not see yet */
    const void *operands; /* of the collective that the fiber is in, for the other lanes to see */
    std::vector<copy> copies;
    std::vector<size_t> groups; /* ends of groups in copies */
    std::vector<product> products;
    std::vector<size_t> product_groups;
};

context scheduler;
void *scheduler_fake_stack;
const void *scheduler_stack;
size_t scheduler_stack_bytes;
std::vector<fiber> fibers;
fiber *current;
const std::function<void()> *kernel;
const char *kernel_name;
char *shared;
size_t shared_bytes;
uint32_t order_seed;
int64_t launches;

void start_switch(void **fake_stack, const void *stack, size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(fake_stack, stack, bytes);
#else
    (void)fake_stack, (void)stack, (void)bytes;
#endif
}

void finish_switch(void *fake_stack, const void **stack, size_t *bytes) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack, stack, bytes);
#else
    (void)fake_stack, (void)stack, (void)bytes;
#endif
}

/* Back to the scheduler, which comes back here when the fiber may go on. */
void yield() {
    fiber *self = current;
    start_switch(self->done ? nullptr : &self->fake_stack, scheduler_stack, scheduler_stack_bytes);
    switch_context(&self->registers, &scheduler);
    finish_switch(self->fake_stack, nullptr, nullptr);
}

void fiber_main() {
    finish_switch(nullptr, &scheduler_stack, &scheduler_stack_bytes);
    (*kernel)();
    if (!current->copies.empty() || !current->products.empty())
        fail("thread %u ends with copies or products that it never waited for", current->index.x);
    current->done = true;
    yield();
}

void resume(fiber *next) {
    current = next;
    thread = next->index;
    start_switch(&scheduler_fake_stack, next->stack, STACK_BYTES);
    switch_context(&scheduler, &next->registers);
    finish_switch(scheduler_fake_stack, nullptr, nullptr);
}

std::vector<size_t> in_order(size_t count, uint32_t salt) {
    std::vector<size_t> order(count);
    for (size_t i = 0; i < count; i++)
        order[i] = order_seed == 1 ? count - 1 - i : i;
    if (order_seed > 1)
        std::shuffle(order.begin(), order.end(), std::mt19937(order_seed + salt));
    return order;
}

/* All lanes of a warp, or all threads, have come to the same barrier: let them go on. A thread that
 * has ended will not come: barriers are for all threads. */
bool release(size_t first, size_t count, bool fiber::*waits) {
    for (size_t i = first; i < first + count; i++)
        if (!(fibers[i].*waits))
            return false;
    for (size_t i = first; i < first + count; i++)
        fibers[i].*waits = false;
    return true;
}

void run_block(uint32_t salt) {
    size_t threads = fibers.size(), warps = threads / LANES;
    for (size_t i = 0; i < threads; i++) {
        fiber &f = fibers[i];
        f.done = f.waits_for_warp = f.waits_for_group = f.waits_for_block = f.wrote_unfenced =
            false;
#if defined(__SANITIZE_ADDRESS__)
        __asan_unpoison_memory_region(f.stack, STACK_BYTES); /* frames that nobody left */
#endif
        make_context(&f.registers, f.stack, fiber_main);
    }
    std::vector<size_t> warp_order = in_order(warps, salt), lane_order = in_order(LANES, ~salt);
    for (;;) {
        bool progress = false, alive = false;
        for (size_t w : warp_order) {
            bool more = true;
            while (more) { /* as far as the warp gets without the others */
                for (size_t l : lane_order) {
                    fiber &f = fibers[w * LANES + l];
                    if (!f.done && !f.waits_for_warp && !f.waits_for_group && !f.waits_for_block) {
                        resume(&f);
                        progress = true;
                    }
                }
                more = release(w * LANES, LANES, &fiber::waits_for_warp);
            }
        }
        for (size_t first = 0; first + GROUP <= threads; first += GROUP)
            progress |= release(first, GROUP, &fiber::waits_for_group);
        progress |= release(0, threads, &fiber::waits_for_block);
        for (const fiber &f : fibers)
            alive |= !f.done;
        if (!alive)
            return;
        if (!progress)
            fail("some threads wait at a barrier that the others never reach");
    }
}

void barrier(bool fiber::*waits) {
    current->*waits = true;
    yield();
}

fiber *warp_of(const fiber *f) {
    return &fibers[(size_t)f->warp * LANES];
}

/* Every lane shows its operands, `use` runs in each lane with all of them in view. */
template <class Use> void collective(const void *operands, Use use) {
    current->operands = operands;
    barrier(&fiber::waits_for_warp);
    use(warp_of(current));
    barrier(&fiber::waits_for_warp);
}

bool is_shared(const void *address, size_t bytes) {
    return (const char *)address >= shared &&
           (const char *)address + bytes <= shared + shared_bytes;
}

} // namespace

void fail(const char *format, ...) {
    fprintf(stderr, "emulator: kernel %s, block %u %u %u: ", kernel_name ? kernel_name : "none",
            block.x, block.y, block.z);
    va_list arguments;
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fputc('\n', stderr);
    abort();
}

int lane() {
    return current->lane;
}

void *shared_memory() {
    return shared;
}

void sync_threads() {
    barrier(&fiber::waits_for_block);
}

void sync_warp() {
    barrier(&fiber::waits_for_warp);
}

uint32_t shuffle(uint32_t value, int lane) {
    uint32_t result = 0;
    collective(&value, [&](fiber *warp) { result = *(const uint32_t *)warp[lane].operands; });
    return result;
}

uint32_t vote(bool predicate) {
    uint32_t result = 0;
    collective(&predicate, [&](fiber *warp) {
        for (int i = 0; i < LANES; i++)
            result |= (uint32_t) * (const bool *)warp[i].operands << i;
    });
    return result;
}

struct mma_operands {
    const uint32_t *a, *b;
};

static const mma_operands &operands_of(const fiber *warp, int lane) {
    return *(const mma_operands *)warp[lane].operands;
}

/* Products are exact in fp32 for 16-bit floats; hardware adds them in an order and with a width of
 * its own, so the sum is taken in double here and rounded once. */
void mma_16bit(float d[4], const uint32_t a[4], const uint32_t b[2], float (*widen)(uint16_t)) {
    mma_operands mine = {a, b};
    float result[4];
    collective(&mine, [&](fiber *warp) {
        int g = current->lane / 4, t = current->lane % 4;
        for (int i = 0; i < 4; i++) {
            int row = g + i / 2 * 8, column = 2 * t + i % 2;
            double sum = d[i];
            for (int k = 0; k < 16; k++) {
                uint32_t wa = operands_of(warp, row % 8 * 4 + k % 8 / 2).a[row / 8 + k / 8 * 2];
                uint32_t wb = operands_of(warp, column * 4 + k % 8 / 2).b[k / 8];
                sum += (double)widen((uint16_t)(wa >> k % 2 * 16)) *
                       widen((uint16_t)(wb >> k % 2 * 16));
            }
            result[i] = (float)sum;
        }
    });
    memcpy(d, result, sizeof result);
}

void mma_s8(int32_t d[4], const uint32_t a[4], const uint32_t b[2]) {
    mma_operands mine = {a, b};
    int32_t result[4];
    collective(&mine, [&](fiber *warp) {
        int g = current->lane / 4, t = current->lane % 4;
        for (int i = 0; i < 4; i++) {
            int row = g + i / 2 * 8, column = 2 * t + i % 2;
            result[i] = d[i];
            for (int k = 0; k < 32; k++) {
                uint32_t wa = operands_of(warp, row % 8 * 4 + k % 16 / 4).a[row / 8 + k / 16 * 2];
                uint32_t wb = operands_of(warp, column * 4 + k % 16 / 4).b[k / 16];
                result[i] += (int8_t)(wa >> k % 4 * 8) * (int8_t)(wb >> k % 4 * 8);
            }
        }
    });
    memcpy(d, result, sizeof result);
}

void load_matrix(uint32_t *fragment, int matrices, const void *row) {
    if (current->lane < matrices * 8 && (!is_shared(row, 16) || (uintptr_t)row % 16 != 0))
        fail("ldmatrix of a row that is not 16 aligned bytes of shared memory");
    uint32_t result[4];
    collective(row, [&](fiber *warp) {
        for (int i = 0; i < matrices; i++)
            result[i] =
                ((const uint32_t *)warp[i * 8 + current->lane / 4].operands)[current->lane % 4];
    });
    memcpy(fragment, result, (size_t)matrices * 4);
}

void copy_async(void *to, const void *from, bool valid) {
    if (!is_shared(to, 16) || (uintptr_t)to % 16 != 0 || (uintptr_t)from % 16 != 0)
        fail("an asynchronous copy that is misaligned or not to shared memory");
    current->copies.push_back({to, from, valid});
}

void commit_copies() {
    current->groups.push_back(current->copies.size());
}

void wait_copies(int pending) {
    fiber *f = current;
    if (f->groups.size() <= (size_t)pending)
        return;
    size_t groups = f->groups.size() - (size_t)pending, end = f->groups[groups - 1];
    f->wrote_unfenced = f->wrote_unfenced || end > 0;
    for (size_t i = 0; i < end; i++) {
        if (f->copies[i].valid)
            memcpy(f->copies[i].shared, f->copies[i].global, 16);
        else
            memset(f->copies[i].shared, 0, 16);
    }
    f->copies.erase(f->copies.begin(), f->copies.begin() + (ptrdiff_t)end);
    f->groups.erase(f->groups.begin(), f->groups.begin() + (ptrdiff_t)groups);
    for (size_t &group : f->groups)
        group -= end;
}

uint32_t shared_offset(const void *address) {
    if (!is_shared(address, 1))
        fail("an address that is not in shared memory");
    return (uint32_t)((const char *)address - shared);
}

void fence_async_proxy() {
    current->wrote_unfenced = false;
}

static void add_product(const product &added) {
    for (const fiber &f : fibers)
        if (f.wrote_unfenced)
            fail("a product before thread %u fenced what it copied", f.index.x);
    current->products.push_back(added);
}

void product_16bit(float *d, int columns, const uint32_t *a, uint64_t b, float (*widen)(uint16_t)) {
    add_product({d, columns, a, 0, b, widen});
}

void product_s8(int32_t *d, int columns, uint64_t a, uint64_t b) {
    add_product({d, columns, nullptr, a, b, nullptr});
}

void commit_products() {
    current->product_groups.push_back(current->products.size());
}

/* `bytes` bytes at byte `column` of a tile's row: the swizzle exchanges bits 4-6 of an address with
 * themselves xor bits 7-9. */
static const char *tile_element(uint64_t tile, int row, int column, size_t bytes) {
    uint32_t start = (uint32_t)(tile & 0x3fff) << 4, group = (uint32_t)(tile >> 32 & 0x3fff) << 4;
    if (tile >> 62 != 1 || (start & 0x380) != 0)
        fail("a tile that is not swizzled by 128 bytes or not aligned to 1024");
    uint32_t at =
        start + (uint32_t)(row / 8) * group + (uint32_t)(row % 8) * 128 + (uint32_t)column;
    at ^= (at >> 7 & 7) << 4;
    if (at + bytes > shared_bytes)
        fail("a tile beyond the end of shared memory");
    return shared + at;
}

template <class T> static T tile_value(uint64_t tile, int row, int element) {
    T value;
    memcpy(&value, tile_element(tile, row, element * (int)sizeof(T), sizeof(T)), sizeof value);
    return value;
}

static void finish_product(const fiber *warp, size_t at) {
    const product &p = current->products[at];
    int g = current->lane / 4, t = current->lane % 4, group_row = current->warp % 4 * 16;
    for (int i = 0; i < p.columns / 2; i++) {
        int row = g + i % 4 / 2 * 8, column = i / 4 * 8 + 2 * t + i % 2;
        if (p.widen) {
            double sum = ((float *)p.d)[i];
            for (int k = 0; k < 16; k++) {
                uint32_t wa = warp[row % 8 * 4 + k % 8 / 2].products[at].a[row / 8 + k / 8 * 2];
                sum += (double)p.widen((uint16_t)(wa >> k % 2 * 16)) *
                       p.widen(tile_value<uint16_t>(p.tile_b, column, k));
            }
            ((float *)p.d)[i] = (float)sum;
        } else {
            for (int k = 0; k < 32; k++)
                ((int32_t *)p.d)[i] += tile_value<int8_t>(p.tile_a, group_row + row, k) *
                                       tile_value<int8_t>(p.tile_b, column, k);
        }
    }
}

void wait_products(int pending) {
    fiber *f = current;
    barrier(&fiber::waits_for_group);
    size_t groups = f->product_groups.size(),
           done = groups > (size_t)pending ? groups - (size_t)pending : 0;
    size_t end = done ? f->product_groups[done - 1] : 0;
    for (size_t i = 0; i < end; i++)
        finish_product(warp_of(f), i);
    barrier(&fiber::waits_for_group);
    f->products.erase(f->products.begin(), f->products.begin() + (ptrdiff_t)end);
    f->product_groups.erase(f->product_groups.begin(), f->product_groups.begin() + (ptrdiff_t)done);
    for (size_t &group : f->product_groups)
        group -= end;
}

void run(const char *name, dim3 grid, dim3 threads, size_t shared_size,
         const std::function<void()> &body) {
    kernel_name = name;
    size_t count = (size_t)threads.x * threads.y * threads.z;
    if (count == 0 || count > 1024 || count % LANES != 0)
        fail("%zu threads in a block", count);
    if (grid.x == 0 || grid.x > 0x7fffffffu || grid.y == 0 || grid.y > 65535 || grid.z == 0 ||
        grid.z > 65535)
        fail("a grid of %u x %u x %u", grid.x, grid.y, grid.z);
    if (shared_size > current_device.shared_limit)
        fail("%zu bytes of shared memory", shared_size);
    static std::vector<char *> stacks;
    while (stacks.size() < count)
        stacks.push_back((char *)aligned_alloc(64, STACK_BYTES));
    launches++;
    kernel = &body;
    block_size = threads;
    grid_size = grid;
    shared_bytes = shared_size;
    fibers.assign(count, fiber());
    for (size_t i = 0; i < count; i++) {
        unsigned index = (unsigned)i;
        fibers[i].stack = stacks[i];
        fibers[i].index =
            dim3(index % threads.x, index / threads.x % threads.y, index / threads.x / threads.y);
        fibers[i].warp = (int)(i / LANES);
        fibers[i].lane = (int)(i % LANES);
    }
    for (size_t at : in_order((size_t)grid.x * grid.y * grid.z, 17)) {
        block = dim3((unsigned)(at % grid.x), (unsigned)(at / grid.x % grid.y),
                     (unsigned)(at / grid.x / grid.y));
        void *memory = nullptr; /* exactly as large as asked for, for AddressSanitizer */
        if (posix_memalign(&memory, 1024, shared_size) != 0)
            fail("no memory for shared memory");
        shared = (char *)memory;
        memset(shared, 0xff, shared_size);
        run_block((uint32_t)at);
        free(shared);
        shared = nullptr;
    }
    kernel_name = nullptr;
}

} // namespace emulator

void emulator_set_order(uint32_t order) {
    emulator::order_seed = order;
}

void emulator_set_device(int compute_capability, int processors, size_t shared_limit) {
    emulator::current_device = {compute_capability, processors, shared_limit};
}

void emulator_fail_next_launch(const char *message) {
    emulator::next_failure = message;
}

int64_t emulator_launches(void) {
    return emulator::launches;
}

void emulator_last_call(int *device, void **stream, bool *batch_invariant) {
    *device = emulator::last_call.device;
    *stream = emulator::last_call.stream;
    *batch_invariant = emulator::last_call.batch_invariant;
}
