/* operation.h - what every operation does: it begins, views and checks its tensors (tensor.h,
 * arguments.h), runs, and finishes or is abandoned.
 */
#ifndef BNBQ_BINDING_OPERATION_H
#define BNBQ_BINDING_OPERATION_H

#include "device.h"
#include "ops.h"

/* The GIL is kept for less work than this, in multiplications: some 2 us for a vector kernel.
 * Giving it up and taking it back costs 0.1 us alone, but up to 5 ms (sys.getswitchinterval) where
 * another thread is waiting for it. */
enum { BNBQ_KEEP_GIL = 1 << 15 };

/* status = the core's function or that of the GPU, where the tensors are; `work` is for the core.
 */
#define BNBQ_RUN(status, call, work, on_cpu, on_cuda)                                              \
    do {                                                                                           \
        if (bnbq_on_cuda(call)) {                                                                  \
            status = BNBQ_DEVICE_ERROR;                                                            \
            if (bnbq_enter_cuda(call)) {                                                           \
                status = on_cuda;                                                                  \
                bnbq_leave_cuda(call);                                                             \
            }                                                                                      \
        } else {                                                                                   \
            PyThreadState *thread = (work) < BNBQ_KEEP_GIL ? NULL : PyEval_SaveThread();           \
            status = on_cpu;                                                                       \
            if (thread != NULL)                                                                    \
                PyEval_RestoreThread(thread);                                                      \
        }                                                                                          \
    } while (0)

/* Raises for another number of arguments. What has begun ends with one of the next two. */
bool bnbq_begin_operation(bnbq_call *call, PyObject *module, const char *op, Py_ssize_t got,
                          Py_ssize_t wanted);
/* The result if all went well; otherwise raises, unless something has, and drops it. */
PyObject *bnbq_finish_operation(bnbq_call *call, bnbq_status status, PyObject *result);
/* An exception is set. Drops the result, which may be NULL; returns NULL. */
PyObject *bnbq_abandon_operation(bnbq_call *call, PyObject *result);

bool bnbq_has_columns(const bnbq_call *call, const bnbq_arg *view);
static inline int64_t bnbq_columns(const bnbq_arg *view) {
    return view->dl.shape[view->dl.ndim - 1];
}

#endif
