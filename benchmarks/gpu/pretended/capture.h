// Streams and captures, as streams.c, graphs.c and counts.c see them.

#pragma once

#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stdatomic.h>

#include "state.h"

#define MEMBERS 256  // streams in one capture

typedef struct Capture Capture;

typedef struct Stream {
  Capture *capture;
  long work;    // what was captured here, counted
  long joined;  // how much of it others wait for
  unsigned flags;
  int priority;
} Stream;

struct Capture {
  Capture *next;
  Stream *origin;
  Stream *members[MEMBERS];
  int count;
  enum cudaStreamCaptureMode mode;
  pthread_t thread;
  unsigned long long id;
  long nodes;
  bool broken;
};

extern pthread_mutex_t capture_lock;  // of all that follows
extern Capture *captures;
extern atomic_int captures_open;
extern Stream default_stream;

extern atomic_long graph_launches;
extern atomic_long replayed;

// CUDA's three special handles are all the default stream here.
static inline Stream *stream_of(void *handle) {
  return (size_t)handle < 16 ? &default_stream : (Stream *)handle;
}
