/* stub.c - the GPU half of a build without CUDA: it says so. */
#include "bnbq_cuda.h"

#include <stddef.h>

const char *bnbq_cuda_toolkit(void) {
    return NULL;
}

const char *bnbq_cuda_archs(void) {
    return "";
}
