/* tensor.h - from Python objects to checked views of memory.
 *
 * An operation declares a bnbq_call on its stack, asks for each tensor argument by name and kind,
 * and ends at one label with bnbq_release. Every function that can fail sets a Python exception
 * and returns NULL or false; messages read "operation: argument, what came, what is wanted".
 */
#ifndef BNBQ_BINDING_TENSOR_H
#define BNBQ_BINDING_TENSOR_H

#include <Python.h>
#include <stdbool.h>

#include "../../cuda/bnbq_cuda.h"
#include "bnbq.h"
#include "dlpack.h"

/* Module state. Types are owned references; they are looked up when torch is first seen. */
typedef struct bnbq_state {
    PyTypeObject *tensor;       /* torch.Tensor, NULL until torch has been imported */
    PyTypeObject *parameter;    /* torch.nn.Parameter */
    const DLExchangeApi *torch; /* NULL: this torch has no exchange API */
    PyObject *is_neg;           /* torch.Tensor.is_neg */
    PyObject *plain_dispatch;   /* torch.Tensor.__torch_dispatch__ */
} bnbq_state;

enum { BNBQ_ARGS = 8, BNBQ_ARG_DIMS = 64, BNBQ_SPACES = 16 };

/* Kinds of tensor: sets of dtypes. */
enum {
    BNBQ_IS_F32 = 1 << BNBQ_F32,
    BNBQ_IS_FLOAT = 1 << BNBQ_F32 | 1 << BNBQ_BF16 | 1 << BNBQ_F16,
    BNBQ_IS_U8 = 1 << BNBQ_U8,
    BNBQ_IS_I8 = 1 << BNBQ_I8,
};

typedef struct bnbq_arg {
    const char *name;
    DLTensor dl; /* byte_offset is folded into data; strides are never NULL */
    bnbq_dtype dtype;
    int64_t count;
    bool output;
    void *managed; /* what __dlpack__ gave, until bnbq_release */
    bool versioned;
    int64_t strides[BNBQ_ARG_DIMS]; /* storage for dl.strides where the producer has none */
} bnbq_arg;

typedef struct bnbq_call {
    const char *op;
    bnbq_state *state;
    DLDevice device; /* of every argument: the CPU or a CUDA device; the first one sets it */
    int64_t n, k;    /* of the weight, once it has been checked; n is -1 before */
    int count;
    bnbq_arg args[BNBQ_ARGS];

    /* On a CUDA device: device.h. */
    bnbq_cuda_call cuda;
    PyThreadState *thread;
    int spaces;
    void *space[BNBQ_SPACES]; /* what holds the working space until bnbq_release */
} bnbq_call;

bool bnbq_tensor_import(void); /* NumPy's C API; once per process */

void bnbq_begin(bnbq_call *call, bnbq_state *state, const char *op);

/* The argument as a view; `kinds` is a set of dtypes. Inputs may have any strides, outputs must be
 * writable and must not overlap themselves. */
bnbq_arg *bnbq_input(bnbq_call *call, PyObject *object, const char *name, unsigned kinds);
bnbq_arg *bnbq_output(bnbq_call *call, PyObject *object, const char *name, unsigned kinds);
/* The same, and the elements lie in row-major order without gaps. */
bnbq_arg *bnbq_packed_input(bnbq_call *call, PyObject *object, const char *name, unsigned kinds);
bnbq_arg *bnbq_packed_output(bnbq_call *call, PyObject *object, const char *name, unsigned kinds);
/* A new output "out", uninitialised, of the kind, dtype and device of `object`, which `like` views,
 * and of its shape but for the last dimension. *result: a new reference to it. */
bnbq_arg *bnbq_new_output(bnbq_call *call, PyObject *object, const bnbq_arg *like, int64_t width,
                          PyObject **result);

/* After the last argument: no output shares memory with anything else. */
bool bnbq_finish(bnbq_call *call);
void bnbq_release(bnbq_call *call);

/* The view for the core: the last dimension as it is, the others merged where strides allow. */
bool bnbq_rows(bnbq_call *call, const bnbq_arg *view, bnbq_tensor *out);
/* New reference: the shape as a tuple. */
PyObject *bnbq_shape(const bnbq_arg *view);

/* Raise `type` with "op: " before the message; returns false. */
bool bnbq_fail(const bnbq_call *call, PyObject *type, const char *format, ...);

#endif
