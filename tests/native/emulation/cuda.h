// CUDA kernels on a CPU with a plain C++ compiler: what csrc/kernels/platform.cuh includes under LOCALSGD_EMULATION.
#pragma once

#include "intrinsics.h" // IWYU pragma: export
#include "language.h"   // IWYU pragma: export
#include "machine.h"    // IWYU pragma: export
#include "matrix.h"     // IWYU pragma: export
#include "runtime.h"    // IWYU pragma: export
