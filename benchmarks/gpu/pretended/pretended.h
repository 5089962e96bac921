// What the parts of the pretended card share. Everything here is exported, so that the driver's
// library and Python (by ctypes) find it.

#pragma once

#include <stdbool.h>
#include <stddef.h>

#define EXPORT __attribute__((visibility("default")))

// Of an H100 SXM5 with 80 GB, as CUDA reports it.
#define CARD_NAME "NVIDIA H100 80GB HBM3 pretended"
#define CARD_MIB 80995           // that a program can use: 79.1 GiB
#define CONTEXT_MIB 520          // of them taken by the context, before the first tensor
#define PROCESSORS 132
#define SHARED_MOST 232448       // bytes a block can have when it asks for them
#define SHARED_PLAIN 49152       // bytes a block can have without asking
#define SHARED_PROCESSOR 233472
#define THREADS_MOST 1024        // a block
#define REGISTERS 65536
#define L2_BYTES 52428800
#define CUDA_VERSION_HERE 13000

// What a launch is; all kinds count as one launch.
enum Kind { KERNEL, PRODUCT, COPY, FILL, KINDS };

// Counts a launch on a stream, in the graph that is being captured there or else as run.
EXPORT int pretended_count(void *stream, enum Kind kind);

// 0, or CUDA's error of a launch that no H100 would take.
EXPORT int pretended_refusal(const unsigned grid[3], const unsigned block[3], size_t shared);

// Whether an address is in the card's memory, or in host memory that is pinned.
EXPORT bool pretended_on_device(const void *address);
EXPORT bool pretended_pinned(const void *address);

// For reading by ctypes. Replayed nodes are those of the graphs that were launched; strays are
// launches on a stream that is not captured while another one is; waits are calls in which the
// host waits for the card.
EXPORT long pretended_launches(void);
EXPORT long pretended_launches_of(int kind);
EXPORT long pretended_graph_launches(void);
EXPORT long pretended_replayed(void);
EXPORT long pretended_strays(void);
EXPORT long pretended_waits(void);
EXPORT size_t pretended_used(void);
EXPORT size_t pretended_peak(void);
