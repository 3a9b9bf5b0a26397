// The intrinsics of x86's units for bf16, which functions must ask for, and whether this compiler has them.
#pragma once

#if defined(__x86_64__) && defined(__linux__) && !defined(__clang__) && __GNUC__ >= 12 // the first with "x86-64-v4"
#define LOCALSGD_HAS_TILES
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized" // of GCC's own header (its bug 105593)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#define LOCALSGD_TILES __attribute__((target("arch=x86-64-v4,amx-tile,amx-bf16")))
#define LOCALSGD_DOTS __attribute__((target("arch=x86-64-v4,avx512bf16")))
#define LOCALSGD_PACKS __attribute__((target("arch=x86-64-v4")))
#endif
