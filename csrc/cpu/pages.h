// Memory that is read soon.
#pragma once

#include <cstdint>

#include "elements.h"

namespace localsgd {

// Reads a byte of each page that `count` elements from `begin` on lie in, as far as before `end`: the addresses of several
// pages are translated at once, not of each as it is come to, which costs as much time as reading it where pages have 4 KiB.
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
