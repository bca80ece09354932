#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace nmcompile {

inline std::int64_t pieces(std::int64_t count, std::int64_t size) { return (count + size - 1) / size; }

// Calls `work(data)` on up to `threads` threads, this one included, and returns when all calls have.
void on_threads(unsigned threads, void (*work)(void*), void* data);

// Calls `work(first, last)` for pieces of [0, count). Threads take pieces until none is left, so a thread that has to
// share its core does not hold up the others. `work` must not throw.
template <class Work>
void in_parallel(std::int64_t count, std::int64_t piece, std::int64_t threads, const Work& work) {
    std::atomic<std::int64_t> next = 0;
    auto take = [&] {
        for (std::int64_t first; (first = next.fetch_add(piece, std::memory_order_relaxed)) < count;) {
            work(first, std::min(first + piece, count));
        }
    };
    on_threads(static_cast<unsigned>(threads), [](void* call) { (*static_cast<decltype(take)*>(call))(); }, &take);
}

}  // namespace nmcompile
