#pragma once

#include <algorithm>
#include <cstring>

#include "ops/cuda/stage.cuh"
#include "ops/cuda/upload.h"

namespace gauge_ext::cuda {
namespace {

constexpr int kUploadWords = 448;  // with the other arguments below the 4 KB that a launch takes

struct UploadPart {
  uint64_t words[kUploadWords];
};

__global__ void __launch_bounds__(kThreads)
    upload_kernel(const UploadPart part, int count, uint64_t* to) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
    to[i] = part.words[i];
  }
}

}  // namespace

void upload(const void* from, int64_t bytes, void* to, Stream stream) {
  const auto* source = static_cast<const uint64_t*>(from);
  auto* target = static_cast<uint64_t*>(to);
  for (int64_t done = 0; done < bytes / 8; done += kUploadWords) {
    UploadPart part = {};
    const int count = static_cast<int>(std::min<int64_t>(kUploadWords, bytes / 8 - done));
    std::memcpy(part.words, source + done, static_cast<size_t>(count) * 8);
    const auto kernel = &upload_kernel;
    GAUGE_EXT_LAUNCH(kernel, dim3(1), kThreads, stream, part, count, target + done);
  }
}

}  // namespace gauge_ext::cuda
