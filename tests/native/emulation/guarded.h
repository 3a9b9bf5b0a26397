// Device buffers for tests: poisoned memory between an unmapped page and a guard zone.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace emulation {

enum class Flush { end, begin };

// A buffer whose end (or beginning) lies against an unmapped page, so that reading or writing past it crashes. Alignment to 16
// bytes and the other side leave room for a guard zone of NaN, which `intact()` checks for writes, and which a stray read
// brings into the result. Fresh contents are NaN.
template <class T>
class Guarded {
  public:
    explicit Guarded(size_t count, Flush flush = Flush::end) : count_(count) {
        const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), bytes = count * sizeof(T);
        const size_t aligned = (bytes + 15) / 16 * 16;
        inner_ = (aligned + kZone + page - 1) / page * page;
        mapped_ = inner_ + 2 * page;
        base_ = static_cast<unsigned char*>(mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        if (base_ == MAP_FAILED) std::abort();
        zone_ = base_ + page;
        mprotect(zone_, inner_, PROT_READ | PROT_WRITE);
        std::memset(zone_, 0xff, inner_);
        data_ = reinterpret_cast<T*>(flush == Flush::end ? zone_ + inner_ - aligned : zone_);
    }
    explicit Guarded(const std::vector<T>& values, Flush flush = Flush::end) : Guarded(values.size(), flush) {
        if (count_) std::memcpy(static_cast<void*>(data_), values.data(), count_ * sizeof(T));
    }
    Guarded(const Guarded&) = delete;
    Guarded& operator=(const Guarded&) = delete;
    ~Guarded() { munmap(base_, mapped_); }

    T* data() { return data_; }
    const T* data() const { return data_; }
    size_t size() const { return count_; }
    T& operator[](size_t i) { return data_[i]; }
    const T& operator[](size_t i) const { return data_[i]; }
    std::vector<T> values() const { return std::vector<T>(data_, data_ + count_); }

    bool intact(bool report = true) const {
        const auto* begin = reinterpret_cast<const unsigned char*>(data_);
        const auto* end = begin + count_ * sizeof(T);
        for (const unsigned char* p = zone_; p < zone_ + inner_; ++p)
            if ((p < begin || p >= end) && *p != 0xff) {
                if (report)
                    std::fprintf(stderr, "guard zone overwritten %td bytes from a buffer of %zu bytes\n", p - begin,
                                 count_ * sizeof(T));
                return false;
            }
        return true;
    }

  private:
    static constexpr size_t kZone = 256;
    size_t count_, inner_ = 0, mapped_ = 0;
    unsigned char *base_ = nullptr, *zone_ = nullptr;
    T* data_ = nullptr;
};

} // namespace emulation
