#pragma once

// A table for the kernels of a call, from the host's memory to the device's: as arguments of a
// kernel and not by a copy, so that a captured graph keeps it, and nobody waits or pins memory.

#include <cstdint>

#include "ops/cuda/low_rank.h"

namespace gauge_ext::cuda {

// `bytes` is a multiple of 8, as is the alignment of either side.
void upload(const void* from, int64_t bytes, void* to, Stream stream);

}  // namespace gauge_ext::cuda
