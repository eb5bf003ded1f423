/* memory.c - where a Python object keeps its elements.
 *
 * Order of resolution: numpy.ndarray (NumPy's C API), torch.Tensor (the DLPack exchange API that
 * is cached in the module state), any type with that API, any object with __dlpack__(). The buffer
 * protocol is not in the limited API of Python 3.10.
 */
#include "memory.h"

#include "device.h"

#include <stdlib.h>
#include <string.h>

#define NPY_NO_DEPRECATED_API NPY_1_7_API_VERSION
#define NPY_TARGET_VERSION NPY_1_23_API_VERSION
#include <numpy/ndarrayobject.h>

_Static_assert(sizeof(npy_intp) == sizeof(int64_t), "bnbq needs a 64-bit platform");
_Static_assert(NPY_MAXDIMS <= BNBQ_ARG_DIMS, "room for the strides of any array");

bool bnbq_tensor_import(void) {
    return PyArray_ImportNumPyAPI() == 0;
}

/* ------------------------------------------------------------------ NumPy */

static bool is_bfloat16(PyArray_Descr *descr) {
    /* ml_dtypes registers bfloat16 as a user type; it is known by name only. */
    PyObject *name = PyObject_GetAttrString((PyObject *)descr, "name");
    bool yes = name != NULL && PyUnicode_CompareWithASCIIString(name, "bfloat16") == 0;
    Py_XDECREF(name);
    PyErr_Clear();
    return yes;
}

static bool view_array(bnbq_call *call, bnbq_arg *view, PyArrayObject *array, unsigned kinds) {
    PyArray_Descr *descr = PyArray_DESCR(array);
    DLDataType dtype = {0, 0, 1};
    switch (descr->type_num) {
    case NPY_FLOAT: dtype = (DLDataType){DL_FLOAT, 32, 1}; break;
    case NPY_HALF: dtype = (DLDataType){DL_FLOAT, 16, 1}; break;
    case NPY_UBYTE: dtype = (DLDataType){DL_UINT, 8, 1}; break;
    case NPY_BYTE: dtype = (DLDataType){DL_INT, 8, 1}; break;
    default:
        if (PyTypeNum_ISUSERDEF(descr->type_num) && is_bfloat16(descr) &&
            PyArray_ITEMSIZE(array) == 2) {
            dtype = (DLDataType){DL_BFLOAT, 16, 1};
            break;
        }
        return bnbq_wrong_dtype(call, view, (PyObject *)descr, kinds);
    }
    if (!PyArray_ISNOTSWAPPED(array))
        return bnbq_fail(call, PyExc_TypeError, "%s is not in native byte order", view->name);
    if (view->output && !PyArray_ISWRITEABLE(array))
        return bnbq_fail(call, PyExc_ValueError, "%s is read-only", view->name);
    int ndim = PyArray_NDIM(array);
    view->dl = (DLTensor){.data = PyArray_DATA(array),
                          .device = {DL_CPU, 0},
                          .ndim = ndim,
                          .dtype = dtype,
                          .shape = (int64_t *)PyArray_DIMS(array),
                          .strides = view->strides};
    npy_intp itemsize = PyArray_ITEMSIZE(array);
    for (int i = 0; i < ndim; i++) {
        npy_intp stride = PyArray_STRIDE(array, i);
        if (stride % itemsize != 0 && PyArray_DIM(array, i) > 1)
            return bnbq_fail(
                call, PyExc_ValueError,
                "%s has a stride of %zd bytes, not a multiple of its %zd byte elements", view->name,
                (Py_ssize_t)stride, (Py_ssize_t)itemsize);
        view->strides[i] = stride / itemsize;
    }
    return true;
}

/* ------------------------------------------------------------------ DLPack */

/* Cache torch's types once it has been imported. A torch that is only half imported is left for
 * the next call. Errors mean "not yet". */
static void find_torch(bnbq_state *state) {
    PyObject *modules = PyImport_GetModuleDict(); /* borrowed */
    PyObject *torch = modules == NULL ? NULL : PyMapping_GetItemString(modules, "torch");
    PyObject *tensor = torch == NULL ? NULL : PyObject_GetAttrString(torch, "Tensor");
    PyObject *nn = tensor == NULL ? NULL : PyObject_GetAttrString(torch, "nn");
    PyObject *parameter = nn == NULL ? NULL : PyObject_GetAttrString(nn, "Parameter");
    PyObject *is_neg = parameter == NULL ? NULL : PyObject_GetAttrString(tensor, "is_neg");
    PyObject *dispatch =
        is_neg == NULL ? NULL : PyObject_GetAttrString(tensor, "__torch_dispatch__");
    if (dispatch != NULL && PyType_Check(tensor) && PyType_Check(parameter)) {
        PyObject *capsule = PyObject_GetAttrString(tensor, "__dlpack_c_exchange_api__");
        const DLExchangeApi *api =
            capsule == NULL ? NULL : PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
        Py_XDECREF(capsule); /* the table is static in torch */
        if (api != NULL && api->header.version.major == DLPACK_MAJOR && api->borrow != NULL)
            state->torch = api;
        state->is_neg = is_neg, is_neg = NULL;                          /* now owned by the state */
        state->plain_dispatch = dispatch, dispatch = NULL;              /* now owned by the state */
        state->parameter = (PyTypeObject *)parameter, parameter = NULL; /* likewise */
        state->tensor = (PyTypeObject *)tensor, tensor = NULL;          /* likewise */
    }
    PyErr_Clear();
    Py_XDECREF(dispatch);
    Py_XDECREF(is_neg);
    Py_XDECREF(parameter);
    Py_XDECREF(nn);
    Py_XDECREF(tensor);
    Py_XDECREF(torch);
}

/* The producer's exception, as a RuntimeError that names the argument. Those that are not about the
 * tensor (no memory, KeyboardInterrupt) pass unchanged. */
static bool explain(const bnbq_call *call, const char *name) {
    if (PyErr_ExceptionMatches(PyExc_MemoryError) || !PyErr_ExceptionMatches(PyExc_Exception))
        return false;
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    PyObject *text = value == NULL ? NULL : PyObject_Str(value);
    PyErr_Clear();
    bnbq_fail(call, PyExc_RuntimeError, "%s gives no access to its memory: %V", name, text,
              "(no message)");
    Py_XDECREF(text);
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(traceback);
    return false;
}

static bool wrong_type(const bnbq_call *call, PyObject *error, const char *name, PyTypeObject *type,
                       const char *what) {
    PyObject *type_name = PyObject_GetAttrString((PyObject *)type, "__name__");
    if (type_name != NULL)
        bnbq_fail(call, error, "%s is a %S, %s", name, type_name, what);
    Py_XDECREF(type_name);
    return false;
}

/* Take over what a capsule from __dlpack__() holds: renaming it makes us the owner. */
static bool take_capsule(bnbq_call *call, bnbq_arg *view, PyObject *capsule) {
    uint64_t flags = 0;
    DLTensor *source;
    if (PyCapsule_IsValid(capsule, "dltensor_versioned")) {
        DLManagedTensorVersioned *managed = PyCapsule_GetPointer(capsule, "dltensor_versioned");
        if (managed->version.major != DLPACK_MAJOR)
            return bnbq_fail(call, PyExc_RuntimeError, "%s comes in DLPack %u.%u, wanted 1.x",
                             view->name, managed->version.major, managed->version.minor);
        if (PyCapsule_SetName(capsule, "used_dltensor_versioned") < 0)
            return false;
        view->managed = managed, view->versioned = true;
        flags = managed->flags;
        source = &managed->dl_tensor;
    } else if (PyCapsule_IsValid(capsule, "dltensor")) {
        DLManagedTensor *managed = PyCapsule_GetPointer(capsule, "dltensor");
        if (PyCapsule_SetName(capsule, "used_dltensor") < 0)
            return false;
        view->managed = managed, view->versioned = false;
        source = &managed->dl_tensor;
    } else {
        return bnbq_fail(call, PyExc_TypeError, "%s.__dlpack__() did not give a DLPack capsule",
                         view->name);
    }
    if (view->output && (flags & DL_FLAG_READ_ONLY))
        return bnbq_fail(call, PyExc_ValueError, "%s is read-only", view->name);
    view->dl = *source;
    return true;
}

/* Work on a GPU is ordered by torch's stream, which says nothing about memory of others. */
static bool check_torch(const bnbq_call *call, const bnbq_arg *view, PyObject *object) {
    return !bnbq_on_cuda(call) || wrong_type(call, PyExc_RuntimeError, view->name, Py_TYPE(object),
                                             "on a GPU wanted a torch.Tensor");
}

/* object.__dlpack__() */
static PyObject *ask_capsule(PyObject *object) {
    PyObject *method = PyObject_GetAttrString(object, "__dlpack__"), *empty = PyTuple_New(0);
    PyObject *keywords = Py_BuildValue("{s:(ii)}", "max_version", DLPACK_MAJOR, DLPACK_MINOR);
    PyObject *capsule = NULL;
    if (method != NULL && empty != NULL && keywords != NULL) {
        capsule = PyObject_Call(method, empty, keywords);
        if (capsule == NULL && PyErr_ExceptionMatches(PyExc_TypeError)) {
            PyErr_Clear(); /* a producer from before DLPack 1.0 knows no keywords */
            capsule = PyObject_Call(method, empty, NULL);
        }
    }
    Py_XDECREF(method);
    Py_XDECREF(empty);
    Py_XDECREF(keywords);
    return capsule;
}

/* The same of a torch tensor on a GPU: its __dlpack__ refuses any GPU but the current one. */
static PyObject *export_torch(PyObject *tensor) {
    PyObject *module = PyImport_ImportModule("torch.utils.dlpack");
    PyObject *capsule =
        module == NULL ? NULL : PyObject_CallMethod(module, "to_dlpack", "O", tensor);
    Py_XDECREF(module);
    return capsule;
}

static bool call_dlpack(bnbq_call *call, bnbq_arg *view, PyObject *object, bool is_torch) {
    PyObject *device, *capsule;
    DLDevice where;

    if (!PyObject_HasAttrString(object, "__dlpack__") || PyType_Check(object)) {
        return wrong_type(call, PyExc_TypeError, view->name, Py_TYPE(object),
                          "wanted a tensor or an array");
    }
    device = PyObject_CallMethod(object, "__dlpack_device__", NULL);
    if (device == NULL ||
        !PyArg_ParseTuple(device, "ii:__dlpack_device__", &where.device_type, &where.device_id)) {
        Py_XDECREF(device);
        return explain(call, view->name);
    }
    Py_DECREF(device);
    if (!bnbq_check_device(call, view->name, where) ||
        (!is_torch && !check_torch(call, view, object)))
        return false;
    capsule = is_torch && bnbq_on_cuda(call) ? export_torch(object) : ask_capsule(object);
    bool ok = capsule == NULL ? explain(call, view->name) : take_capsule(call, view, capsule);
    Py_XDECREF(capsule);
    return ok;
}

static bool borrow(bnbq_call *call, bnbq_arg *view, PyObject *object, const DLExchangeApi *api) {
    if (api->borrow(object, &view->dl) == 0)
        return true;
    return explain(call, view->name);
}

/* A torch tensor: its memory must be what the tensor means. */
static bool view_torch(bnbq_call *call, bnbq_arg *view, PyObject *object) {
    bnbq_state *state = call->state;
    PyTypeObject *type = Py_TYPE(object);

    if (type != state->tensor && type != state->parameter) {
        PyObject *dispatch = PyObject_GetAttrString((PyObject *)type, "__torch_dispatch__");
        bool plain = dispatch == state->plain_dispatch;
        Py_XDECREF(dispatch);
        PyErr_Clear();
        if (!plain)
            return wrong_type(call, PyExc_RuntimeError, view->name, type,
                              "which has no memory of its own");
    }
    if (state->torch != NULL) {
        if (!borrow(call, view, object, state->torch))
            return false;
    } else {
        PyObject *detached = PyObject_CallMethod(object, "detach", NULL);
        bool ok = detached != NULL && call_dlpack(call, view, detached, true);
        Py_XDECREF(detached); /* the capsule keeps the memory */
        if (!ok)
            return false;
    }
    if (view->dl.dtype.code == DL_FLOAT || view->dl.dtype.code == DL_BFLOAT) {
        /* DLPack does not say that a view is to be negated when read (z.conj().imag is one). */
        PyObject *negated = PyObject_CallFunctionObjArgs(state->is_neg, object, NULL);
        if (negated == NULL)
            return explain(call, view->name);
        Py_DECREF(negated); /* True and False live for ever */
        if (negated == Py_True)
            return bnbq_fail(call, PyExc_RuntimeError,
                             "%s has the negative bit set, wanted %s.resolve_neg()", view->name,
                             view->name);
    }
    return true;
}

bool bnbq_find_memory(bnbq_call *call, bnbq_arg *view, PyObject *object, unsigned kinds) {
    bnbq_state *state = call->state;
    PyTypeObject *type = Py_TYPE(object);

    if (type == state->tensor || type == state->parameter)
        return view_torch(call, view, object);
    if (PyArray_Check(object))
        return view_array(call, view, (PyArrayObject *)object, kinds);
    if (state->tensor == NULL) {
        find_torch(state);
        if (type == state->tensor || type == state->parameter)
            return view_torch(call, view, object);
    }
    if (state->tensor != NULL && PyType_IsSubtype(type, state->tensor))
        return view_torch(call, view, object);

    PyObject *capsule = PyObject_GetAttrString((PyObject *)type, "__dlpack_c_exchange_api__");
    if (capsule != NULL && PyCapsule_IsValid(capsule, "dlpack_exchange_api")) {
        const DLExchangeApi *api = PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
        if (api->header.version.major == DLPACK_MAJOR && api->borrow != NULL) {
            bool ok = borrow(call, view, object, api) &&
                      bnbq_check_device(call, view->name, view->dl.device) &&
                      check_torch(call, view, object);
            Py_DECREF(capsule);
            return ok;
        }
    }
    Py_XDECREF(capsule);
    PyErr_Clear();
    return call_dlpack(call, view, object, false);
}

/* ------------------------------------------------------------------ new tensors */

/* Any thread may end up here, with or without the GIL. */
static void free_result(DLManagedTensorVersioned *managed) {
    free(managed);
}

/* A row-major tensor on the CPU, in one block of memory with what describes it. The exchange API
 * has an allocator too, but then a small layer takes 0.4 us longer; so does aligned_alloc against
 * malloc, by 0.1 us: glibc keeps no free blocks at hand for it. */
static DLManagedTensorVersioned *new_result(DLDataType dtype, const int64_t *shape, int ndim,
                                            size_t bytes) {
    enum { ALIGNMENT = 64 };
    size_t head = sizeof(DLManagedTensorVersioned) + 2 * sizeof *shape * (size_t)ndim + ALIGNMENT;
    DLManagedTensorVersioned *managed = malloc(head + bytes);
    if (managed == NULL)
        return NULL;
    char *end_of_head = (char *)managed + head;
    int64_t *own_shape = (int64_t *)(managed + 1), *strides = own_shape + ndim, stride = 1;
    *managed = (DLManagedTensorVersioned){
        .version = {DLPACK_MAJOR, DLPACK_MINOR},
        .deleter = free_result,
        .dl_tensor = {.data = end_of_head - (uintptr_t)end_of_head % ALIGNMENT,
                      .device = {DL_CPU, 0},
                      .ndim = ndim,
                      .dtype = dtype,
                      .shape = own_shape,
                      .strides = strides},
    };
    for (int i = ndim - 1; i >= 0; i--) {
        own_shape[i] = shape[i];
        strides[i] = stride;
        stride = (int64_t)((uint64_t)stride * (uint64_t)(shape[i] > 1 ? shape[i] : 1));
    }
    return managed;
}

static PyObject *new_torch(bnbq_call *call, bnbq_arg *out, int64_t *shape, const bnbq_arg *like) {
    const DLTensor *dl = &like->dl;
    int64_t bytes = dl->dtype.bits / 8;
    bool fits = true;
    if (bnbq_on_cuda(call))
        return bnbq_allocate_cuda(call, out, dl->dtype, shape, dl->ndim);
    for (int i = 0; fits && i < dl->ndim; i++)
        fits = !__builtin_mul_overflow(bytes, shape[i], &bytes);
    DLManagedTensorVersioned *managed = fits && bytes < PTRDIFF_MAX / 2
                                            ? new_result(dl->dtype, shape, dl->ndim, (size_t)bytes)
                                            : NULL;
    if (managed == NULL) {
        bnbq_fail(call, PyExc_MemoryError, "out cannot be allocated");
        return NULL;
    }
    void *tensor;
    out->dl = managed->dl_tensor;
    return call->state->torch->import_managed(managed, &tensor) == 0 ? tensor : NULL;
}

PyObject *bnbq_allocate(bnbq_call *call, bnbq_arg *out, PyObject *object, const bnbq_arg *like,
                        int64_t width) {
    const bnbq_state *state = call->state;
    int64_t shape[BNBQ_ARG_DIMS];
    int ndim = like->dl.ndim;
    PyObject *result = NULL;

    if (ndim < 1 || ndim > BNBQ_ARG_DIMS) {
        bnbq_fail(call, PyExc_ValueError, "%s has %d dimensions, wanted 1 to %d", like->name, ndim,
                  BNBQ_ARG_DIMS);
        return NULL;
    }
    memcpy(shape, like->dl.shape, sizeof *shape * (size_t)ndim);
    shape[ndim - 1] = width;
    if (PyArray_Check(object)) {
        PyArray_Descr *descr = PyArray_DESCR((PyArrayObject *)object);
        Py_INCREF(descr); /* PyArray_Empty takes it */
        result = PyArray_Empty(ndim, (npy_intp *)shape, descr, 0);
    } else if (state->tensor == NULL || !PyType_IsSubtype(Py_TYPE(object), state->tensor)) {
        bnbq_fail(call, PyExc_TypeError, "out is an int; wanted a tensor for this kind of %s",
                  like->name);
    } else if (state->torch != NULL) {
        return new_torch(call, out, shape, like);
    } else {
        PyObject *sizes = bnbq_tuple(shape, ndim);
        if (sizes != NULL)
            result = PyObject_CallMethod(object, "new_empty", "(O)", sizes);
        Py_XDECREF(sizes);
    }
    if (result != NULL && !bnbq_find_memory(call, out, result, BNBQ_IS_FLOAT))
        Py_CLEAR(result);
    return result;
}
