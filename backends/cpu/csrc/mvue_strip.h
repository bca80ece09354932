// MVUE of a strip of blocks, one block per SIMD lane: every loop over lanes has a fixed length and no branch, so that
// the compiler vectorizes it for whatever instruction set it is given.
#pragma once

#include <cmath>
#include <limits>

#include "mvue_block.h"

namespace nmcompile {

constexpr int kLanes = 16;

template <class Real>
using Rows = Real[kMaxBlock][kLanes];  // element i of every block is a row

// Prunes `x` into `y`. Returns whether some block has to go to `prune_block` instead, as `redo` says.
template <class Real>
inline bool prune_strip(const Rows<Real>& x, int block, int n_keep, const Real* u, Rows<Real>& y, bool* redo) {
    alignas(64) Rows<Real> open;        // |x|, zero where saturated
    alignas(64) Rows<Real> thresholds;  // t_j
    alignas(64) Real rest[kLanes], remaining[kLanes], count[kLanes], step[kLanes], sum[kLanes], before[kLanes];

    const auto add_rows = [&] {
        for (int l = 0; l < kLanes; ++l) rest[l] = 0;
        for (int i = 0; i < block; ++i) {
            for (int l = 0; l < kLanes; ++l) rest[l] += open[i][l];
        }
    };

    for (int l = 0; l < kLanes; ++l) count[l] = 0;
    for (int i = 0; i < block; ++i) {
        for (int l = 0; l < kLanes; ++l) {
            open[i][l] = std::fabs(x[i][l]);
            count[l] += open[i][l] > 0 ? Real(1) : Real(0);
        }
    }
    add_rows();
    bool any_redo = false;
    for (int l = 0; l < kLanes; ++l) {
        redo[l] = !(rest[l] <= std::numeric_limits<Real>::max());
        any_redo |= redo[l];
        remaining[l] = count[l] <= n_keep ? Real(0) : Real(n_keep);
    }
    for (int i = 0; i < block; ++i) {
        for (int l = 0; l < kLanes; ++l) open[i][l] = remaining[l] == 0 ? Real(0) : open[i][l];
    }

    for (int round = 0; round < n_keep; ++round) {
        add_rows();
        for (int l = 0; l < kLanes; ++l) count[l] = 0;
        for (int i = 0; i < block; ++i) {
            for (int l = 0; l < kLanes; ++l) {
                const bool joins = (open[i][l] > 0) & (open[i][l] * remaining[l] >= rest[l]);
                count[l] += joins ? Real(1) : Real(0);
                open[i][l] = joins ? Real(0) : open[i][l];
            }
        }
        Real joined = 0;
        for (int l = 0; l < kLanes; ++l) {
            remaining[l] -= count[l];
            joined += count[l];
        }
        if (joined == 0) break;
    }

    for (int l = 0; l < kLanes; ++l) {
        step[l] = rest[l] / remaining[l];
        sum[l] = before[l] = 0;
    }
    for (int j = 0; j < n_keep; ++j) {
        for (int l = 0; l < kLanes; ++l) {
            const Real threshold = (u[l] + Real(j)) * rest[l] / remaining[l];
            thresholds[j][l] = Real(j) < remaining[l] ? threshold : std::numeric_limits<Real>::infinity();
        }
    }
    // Element i is sampled if its running sum passes a threshold. Where two thresholds meet in one element, or one is
    // past the end, fewer than `remaining` are found.
    for (int i = 0; i < block; ++i) {
        for (int l = 0; l < kLanes; ++l) {
            sum[l] += open[i][l];
            count[l] = 0;
        }
        for (int j = 0; j < n_keep; ++j) {
            for (int l = 0; l < kLanes; ++l) count[l] += sum[l] > thresholds[j][l] ? Real(1) : Real(0);
        }
        for (int l = 0; l < kLanes; ++l) {
            const bool sampled = count[l] > before[l];
            const Real saturated = (open[i][l] == 0) & (x[i][l] != 0) ? x[i][l] : Real(0);
            y[i][l] = sampled ? std::copysign(step[l], x[i][l]) : saturated;
            remaining[l] -= sampled ? Real(1) : Real(0);
            before[l] = count[l];
        }
    }
    for (int l = 0; l < kLanes; ++l) {
        redo[l] |= remaining[l] != 0;
        any_redo |= redo[l];
    }
    return any_redo;
}

}  // namespace nmcompile
