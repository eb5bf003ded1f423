/* operation.c - how operations begin and end; see operation.h. */
#include "operation.h"

#include "arguments.h"

bool bnbq_begin_operation(bnbq_call *call, PyObject *module, const char *op, Py_ssize_t got,
                          Py_ssize_t wanted) {
    bnbq_begin(call, PyModule_GetState(module), op);
    return got == wanted ||
           bnbq_fail(call, PyExc_TypeError, "got %zd arguments, wanted %zd", got, wanted);
}

bool bnbq_has_columns(const bnbq_call *call, const bnbq_arg *view) {
    return view->dl.ndim > 0 || bnbq_wrong_shape(call, view, "at least one dimension");
}

/* "linear4bit on cuda:0, x (2, 4096), weight (4096, 4096): out of memory" */
static void device_error(const bnbq_call *call) {
    const bnbq_arg *first = &call->args[0];
    char device[BNBQ_DEVICE_TEXT], weight[64] = "";
    bnbq_describe_device(call->device, device);
    if (call->n >= 0)
        PyOS_snprintf(weight, sizeof weight, ", weight (%lld, %lld)", (long long)call->n,
                      (long long)call->k);
    PyObject *shape = bnbq_shape(first);
    if (shape != NULL)
        PyErr_Format(PyExc_RuntimeError, "%s on %s, %s %S%s: %s", call->op, device, first->name,
                     shape, weight, call->cuda.error);
    Py_XDECREF(shape);
}

/* A result that nobody gets, whether or not an exception is set: freeing its memory may run Python.
 */
static void drop(PyObject *result) {
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    Py_XDECREF(result);
    PyErr_Restore(type, value, traceback);
}

PyObject *bnbq_finish_operation(bnbq_call *call, bnbq_status status, PyObject *result) {
    if (status != BNBQ_OK) {
        drop(result);
        result = NULL;
        if (PyErr_Occurred() != NULL) { /* it has been said what is wrong */
        } else if (status == BNBQ_NO_MEMORY && bnbq_on_cuda(call)) {
            bnbq_no_cuda_memory(call, "no memory for working space");
        } else if (status == BNBQ_NO_MEMORY) {
            bnbq_fail(call, PyExc_MemoryError, "no memory for working space");
        } else if (status == BNBQ_NOT_FINITE) { /* of a weight: with its index, before this */
            bnbq_fail(call, PyExc_ValueError, "absmax has a NaN or an Inf, wanted finite scales");
        } else {
            device_error(call);
        }
    }
    bnbq_release(call);
    return result;
}

PyObject *bnbq_abandon_operation(bnbq_call *call, PyObject *result) {
    bnbq_release(call);
    drop(result);
    return NULL;
}
