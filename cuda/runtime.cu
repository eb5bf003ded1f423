/* runtime.cu - devices, launches, and what the rest of the extension asks about this build. */
#include "launch.cuh"

#include <stdio.h>
#include <stdlib.h>

#ifdef BNBQ_EMULATE

const char *bnbq_cuda_toolkit(void) {
    return "emulated";
}

const char *bnbq_cuda_archs(void) {
    return "emulated";
}

device_guard::device_guard(bnbq_cuda_call *call) : status(BNBQ_OK), previous(call->device) {}

device_guard::~device_guard() {}

bnbq_status get_facts(bnbq_cuda_call *call, device_facts *facts) {
    (void)call;
    emulator::device device = emulator::current_device;
    *facts = {device.compute_capability, device.processors, (int)device.shared_limit};
    return BNBQ_OK;
}

/* Only for launches that the tests want to fail. */
bnbq_status launch_kernel(bnbq_cuda_call *call, const void *, std::atomic<uint64_t> *, dim3,
                          unsigned, size_t, void **) {
    snprintf(call->error, sizeof call->error, "%s", emulator::next_failure);
    emulator::next_failure = nullptr;
    return BNBQ_DEVICE_ERROR;
}

#else

#define TEXT(x) #x
#define VERSION(major, minor) TEXT(major) "." TEXT(minor)

const char *bnbq_cuda_toolkit(void) {
    return VERSION(__CUDACC_VER_MAJOR__, __CUDACC_VER_MINOR__);
}

const char *bnbq_cuda_archs(void) {
    return BNBQ_CUDA_ARCHS;
}

static bnbq_status check(bnbq_cuda_call *call, cudaError_t error) {
    if (error == cudaSuccess)
        return BNBQ_OK;
    cudaGetLastError(); /* do not leave it to whoever asks next */
    snprintf(call->error, sizeof call->error, "%s (%s)", cudaGetErrorString(error),
             cudaGetErrorName(error));
    return BNBQ_DEVICE_ERROR;
}

device_guard::device_guard(bnbq_cuda_call *call) : previous(call->device) {
    status = check(call, cudaGetDevice(&previous));
    if (status == BNBQ_OK && previous != call->device)
        status = check(call, cudaSetDevice(call->device));
    if (status != BNBQ_OK)
        previous = call->device; /* nothing to restore */
}

device_guard::~device_guard() {
    int current;
    if (cudaGetDevice(&current) == cudaSuccess && current != previous)
        cudaSetDevice(previous);
}

enum { DEVICES = 64 };

static bnbq_status ask_facts(bnbq_cuda_call *call, device_facts *facts) {
    int major, minor, device = call->device;
    TRY(check(call, cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device)));
    TRY(check(call, cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device)));
    facts->capability = 10 * major + minor;
    TRY(check(call, cudaDeviceGetAttribute(&facts->multiprocessors, cudaDevAttrMultiProcessorCount,
                                           device)));
    return check(call, cudaDeviceGetAttribute(&facts->shared_limit,
                                              cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
}

bnbq_status get_facts(bnbq_cuda_call *call, device_facts *facts) {
    static device_facts known[DEVICES];
    static std::atomic<bool> is_known[DEVICES];
    int device = call->device;
    if (device < 0 || device >= DEVICES)
        return ask_facts(call, facts);
    if (!is_known[device].load(std::memory_order_acquire)) {
        device_facts asked; /* two threads may both ask, and write the same */
        TRY(ask_facts(call, &asked));
        known[device] = asked;
        is_known[device].store(true, std::memory_order_release);
    }
    *facts = known[device];
    return BNBQ_OK;
}

bnbq_status launch_kernel(bnbq_cuda_call *call, const void *kernel, std::atomic<uint64_t> *prepared,
                          dim3 grid, unsigned threads, size_t shared, void **arguments) {
    enum { UNASKED = 48 * 1024 }; /* shared memory that any kernel may use */
    uint64_t bit = call->device < DEVICES ? UINT64_C(1) << call->device : 0;
    if (shared > UNASKED && !(prepared->load(std::memory_order_acquire) & bit)) {
        device_facts facts; /* all that there is: a later launch may want more than this one */
        TRY(get_facts(call, &facts));
        TRY(check(call, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                             facts.shared_limit)));
        prepared->fetch_or(bit, std::memory_order_release);
    }
    return check(call, cudaLaunchKernel(kernel, grid, dim3(threads), arguments, shared,
                                        (cudaStream_t)call->stream));
}

#endif

bool wgmma_is_on() {
    const char *value = getenv("BNBQ_CUDA_WGMMA");
    return value && value[0] == '1';
}

bnbq_status bnbq_cuda_capability(bnbq_cuda_call *call, int *capability) {
    device_facts facts;
    TRY(get_facts(call, &facts));
    *capability = facts.capability;
    return BNBQ_OK;
}
