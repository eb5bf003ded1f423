/* memory.h - what tensor.c and memory.c know of each other. */
#ifndef BNBQ_BINDING_MEMORY_H
#define BNBQ_BINDING_MEMORY_H

#include "tensor.h"

/* Fills in arg->dl and, if the producer wants its memory back, arg->managed. `kinds` only serves
 * the message about a dtype that DLPack cannot say. */
bool bnbq_find_memory(bnbq_call *call, bnbq_arg *arg, PyObject *object, unsigned kinds);

/* New reference: an uninitialised tensor of the kind, dtype and device of `object`, which `like`
 * views, and of its shape but for the last dimension. Fills in out->dl and perhaps out->managed. */
PyObject *bnbq_allocate(bnbq_call *call, bnbq_arg *out, PyObject *object, const bnbq_arg *like,
                        int64_t width);

/* Memory there can be used, and the other arguments lie there too. */
bool bnbq_check_device(bnbq_call *call, const char *name, DLDevice device);
bool bnbq_wrong_dtype(const bnbq_call *call, const bnbq_arg *arg, PyObject *got, unsigned kinds);
PyObject *bnbq_tuple(const int64_t *sizes, int count);

#endif
