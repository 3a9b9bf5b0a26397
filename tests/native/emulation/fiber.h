// Stacks that are switched by hand. A CUDA thread is a fiber of the OS thread that runs its block: barriers then cost a few
// nanoseconds, and which thread goes first is ours to choose.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulation {

constexpr size_t kStackBytes = 128 << 10;

// Memory for the stacks of one block's threads; pages that no thread touches are never backed.
class Stacks {
  public:
    explicit Stacks(size_t count) : bytes_(count * kStackBytes) {
        void* memory = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) std::abort();
        memory_ = static_cast<char*>(memory);
    }
    Stacks(const Stacks&) = delete;
    Stacks& operator=(const Stacks&) = delete;
    ~Stacks() { munmap(memory_, bytes_); }
    char* operator[](size_t i) const { return memory_ + i * kStackBytes; }

  private:
    size_t bytes_;
    char* memory_;
};

#if defined(__x86_64__)
// Six callee-saved registers and no system call: about twenty times cheaper than swapcontext.
extern "C" void localsgd_emulation_switch(void** save, void* load);
asm(R"(
.pushsection .text.localsgd_emulation_switch,"axG",@progbits,localsgd_emulation_switch,comdat
.weak localsgd_emulation_switch
.type localsgd_emulation_switch,@function
localsgd_emulation_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp,(%rdi)
    movq %rsi,%rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.popsection
)");
#endif

// A place in some stack where execution can go on. The address sanitizer is told of every switch: it tracks stacks itself.
class Context {
  public:
    // The caller's own stack; it becomes valid with the first switch away from it.
    Context() = default;

    void start(char* stack, void (*entry)()) {
        stack_ = stack;
        size_ = kStackBytes;
#if defined(__x86_64__)
        // `ret` finds `entry`; 16-byte alignment as after a call.
        auto** top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack + kStackBytes) & ~uintptr_t{15});
        *--top = nullptr;
        *--top = reinterpret_cast<void*>(entry);
        top -= 6;
        std::memset(top, 0, 6 * sizeof(void*));
        pointer_ = top;
#else
        getcontext(&context_);
        context_.uc_stack.ss_sp = stack;
        context_.uc_stack.ss_size = kStackBytes;
        context_.uc_link = nullptr;
        makecontext(&context_, entry, 0);
#endif
    }

    // Leaves `this` here and goes on in `to`; returns when somebody switches back. `last`: nobody will.
    void switch_to(Context& to, bool last = false) {
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_start_switch_fiber(last ? nullptr : &fake_, to.stack_, to.size_);
        from = this;
#endif
        (void)last;
#if defined(__x86_64__)
        localsgd_emulation_switch(&pointer_, to.pointer_);
#else
        swapcontext(&context_, &to.context_);
#endif
        arrived(fake_);
    }

    // To be called first thing on a fresh stack, and after every switch.
    static void arrived(void* fake) {
#if defined(__SANITIZE_ADDRESS__)
        const void* bottom = nullptr;
        size_t size = 0;
        __sanitizer_finish_switch_fiber(fake, &bottom, &size);
        from->stack_ = bottom; // an OS thread's own stack is learned when it is left for the first time
        from->size_ = size;
#endif
        (void)fake;
    }

  private:
    const void* stack_ = nullptr;
    size_t size_ = 0;
    void* fake_ = nullptr;
#if defined(__SANITIZE_ADDRESS__)
    static inline thread_local Context* from = nullptr;
#endif
#if defined(__x86_64__)
    void* pointer_ = nullptr;
#else
    ucontext_t context_{};
#endif
};

} // namespace emulation
