/* dlpack.h - the part of the DLPack 1.x ABI that bnbq reads, declared from its specification.
 *
 * https://dmlc.github.io/dlpack/latest/  A producer hands out tensors in one of three ways:
 *   __dlpack_c_exchange_api__  a capsule on the type: a table of C functions (struct below)
 *   __dlpack__()               a capsule "dltensor_versioned" (DLPack 1.x), or
 *                              a capsule "dltensor" (0.x), both with a deleter
 * Layouts are fixed for the major version 1; nothing here may be reordered.
 */
#ifndef BNBQ_DLPACK_H
#define BNBQ_DLPACK_H

#include <stdint.h>

enum { DLPACK_MAJOR = 1, DLPACK_MINOR = 0 };

/* DLDevice.device_type */
enum { DL_CPU = 1, DL_CUDA = 2, DL_CUDA_HOST = 3, DL_ROCM = 10, DL_ROCM_HOST = 11 };

/* DLDataType.code */
enum { DL_INT = 0, DL_UINT = 1, DL_FLOAT = 2, DL_BFLOAT = 4, DL_COMPLEX = 5, DL_BOOL = 6 };

typedef struct DLVersion {
    uint32_t major, minor;
} DLVersion;

typedef struct DLDevice {
    int32_t device_type;
    int32_t device_id;
} DLDevice;

typedef struct DLDataType {
    uint8_t code, bits;
    uint16_t lanes;
} DLDataType;

typedef struct DLTensor {
    void *data;
    DLDevice device;
    int32_t ndim;
    DLDataType dtype;
    int64_t *shape;
    int64_t *strides; /* in elements; NULL (before 1.2) means row-major */
    uint64_t byte_offset;
} DLTensor;

typedef struct DLManagedTensor {
    DLTensor dl_tensor;
    void *manager_ctx;
    void (*deleter)(struct DLManagedTensor *self);
} DLManagedTensor;

enum { DL_FLAG_READ_ONLY = 1 };

typedef struct DLManagedTensorVersioned {
    DLVersion version;
    void *manager_ctx;
    void (*deleter)(struct DLManagedTensorVersioned *self);
    uint64_t flags;
    DLTensor dl_tensor;
} DLManagedTensorVersioned;

typedef struct DLExchangeHeader {
    DLVersion version;
    struct DLExchangeHeader *previous; /* an older table, or NULL */
} DLExchangeHeader;

typedef struct DLExchangeApi {
    DLExchangeHeader header;
    int (*allocate)(DLTensor *prototype, DLManagedTensorVersioned **out, void *context,
                    void (*set_error)(void *context, const char *kind, const char *message));
    int (*export_managed)(void *object, DLManagedTensorVersioned **out);
    int (*import_managed)(DLManagedTensorVersioned *tensor, void **object);
    int (*borrow)(void *object, DLTensor *out); /* may be NULL; lives as long as the object */
    int (*current_stream)(int32_t device_type, int32_t device_id, void **stream);
} DLExchangeApi;

#endif
