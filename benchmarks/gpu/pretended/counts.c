// What the pretended card counts: launches, graphs, waits. All of it is real.

#include "capture.h"

atomic_long graph_launches;
atomic_long replayed;
static atomic_long counts[KINDS];
static atomic_long strays;
static atomic_long waits;

EXPORT int pretended_count(void *handle, enum Kind kind) {
  if (atomic_load(&captures_open)) {
    Stream *stream = stream_of(handle);
    pthread_mutex_lock(&capture_lock);
    Capture *capture = stream->capture;
    if (capture) {
      capture->nodes++;
      stream->work++;
    }
    pthread_mutex_unlock(&capture_lock);
    if (capture) {
      return 1;
    }
    atomic_fetch_add(&strays, 1);
  }
  atomic_fetch_add(&counts[kind], 1);
  return 0;
}

EXPORT long pretended_launches_of(int kind) {
  return kind >= 0 && kind < KINDS ? atomic_load(&counts[kind]) : 0;
}

EXPORT long pretended_launches(void) {
  long sum = 0;
  for (int kind = 0; kind < KINDS; kind++) {
    sum += atomic_load(&counts[kind]);
  }
  return sum;
}

EXPORT long pretended_graph_launches(void) {
  return atomic_load(&graph_launches);
}

EXPORT long pretended_replayed(void) {
  return atomic_load(&replayed);
}

EXPORT long pretended_strays(void) {
  return atomic_load(&strays);
}

EXPORT long pretended_waits(void) {
  return atomic_load(&waits);
}

void count_wait(void) {
  atomic_fetch_add(&waits, 1);
}
