#include "ops/cuda/upload.cuh"
