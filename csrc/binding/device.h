/* device.h - operations on a GPU: torch's current stream, and memory from torch's allocator.
 *
 * Nothing here waits for the GPU. All work of a call goes to one stream, and torch hands out freed
 * memory again in that stream's order only: so working space is given back as soon as the operation
 * has been enqueued, also while a CUDA graph is captured, whose pool it then belongs to.
 */
#ifndef BNBQ_BINDING_DEVICE_H
#define BNBQ_BINDING_DEVICE_H

#include "tensor.h"

/* "cuda:0", "the CPU" */
enum { BNBQ_DEVICE_TEXT = 48 };
void bnbq_describe_device(DLDevice device, char text[BNBQ_DEVICE_TEXT]);

static inline bool bnbq_on_cuda(const bnbq_call *call) {
    return call->device.device_type == DL_CUDA;
}

/* Around a bnbq_cuda_* function, which is given &call->cuda. The GIL is let go of in between,
 * although a launch is short: CUDA makes it wait where its queue is full or memory is found by
 * freeing some, and what it waits for may be a callback that wants the GIL. */
bool bnbq_enter_cuda(bnbq_call *call);
void bnbq_leave_cuda(bnbq_call *call);

/* Raise what torch raises for this, a RuntimeError: code that retries with less looks for it. */
void bnbq_no_cuda_memory(const bnbq_call *call, const char *what);

/* New reference: an uninitialised tensor on the call's device; `out` views it. The module's torch
 * has the exchange API. */
PyObject *bnbq_allocate_cuda(bnbq_call *call, bnbq_arg *out, DLDataType dtype, int64_t *shape,
                             int ndim);

/* In bnbq_release. */
void bnbq_free_spaces(bnbq_call *call);

#endif
