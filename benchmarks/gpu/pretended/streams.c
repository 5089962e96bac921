// Streams and events of the pretended card.
//
// Real: which stream joins a capture by an event, and what CUDA forbids meanwhile. Pretended: time.
// All work is done as soon as it is launched, and the time between two events is that of the
// launches between them.

#define _GNU_SOURCE
#include <stdlib.h>

#include "capture.h"

#define LAUNCH_MS 0.05f  // every launch's time between two events

typedef struct {
  unsigned long long capture;  // its id, 0 if it was not recorded in one
  Stream *stream;
  long work;
  long launches;
  bool recorded;
} Event;

pthread_mutex_t capture_lock = PTHREAD_MUTEX_INITIALIZER;
Capture *captures;
atomic_int captures_open;
Stream default_stream;
static _Thread_local enum cudaStreamCaptureMode own_mode = cudaStreamCaptureModeGlobal;

// What a capture forbids: waiting and allocating, to its own thread or, in the global mode, to all

static bool forbids(const Capture *capture) {
  if (own_mode == cudaStreamCaptureModeRelaxed || capture->mode == cudaStreamCaptureModeRelaxed) {
    return false;
  }
  if (pthread_equal(capture->thread, pthread_self())) {
    return true;
  }
  return capture->mode == cudaStreamCaptureModeGlobal && own_mode == cudaStreamCaptureModeGlobal;
}

bool forbidden(void) {
  if (!atomic_load(&captures_open)) {
    return false;
  }
  bool found = false;
  pthread_mutex_lock(&capture_lock);
  for (Capture *capture = captures; capture; capture = capture->next) {
    if (forbids(capture)) {
      capture->broken = true;
      found = true;
    }
  }
  pthread_mutex_unlock(&capture_lock);
  return found;
}

static cudaError_t wait_for_card(void) {
  if (forbidden()) {
    return failed(cudaErrorStreamCaptureUnsupported);
  }
  count_wait();
  return cudaSuccess;
}

EXPORT cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) {
  enum cudaStreamCaptureMode before = own_mode;
  own_mode = *mode;
  *mode = before;
  return cudaSuccess;
}

EXPORT cudaError_t cudaDeviceSynchronize(void) {
  return wait_for_card();
}

// Streams

EXPORT cudaError_t cudaStreamCreateWithPriority(
    cudaStream_t *handle, unsigned flags, int priority) {
  Stream *stream = calloc(1, sizeof *stream);
  stream->flags = flags;
  stream->priority = priority;
  *handle = (cudaStream_t)stream;
  return cudaSuccess;
}

EXPORT cudaError_t cudaStreamCreateWithFlags(cudaStream_t *handle, unsigned flags) {
  return cudaStreamCreateWithPriority(handle, flags, 0);
}

EXPORT cudaError_t cudaStreamCreate(cudaStream_t *handle) {
  return cudaStreamCreateWithPriority(handle, cudaStreamDefault, 0);
}

EXPORT cudaError_t cudaStreamDestroy(cudaStream_t handle) {
  (void)handle;  // kept: an event may still refer to it
  return cudaSuccess;
}

EXPORT cudaError_t cudaStreamGetPriority(cudaStream_t handle, int *priority) {
  *priority = stream_of(handle)->priority;
  return cudaSuccess;
}

EXPORT cudaError_t cudaStreamGetFlags(cudaStream_t handle, unsigned *flags) {
  *flags = stream_of(handle)->flags;
  return cudaSuccess;
}

EXPORT cudaError_t cudaStreamQuery(cudaStream_t handle) {
  (void)handle;
  return forbidden() ? failed(cudaErrorStreamCaptureUnsupported) : cudaSuccess;
}

EXPORT cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  Stream *stream = stream_of(handle);
  pthread_mutex_lock(&capture_lock);
  bool captured = stream->capture != NULL;
  if (captured) {
    stream->capture->broken = true;
  }
  pthread_mutex_unlock(&capture_lock);
  return captured ? failed(cudaErrorStreamCaptureUnsupported) : wait_for_card();
}

// Waits for an event: a stream joins the capture that the event was recorded in
static cudaError_t join(Stream *stream, Event *event) {
  Capture *own = stream->capture;
  Capture *other = captures;
  while (other && other->id != event->capture) {
    other = other->next;
  }
  if (other == NULL) {
    if (own && event->recorded) {
      own->broken = true;
      return cudaErrorStreamCaptureIsolation;
    }
    return cudaSuccess;
  }
  if (own && own != other) {
    own->broken = true;
    other->broken = true;
    return cudaErrorStreamCaptureMerge;
  }
  if (own == NULL) {
    if (stream == &default_stream || other->count == MEMBERS) {
      other->broken = true;
      return cudaErrorStreamCaptureImplicit;
    }
    other->members[other->count++] = stream;
    stream->capture = other;
    stream->work = 0;
    stream->joined = 0;
  }
  stream->work++;
  if (event->stream != stream && event->work > event->stream->joined) {
    event->stream->joined = event->work;
  }
  return cudaSuccess;
}

EXPORT cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event, unsigned flags) {
  (void)flags;
  if (!atomic_load(&captures_open)) {
    return cudaSuccess;
  }
  pthread_mutex_lock(&capture_lock);
  cudaError_t error = join(stream_of(handle), (Event *)event);
  pthread_mutex_unlock(&capture_lock);
  return error ? failed(error) : cudaSuccess;
}

EXPORT cudaError_t cudaLaunchHostFunc(cudaStream_t handle, cudaHostFn_t function, void *argument) {
  if (stream_of(handle)->capture == NULL) {
    function(argument);
  }
  return cudaSuccess;
}

EXPORT cudaError_t cudaStreamAddCallback(
    cudaStream_t handle, cudaStreamCallback_t function, void *argument, unsigned flags) {
  (void)flags;
  if (stream_of(handle)->capture) {
    return failed(cudaErrorStreamCaptureUnsupported);
  }
  function(handle, cudaSuccess, argument);
  return cudaSuccess;
}

// Events

EXPORT cudaError_t cudaEventCreateWithFlags(cudaEvent_t *handle, unsigned flags) {
  (void)flags;
  *handle = calloc(1, sizeof(Event));
  return cudaSuccess;
}

EXPORT cudaError_t cudaEventCreate(cudaEvent_t *handle) {
  return cudaEventCreateWithFlags(handle, cudaEventDefault);
}

EXPORT cudaError_t cudaEventDestroy(cudaEvent_t handle) {
  free(handle);
  return cudaSuccess;
}

EXPORT cudaError_t cudaEventRecordWithFlags(cudaEvent_t handle, cudaStream_t on, unsigned flags) {
  (void)flags;
  Event *event = (Event *)handle;
  Stream *stream = stream_of(on);
  pthread_mutex_lock(&capture_lock);
  event->recorded = true;
  event->capture = stream->capture ? stream->capture->id : 0;
  event->stream = stream;
  event->work = stream->work;
  event->launches = pretended_launches() + atomic_load(&replayed);
  pthread_mutex_unlock(&capture_lock);
  return cudaSuccess;
}

EXPORT cudaError_t cudaEventRecord(cudaEvent_t handle, cudaStream_t on) {
  return cudaEventRecordWithFlags(handle, on, cudaEventRecordDefault);
}

EXPORT cudaError_t cudaEventQuery(cudaEvent_t handle) {
  if (((Event *)handle)->capture && atomic_load(&captures_open)) {
    return failed(cudaErrorCapturedEvent);
  }
  return forbidden() ? failed(cudaErrorStreamCaptureUnsupported) : cudaSuccess;
}

EXPORT cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
  if (((Event *)handle)->capture && atomic_load(&captures_open)) {
    return failed(cudaErrorCapturedEvent);
  }
  return wait_for_card();
}

EXPORT cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t from, cudaEvent_t to) {
  Event *first = (Event *)from;
  Event *last = (Event *)to;
  if (!first->recorded || !last->recorded || first->capture || last->capture) {
    return failed(cudaErrorInvalidResourceHandle);
  }
  *ms = LAUNCH_MS * (float)(last->launches - first->launches);
  return cudaSuccess;
}
