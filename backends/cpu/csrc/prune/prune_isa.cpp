// Compiled once for each instruction set, with NMCOMPILE_ISA as its name.

#include "prune/prune_isa.h"

#include "prune/greedy_rows.h"
#include "prune/mask_rows.h"
#include "prune/mvue_approx_rows.h"
#include "prune/mvue_rows.h"
#include "prune/packed_rows.h"
#include "prune/run_access.h"

namespace nmcompile::NMCOMPILE_ISA {
namespace {

// Calls `work(first, count)` for vectors of units. The last vector overlaps the previous one instead of being short.
template <class T, class Work>
NMCOMPILE_INLINE void for_vectors(Index units, const Work& work) {
    constexpr Index kCount = kLanesOf<Row<T>>;
    if (units < kCount) return work(0, units);
    Index first = 0;
    for (; first + kCount <= units; first += kCount) work(first, kCount);
    if (first < units) work(units - kCount, kCount);
}

// Calls `work` with the known layouts of the input and the output.
template <class Work>
void with_layout(const Run& run, int unit, int out_unit, Index out_length, const Work& work) {
    const Layout in = layout_of(run.in_stride, run.in_lane, run.length, unit);
    const Layout out = layout_of(run.out_stride, run.out_lane, out_length, out_unit);
    if (in == Layout::units && out == in) return work.template operator()<Layout::units>();
    if (in == Layout::lanes && out == in) return work.template operator()<Layout::lanes>();
    work.template operator()<Layout::spread>();
}

template <class T, Layout kLayout, class Unit>
RunAccess<const T, kLayout, Unit> input(const Run& run, Unit unit) {
    return {static_cast<const T*>(run.in), run.in_stride, run.in_lane, run.length, unit};
}

template <class T, Layout kLayout, class Unit>
RunAccess<T, kLayout, Unit> values(const Run& run, const Rule& rule, Unit unit) {
    return {static_cast<T*>(run.out), run.out_stride, run.out_lane, run.length, unit, rule.streams};
}

template <class T, bool Masks, template <int> class Rows, class NKeep, class Block>
void prune(const Run& run, const Rule& rule, NKeep n_keep, Block block) {
    const auto work = [&]<Layout kLayout>() {
        const auto in = input<T, kLayout>(run, block);
        const auto out = [&] {
            if constexpr (Masks) return MaskWriter<T, kLayout, Block>(run, block);
            else return values<T, kLayout>(run, rule, block);
        }();
        Rows<1> rows(run, rule);
        for_vectors<T>(run.count, [&](Index first, Index count) __attribute__((always_inline)) {
            Row<T> x[kMaxBlock], y[kMaxBlock];
            rows.start(first);  // before the rows are in registers, as it may call
            in.read(first, count, x);
            rows.prune(x, y, 0, n_keep, block);
            out.write(first, count, y);
        });
    };
    if constexpr (std::is_same_v<Block, int>) {
        const bool lanes = run.in_lane == 1 && run.out_lane == 1 && run.length == block;
        lanes ? work.template operator()<Layout::lanes>() : work.template operator()<Layout::spread>();
    } else {
        with_layout(run, block, block, run.length, work);
    }
}

template <class T, template <int> class Rows, int N, int M>
void prune_packed(const Run& run, const Rule& rule) {
    with_layout(run, kPackedUnit, kPackedUnit / 2, run.length / 2, [&]<Layout kLayout>() {
        constexpr int kBlocks = kPackedUnit / M;
        const auto in = input<T, kLayout>(run, Constant<kPackedUnit>{});
        PackedWriter<T, kLayout> out(run, rule);
        Rows<kBlocks> rows(run, rule);
        for_vectors<T>(run.count, [&](Index first, Index count) __attribute__((always_inline)) {
            Row<T> x[kPackedUnit], y[kPackedUnit];
            rows.start(first);  // before the rows are in registers, as it may call
            in.read(first, count, x);
            for (int b = 0; b < kBlocks; ++b) rows.prune(x + b * M, y + b * M, b, Constant<N>{}, Constant<M>{});
            out.write(first, count, y);
        });
    });
}

// Kernels of `Rows` for the common patterns, and if `Any`, also for all others.
template <class T, bool Masks, template <int> class Rows, bool Any>
PruneKernel choose(bool packed, const Rule& rule) {
    const auto is = [&](int n, int m) { return rule.n_keep == n && rule.block == m; };
    const auto half = [&]<int N, int M>() -> PruneKernel {
        if constexpr (M <= kPackedGroup && !Masks) {
            if (packed) return prune_packed<T, Rows, N, M>;
        }
        return [](const Run& run, const Rule& rule) { prune<T, Masks, Rows>(run, rule, Constant<N>{}, Constant<M>{}); };
    };
    if (is(2, 4)) return half.template operator()<2, 4>();
    if constexpr (Any) {
        if (is(1, 2)) return half.template operator()<1, 2>();
        if (packed) return nullptr;
        if (is(4, 8)) return half.template operator()<4, 8>();
        return [](const Run& run, const Rule& rule) { prune<T, Masks, Rows>(run, rule, rule.n_keep, rule.block); };
    }
    return nullptr;
}

template <class T>
struct Operators {
    template <int Blocks>
    using mvue = DrawnRows<T, Mvue, Blocks>;
    template <int Blocks>
    using mvue_approx = DrawnRows<T, MvueApprox, Blocks>;
    template <int>
    using greedy = GreedyRows<T, false, false, false>;
    template <int>
    using greedy_by_value = GreedyRows<T, true, false, false>;
    template <int>
    using greedy_relu = GreedyRows<T, false, true, false>;  // after a ReLU a number equals its magnitude
    template <int>
    using greedy_mask = GreedyRows<T, false, false, true>;
    template <int>
    using greedy_by_value_mask = GreedyRows<T, true, false, true>;
};

}  // namespace

// Returns the kernel of an operator for this form of the output, nullptr if there is none.
template <class T>
PruneKernel prune_kernel(Operator op, Form form, const Rule& rule) {
    using O = Operators<T>;
    const bool packed = form == Form::packed;
    const bool ranks = op == Operator::greedy || op == Operator::greedy_by_value;
    if (form == Form::mask) {
        if (!ranks || rule.relu) return nullptr;
        return op == Operator::greedy ? choose<T, true, O::template greedy_mask, true>(packed, rule)
                                      : choose<T, true, O::template greedy_by_value_mask, true>(packed, rule);
    }
    if (rule.relu) return ranks ? choose<T, false, O::template greedy_relu, true>(packed, rule) : nullptr;
    switch (op) {
        case Operator::mvue: return choose<T, false, O::template mvue, true>(packed, rule);
        case Operator::mvue_approx: return choose<T, false, O::template mvue_approx, false>(packed, rule);
        case Operator::greedy: return choose<T, false, O::template greedy, true>(packed, rule);
        case Operator::greedy_by_value: return choose<T, false, O::template greedy_by_value, true>(packed, rule);
    }
    return nullptr;
}

template PruneKernel prune_kernel<double>(Operator, Form, const Rule&);
template PruneKernel prune_kernel<float>(Operator, Form, const Rule&);
template PruneKernel prune_kernel<Half>(Operator, Form, const Rule&);
template PruneKernel prune_kernel<BFloat16>(Operator, Form, const Rule&);

}  // namespace nmcompile::NMCOMPILE_ISA
