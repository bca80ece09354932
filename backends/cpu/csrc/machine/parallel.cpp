#include "machine/parallel.h"

#include <system_error>
#include <thread>
#include <vector>

#if __has_include(<dlfcn.h>)
#include <dlfcn.h>
#endif

namespace nmcompile {
namespace {

using Parallel = void (*)(void (*work)(void*), void* data, unsigned threads, unsigned flags);

// The function behind `#pragma omp parallel`, in the OpenMP library that torch has loaded into the process. Its workers
// spin for milliseconds after each of torch's operators, so other threads would have to share the cores with them. A
// library that this module linked could be another copy with its own workers, so the function is looked up.
Parallel openmp() {
#if __has_include(<dlfcn.h>)
    static const auto found = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    return found;
#else
    return nullptr;
#endif
}

}  // namespace

void on_threads(unsigned threads, void (*work)(void*), void* data) {
    if (threads <= 1) return work(data);
    if (const Parallel parallel = openmp()) return parallel(work, data, threads, 0);
    std::vector<std::thread> started;
    for (unsigned t = 1; t < threads; ++t) {
        try {
            started.emplace_back(work, data);
        } catch (const std::system_error&) {
            break;  // no thread is available: the others do its part
        }
    }
    work(data);
    for (std::thread& thread : started) thread.join();
}

}  // namespace nmcompile
