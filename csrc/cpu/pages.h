// Memory that is read soon.
#pragma once

#include <cstdint>

#include "elements.h"

namespace localsgd {

// Reads a byte in every 4 KiB of `count` elements from `begin` on, as far as before `end`: the addresses of several pages are
// translated at once, not of each as it is come to, which costs as much time as reading it.
template <typename T>
LOCALSGD_INLINE void touch_pages(const T* begin, int64_t count, const T* end) {
    constexpr int64_t kPage = 4096 / sizeof(T);
    if (end - begin < count) count = end - begin;
    for (int64_t i = 0; i < count; i += kPage) {
        const char byte = *reinterpret_cast<const volatile char*>(begin + i);
        static_cast<void>(byte);
    }
}

} // namespace localsgd
