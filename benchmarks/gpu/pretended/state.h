// What the runtime's parts tell each other and nobody else.

#pragma once

#include <cuda_runtime_api.h>

#include "pretended.h"

// Whether the calling thread may not do what could disturb a capture; that capture is then broken.
bool forbidden(void);

// The error, noted for cudaGetLastError.
cudaError_t failed(cudaError_t error);

// Notes that the host waits for the card.
void count_wait(void);

// Bytes of the card.
size_t card_limit(void);
