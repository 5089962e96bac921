// cuBLAS and cuBLASLt of the pretended card, as far as torch uses them.
//
// Real: that a product was launched, and on which stream. Pretended: everything else. No layout,
// no dtype and no epilogue is refused. Signatures are ours: C finds these functions by name alone.

#include <stdint.h>
#include <stdlib.h>

#include "pretended.h"

#define DESCRIPTOR 1024    // bytes, more than any descriptor has
#define HEURISTIC 96       // bytes of a cublasLtMatmulHeuristicResult_t
#define VERSION 130100

typedef struct {
  void *stream;
  int math_mode;
  int pointer_mode;
} Handle;

// cuBLAS: the handle knows the stream

EXPORT int cublasCreate_v2(void **handle) {
  *handle = calloc(1, sizeof(Handle));
  return 0;
}

EXPORT int cublasDestroy_v2(void *handle) {
  free(handle);
  return 0;
}

EXPORT int cublasSetStream_v2(Handle *handle, void *stream) {
  handle->stream = stream;
  return 0;
}

EXPORT int cublasGetStream_v2(Handle *handle, void **stream) {
  *stream = handle->stream;
  return 0;
}

EXPORT int cublasSetWorkspace_v2(Handle *handle, void *workspace, size_t bytes) {
  (void)handle;
  (void)workspace;
  (void)bytes;
  return 0;
}

EXPORT int cublasSetMathMode(Handle *handle, int mode) {
  handle->math_mode = mode;
  return 0;
}

EXPORT int cublasGetMathMode(Handle *handle, int *mode) {
  *mode = handle->math_mode;
  return 0;
}

EXPORT int cublasSetPointerMode_v2(Handle *handle, int mode) {
  handle->pointer_mode = mode;
  return 0;
}

EXPORT int cublasGetPointerMode_v2(Handle *handle, int *mode) {
  *mode = handle->pointer_mode;
  return 0;
}

#define PRODUCT_OF(name)                   \
  EXPORT int name(Handle *handle) {        \
    pretended_count(handle->stream, PRODUCT); \
    return 0;                              \
  }

PRODUCT_OF(cublasGemmEx)
PRODUCT_OF(cublasGemmStridedBatchedEx)
PRODUCT_OF(cublasSgemmEx)
PRODUCT_OF(cublasSgemm_v2)
PRODUCT_OF(cublasDgemm_v2)
PRODUCT_OF(cublasSgemmBatched)
PRODUCT_OF(cublasDgemmBatched)
PRODUCT_OF(cublasSgemmStridedBatched)
PRODUCT_OF(cublasDgemmStridedBatched)
PRODUCT_OF(cublasSgemv_v2)
PRODUCT_OF(cublasDgemv_v2)
PRODUCT_OF(cublasSdot_v2)
PRODUCT_OF(cublasDdot_v2)
PRODUCT_OF(cublasDotEx)

// cuBLASLt: the call knows the stream

EXPORT size_t cublasLtGetVersion(void) {
  return VERSION;
}

#define DESCRIPTOR_OF(thing)                        \
  EXPORT int cublasLt##thing##Create(void **found) { \
    *found = calloc(1, DESCRIPTOR);                 \
    return 0;                                       \
  }                                                 \
  EXPORT int cublasLt##thing##Destroy(void *found) { \
    free(found);                                    \
    return 0;                                       \
  }                                                 \
  EXPORT int cublasLt##thing##SetAttribute(void *found) { \
    (void)found;                                    \
    return 0;                                       \
  }

DESCRIPTOR_OF(MatmulDesc)
DESCRIPTOR_OF(MatmulPreference)
DESCRIPTOR_OF(MatrixLayout)

EXPORT int cublasLtMatmulAlgoGetHeuristic(
    void *handle, void *product, void *a, void *b, void *c, void *d, void *preference, int asked,
    char *results, int *found) {
  (void)handle;
  (void)product;
  (void)a;
  (void)b;
  (void)c;
  (void)d;
  (void)preference;
  *found = asked > 0;
  for (int i = 0; i < HEURISTIC && asked > 0; i++) {
    results[i] = 0;  // an algorithm without a workspace
  }
  return 0;
}

EXPORT int cublasLtMatmul(
    void *handle, void *product, const void *alpha, const void *a, void *a_layout, const void *b,
    void *b_layout, const void *beta, const void *c, void *c_layout, void *d, void *d_layout,
    const void *algorithm, void *workspace, size_t workspace_bytes, void *stream) {
  (void)handle;
  (void)product;
  (void)alpha;
  (void)a;
  (void)a_layout;
  (void)b;
  (void)b_layout;
  (void)beta;
  (void)c;
  (void)c_layout;
  (void)d;
  (void)d_layout;
  (void)algorithm;
  (void)workspace;
  (void)workspace_bytes;
  pretended_count(stream, PRODUCT);
  return 0;
}
