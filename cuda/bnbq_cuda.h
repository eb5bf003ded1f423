/* bnbq_cuda.h - the GPU half as the rest of the extension sees it: plain C, no CUDA header.
 *
 * Either cuda/stub.c or the .cu files of this folder define these functions, never both; setup.py
 * decides and build_info() tells.
 */
#ifndef BNBQ_CUDA_H
#define BNBQ_CUDA_H

#ifdef __cplusplus
extern "C" {
#endif

/* "13.0": the toolkit that compiled the GPU half. NULL: built without CUDA. */
const char *bnbq_cuda_toolkit(void);
/* "sm_80 sm_90": what it was compiled for. "" without CUDA. */
const char *bnbq_cuda_archs(void);

#ifdef __cplusplus
}
#endif

#endif
