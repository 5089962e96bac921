// Captures and graphs of the pretended card.
//
// Real: which launches a graph holds, and how many; a capture that waited, or whose streams did not
// come together, fails as CUDA's does. Pretended: a replay, which only counts.

#include <stdlib.h>

#include "capture.h"

typedef struct {
  long nodes;
} Graph;

static unsigned long long last_id;

// Captures

EXPORT cudaError_t cudaStreamBeginCapture(cudaStream_t handle, enum cudaStreamCaptureMode mode) {
  Stream *stream = stream_of(handle);
  if (stream == &default_stream) {
    return failed(cudaErrorStreamCaptureUnsupported);
  }
  if (stream->capture) {
    return failed(cudaErrorIllegalState);
  }
  Capture *capture = calloc(1, sizeof *capture);
  capture->origin = stream;
  capture->members[capture->count++] = stream;
  capture->mode = mode;
  capture->thread = pthread_self();
  pthread_mutex_lock(&capture_lock);
  capture->id = ++last_id;
  capture->next = captures;
  captures = capture;
  stream->capture = capture;
  stream->work = 0;
  stream->joined = 0;
  atomic_fetch_add(&captures_open, 1);
  pthread_mutex_unlock(&capture_lock);
  return cudaSuccess;
}

// Takes a capture off the list and frees its streams; what was wrong with it.
static cudaError_t end(Capture *capture) {
  cudaError_t error = capture->broken ? cudaErrorStreamCaptureInvalidated : cudaSuccess;
  Capture **place = &captures;
  while (*place != capture) {
    place = &(*place)->next;
  }
  *place = capture->next;
  for (int i = 0; i < capture->count; i++) {
    Stream *member = capture->members[i];
    if (error == cudaSuccess && member != capture->origin && member->joined < member->work) {
      error = cudaErrorStreamCaptureUnjoined;
    }
    member->capture = NULL;
  }
  atomic_fetch_sub(&captures_open, 1);
  return error;
}

EXPORT cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t *found) {
  *found = NULL;
  Capture *capture = stream_of(handle)->capture;
  if (capture == NULL) {
    return failed(cudaErrorIllegalState);
  }
  if (capture->origin != stream_of(handle)) {
    return failed(cudaErrorStreamCaptureUnmatched);
  }
  bool own = pthread_equal(capture->thread, pthread_self());
  if (capture->mode != cudaStreamCaptureModeRelaxed && !own) {
    return failed(cudaErrorStreamCaptureWrongThread);
  }
  pthread_mutex_lock(&capture_lock);
  cudaError_t error = end(capture);
  pthread_mutex_unlock(&capture_lock);
  if (error == cudaSuccess) {
    Graph *graph = calloc(1, sizeof *graph);
    graph->nodes = capture->nodes;
    *found = (cudaGraph_t)graph;
  }
  free(capture);
  return error ? failed(error) : cudaSuccess;
}

static enum cudaStreamCaptureStatus status_of(const Capture *capture) {
  if (capture == NULL) {
    return cudaStreamCaptureStatusNone;
  }
  return capture->broken ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive;
}

EXPORT cudaError_t cudaStreamIsCapturing(
    cudaStream_t handle, enum cudaStreamCaptureStatus *status) {
  *status = status_of(stream_of(handle)->capture);
  return cudaSuccess;
}

EXPORT cudaError_t cudaStreamGetCaptureInfo(
    cudaStream_t handle, enum cudaStreamCaptureStatus *status, unsigned long long *id,
    cudaGraph_t *graph, const cudaGraphNode_t **dependencies, const cudaGraphEdgeData **edges,
    size_t *count) {
  static const cudaGraphNode_t nothing[1];
  Capture *capture = stream_of(handle)->capture;
  *status = status_of(capture);
  if (id) {
    *id = capture ? capture->id : 0;
  }
  if (graph) {
    *graph = (cudaGraph_t)capture;
  }
  if (dependencies) {
    *dependencies = nothing;
  }
  if (edges) {
    *edges = NULL;
  }
  if (count) {
    *count = 0;
  }
  return cudaSuccess;
}

// Graphs

EXPORT cudaError_t cudaGraphInstantiateWithFlags(
    cudaGraphExec_t *found, cudaGraph_t graph, unsigned long long flags) {
  (void)flags;
  Graph *copy = malloc(sizeof *copy);
  *copy = *(Graph *)graph;
  *found = (cudaGraphExec_t)copy;
  return cudaSuccess;
}

EXPORT cudaError_t cudaGraphInstantiate(
    cudaGraphExec_t *found, cudaGraph_t graph, unsigned long long flags) {
  return cudaGraphInstantiateWithFlags(found, graph, flags);
}

EXPORT cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
  if (stream_of(stream)->capture) {
    return failed(cudaErrorStreamCaptureUnsupported);
  }
  atomic_fetch_add(&graph_launches, 1);
  atomic_fetch_add(&replayed, ((Graph *)graph)->nodes);
  return cudaSuccess;
}

EXPORT cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *count) {
  if (nodes) {
    return failed(cudaErrorNotSupported);
  }
  *count = ((Graph *)graph)->nodes;
  return cudaSuccess;
}

EXPORT cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  free(graph);
  return cudaSuccess;
}

EXPORT cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) {
  free(graph);
  return cudaSuccess;
}
