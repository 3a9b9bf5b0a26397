// The little that native tests share.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>

namespace check {

inline int failures = 0;
inline int checks = 0;

inline bool expect(bool holds, const char* expression, const char* file, int line, const char* context = "") {
    ++checks;
    if (!holds && ++failures <= 50) std::fprintf(stderr, "%s:%d: failed: %s  %s\n", file, line, expression, context);
    return holds;
}

// The exit status of main: a program that checked nothing has failed.
inline int summary(const char* name) {
    std::printf("%s: %d checks, %d failures\n", name, checks, failures);
    return failures == 0 && checks > 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}

} // namespace check

#define EXPECT(expression) check::expect(static_cast<bool>(expression), #expression, __FILE__, __LINE__)
#define EXPECT_IN(context, expression) check::expect(static_cast<bool>(expression), #expression, __FILE__, __LINE__, context)
