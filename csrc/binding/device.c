/* device.c - see device.h. Torch before 2.10 has no exchange API: its Python functions serve. */
#include "device.h"

#include "kernels.h"

#include <string.h>

void bnbq_describe_device(DLDevice device, char text[BNBQ_DEVICE_TEXT]) {
    if (device.device_type == DL_CPU)
        PyOS_snprintf(text, BNBQ_DEVICE_TEXT, "the CPU");
    else if (device.device_type == DL_CUDA)
        PyOS_snprintf(text, BNBQ_DEVICE_TEXT, "cuda:%d", (int)device.device_id);
    else
        PyOS_snprintf(text, BNBQ_DEVICE_TEXT, "a device of DLPack type %d",
                      (int)device.device_type);
}

/* New reference: torch, which gave the tensors and so is imported. */
static PyObject *get_torch(void) {
    PyObject *modules = PyImport_GetModuleDict(); /* borrowed */
    return modules == NULL ? NULL : PyMapping_GetItemString(modules, "torch");
}

/* ------------------------------------------------------------------ the stream */

/* torch.cuda.current_stream(device).cuda_stream */
static bool ask_stream(int device, void **stream) {
    PyObject *torch = get_torch();
    PyObject *cuda = torch == NULL ? NULL : PyObject_GetAttrString(torch, "cuda");
    PyObject *current =
        cuda == NULL ? NULL : PyObject_CallMethod(cuda, "current_stream", "i", device);
    PyObject *handle = current == NULL ? NULL : PyObject_GetAttrString(current, "cuda_stream");
    if (handle != NULL)
        *stream = PyLong_AsVoidPtr(handle);
    Py_XDECREF(handle);
    Py_XDECREF(current);
    Py_XDECREF(cuda);
    Py_XDECREF(torch);
    return PyErr_Occurred() == NULL;
}

/* ------------------------------------------------------------------ memory */

/* DLExchangeApi.allocate's set_error: the message is kept, and raised by whoever has the GIL. */
static void keep_message(void *context, const char *kind, const char *message) {
    bnbq_call *call = context;
    (void)kind;
    PyOS_snprintf(call->cuda.error, sizeof call->cuda.error, "%s", message);
}

static DLManagedTensorVersioned *request(bnbq_call *call, DLDataType dtype, int64_t *shape,
                                         int ndim) {
    DLTensor wanted = {.device = call->device, .ndim = ndim, .dtype = dtype, .shape = shape};
    DLManagedTensorVersioned *managed = NULL;
    return call->state->torch->allocate(&wanted, &managed, call, keep_message) == 0 ? managed
                                                                                    : NULL;
}

void bnbq_no_cuda_memory(const bnbq_call *call, const char *what) {
    PyObject *torch = get_torch();
    PyObject *type = torch == NULL ? NULL : PyObject_GetAttrString(torch, "OutOfMemoryError");
    if (type == NULL)
        PyErr_Clear(); /* torch before 2.5 */
    bnbq_fail(call, type == NULL ? PyExc_MemoryError : type, "%s: %s", what, call->cuda.error);
    Py_XDECREF(type);
    Py_XDECREF(torch);
}

PyObject *bnbq_allocate_cuda(bnbq_call *call, bnbq_arg *out, DLDataType dtype, int64_t *shape,
                             int ndim) {
    DLManagedTensorVersioned *managed = request(call, dtype, shape, ndim);
    if (managed == NULL) {
        bnbq_no_cuda_memory(call, "out cannot be allocated");
        return NULL;
    }
    void *tensor;
    out->dl = managed->dl_tensor;
    return call->state->torch->import_managed(managed, &tensor) == 0 ? tensor : NULL;
}

/* torch.empty(bytes, dtype=torch.uint8, device="cuda:0"), with the GIL. Its exception stays set. */
static PyObject *empty_tensor(const bnbq_call *call, size_t bytes, void **data) {
    char device[BNBQ_DEVICE_TEXT];
    bnbq_describe_device(call->device, device);
    PyObject *torch = get_torch();
    PyObject *empty = torch == NULL ? NULL : PyObject_GetAttrString(torch, "empty");
    PyObject *uint8 = empty == NULL ? NULL : PyObject_GetAttrString(torch, "uint8");
    PyObject *sizes = uint8 == NULL ? NULL : Py_BuildValue("(n)", (Py_ssize_t)bytes);
    PyObject *keywords =
        sizes == NULL ? NULL : Py_BuildValue("{s:O,s:s}", "dtype", uint8, "device", device);
    PyObject *tensor = keywords == NULL ? NULL : PyObject_Call(empty, sizes, keywords);
    PyObject *address = tensor == NULL ? NULL : PyObject_CallMethod(tensor, "data_ptr", NULL);
    *data = address == NULL ? NULL : PyLong_AsVoidPtr(address);
    if (*data == NULL)
        Py_CLEAR(tensor);
    Py_XDECREF(address);
    Py_XDECREF(keywords);
    Py_XDECREF(sizes);
    Py_XDECREF(uint8);
    Py_XDECREF(empty);
    Py_XDECREF(torch);
    return tensor;
}

/* bnbq_cuda_call.allocate, called without the GIL. */
static void *allocate_space(void *owner, size_t bytes) {
    bnbq_call *call = owner;
    void *space, *data;
    if (call->spaces == BNBQ_SPACES || bytes > PTRDIFF_MAX)
        return NULL;
    if (call->state->torch != NULL) {
        int64_t shape[1] = {(int64_t)bytes};
        DLManagedTensorVersioned *managed = request(call, (DLDataType){DL_UINT, 8, 1}, shape, 1);
        space = managed;
        data = managed == NULL ? NULL
                               : (char *)managed->dl_tensor.data + managed->dl_tensor.byte_offset;
    } else {
        PyEval_RestoreThread(call->thread);
        space = empty_tensor(call, bytes, &data);
        call->thread = PyEval_SaveThread();
    }
    if (space != NULL)
        call->space[call->spaces++] = space;
    return data;
}

void bnbq_free_spaces(bnbq_call *call) {
    while (call->spaces > 0) {
        void *space = call->space[--call->spaces];
        if (call->state->torch == NULL) {
            Py_DECREF((PyObject *)space);
        } else {
            DLManagedTensorVersioned *managed = space;
            if (managed->deleter != NULL)
                managed->deleter(managed);
        }
    }
}

/* ------------------------------------------------------------------ a call */

bool bnbq_enter_cuda(bnbq_call *call) {
    bnbq_cuda_call *cuda = &call->cuda;
    *cuda = (bnbq_cuda_call){.device = call->device.device_id,
                             .batch_invariant = bnbq_batch_invariant(),
                             .allocate = allocate_space,
                             .owner = call};
    if (call->state->torch == NULL) {
        if (!ask_stream(cuda->device, &cuda->stream))
            return false;
    } else if (call->state->torch->current_stream(DL_CUDA, cuda->device, &cuda->stream) != 0) {
        if (PyErr_Occurred() == NULL)
            bnbq_fail(call, PyExc_RuntimeError, "torch has no current stream for cuda:%d",
                      cuda->device);
        return false;
    }
    call->thread = PyEval_SaveThread();
    return true;
}

void bnbq_leave_cuda(bnbq_call *call) {
    PyEval_RestoreThread(call->thread);
}
