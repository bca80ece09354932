// Computes a tile by written code.
//
// Code for some rows and some blocks of depth runs through all lanes of the tile before it is written for the next
// blocks, and the rows meet a whole chunk of depth before the next rows do. A chunk is so deep that its panels stay in a
// second-level cache, where the sums of a few rows stay too; only from chunk to chunk sums come from further away.
#pragma once

#include <algorithm>

#include "gemm/columns.h"
#include "gemm/row_code.h"
#include "gemm/tile_output.h"

#if defined(__AVX512F__)
namespace nmcompile::NMCOMPILE_ISA {

constexpr Index kPanelBytes = 5 << 18;  // of a chunk: most of a second-level cache of 2 MB
constexpr Index kWrittenRows = 48;      // rows that go to the output together: whole squares of whole codes
static_assert(kWrittenRows % kCodeRows == 0 && kWrittenRows % kFloats == 0);

// How often a tile's code is written for the same rows, and how much of that in one chunk.
struct Chunks {
    Index codes, of_chunk;

    template <class Form>
    static Chunks of(Index depth, Index columns) {
        const Index codes = pieces(depth, kCodeBlocks * kDepthBlock);
        const Index bytes = columns * kMostLanes * RowCode<Form>::kPanelRows * static_cast<Index>(sizeof(float));
        return {codes, pieces(codes, pieces(codes, greater(1, kPanelBytes / bytes)))};
    }
    bool is_one() const { return of_chunk == codes; }
};

// Rows whose sums are finished by a single chunk are written at once, and their room is used again.
template <class Form>
ColumnRoom coded_room(Index rows, Index depth, Index columns) {
    const Chunks chunks = Chunks::of<Form>(depth, columns);
    return {chunks.of_chunk * RowCode<Form>::kPanelRows, chunks.is_one() ? kWrittenRows : rows};
}

template <class Form, class T>
class CodedTile {
   public:
    using Code = RowCode<Form>;

    CodedTile(const GemmJob<T>& job, const KeptValues& all, const GemmTile& tile, const std::vector<Column>& columns,
              Code& code)
        : job_(job),
          all_(all),
          tile_(tile),
          columns_(columns),
          code_(code),
          chunks_(Chunks::of<Form>(job.dense_depth.size, columns.size())),
          rows_(tile.last_row - tile.first_row),
          of_panel_(strides(Code::kPanelRows)),
          of_sums_(strides(chunks_.is_one() ? kWrittenRows : rows_)) {}

    // `floats` is room for a panel of floats.
    void multiply(float* floats) {
        for (Index first = 0; first < chunks_.codes; first += chunks_.of_chunk) {
            const Index last = smaller(first + chunks_.of_chunk, chunks_.codes);
            make_panels(first, last, floats);
            add_rows(first, last);
        }
    }

   private:
    // Code that reads one vector after the other reads memory in order, if no run of lanes has to cross vectors.
    Strides strides(Index rows) const {
        const bool in_turn = std::all_of(columns_.begin(), columns_.end(), [](const Column& column) {
            return column.from.stay_in_vectors() && column.to.stay_in_vectors();
        });
        return in_turn ? Strides::in_turn(rows) : Strides::side_by_side(columns_[0].from.width);
    }

    float* panel(const Column& column, Index code) const {
        return column.panel + code * Code::kPanelRows * column.from.width;
    }

    void make_panels(Index first, Index last, float* floats) const {
        const Index blocks = pieces(job_.dense_depth.size, kDepthBlock);
        for (const Column& column : columns_) {
            for (Index block = first * kCodeBlocks; block < smaller(last * kCodeBlocks, blocks); ++block) {
                const Index row = block % kCodeBlocks * Code::kBlockRows;
                float* const to = panel(column, block / kCodeBlocks - first) + row * of_panel_.row;
                PanelCode<Form>::make_panel(job_, column.from, block, of_panel_, to, floats);
            }
        }
    }

    Kept kept(Index row, Index code) const {
        return kept_by<Form>(job_, all_, tile_.first_row + row, code * kCodeBlocks, kCodeBlocks);
    }

    // Some rows meet some depth: what one code is written for.
    struct Turn {
        Index row, code;
    };

    // The rows meet all depth of a chunk before the next rows do.
    Turn after(const Turn& turn, Index first, Index last) const {
        return turn.code + 1 < last ? Turn{turn.row, turn.code + 1} : Turn{turn.row + kCodeRows, first};
    }

    typename Code::Written begin(const Turn& turn) const {
        if (turn.row >= rows_) return {};
        const Kept some = kept(turn.row, turn.code);
        const Index rows = smaller(kCodeRows, rows_ - turn.row);
        return code_.begin(rows, some.depth, of_panel_.row, some.values.places, some.stride);
    }

    // Code is written two turns ahead, group by group while other code runs: the multiplications hide that, and meanwhile
    // what was written leaves the cache of data, from where the processor would fetch it slowly.
    void add_rows(Index first, Index last) {
        Turn turn{0, first};
        typename Code::Written these = begin(turn), next = begin(after(turn, first, last));
        complete(these);
        complete(next);
        while (turn.row < rows_) {
            const Turn following = after(turn, first, last);
            typename Code::Written later = begin(after(following, first, last));
            run(these, kept(turn.row, turn.code), turn, first, kept(following.row, following.code), later);
            complete(later);
            if (turn.code + 1 == chunks_.codes) write_finished(following.row);
            these = next;
            next = later;
            turn = following;
        }
    }

    static void complete(typename Code::Written& code) {
        while (!code.is_complete()) code.write_group();
    }

    // `later` is written meanwhile, and the values of the next turn are prefetched.
    void run(const typename Code::Written& these, const Kept& some, const Turn& turn, Index first, const Kept& next,
             typename Code::Written& later) const {
        for (const Column& column : columns_) {
            const float* const from = panel(column, turn.code - first);
            float* const to = sums(column, turn.row);
            for (Index lane = 0; lane < column.from.count; lane += kFloats) {
                these.run(from + of_panel_.of_lane(lane), some.values.values, to + of_sums_.of_lane(lane), some.is_first);
                if (later.is_complete()) continue;
                fetch(next, later.group);
                later.write_group();
            }
        }
    }

    // Prefetches a part of the values, as many as there are groups: the processor cannot predict where they are.
    static void fetch(const Kept& some, Index part) {
        constexpr Index kOfLine = 64 / sizeof(float), kParts = kCodeBlocks * Code::kGroups;
        constexpr Index kOfPart = pieces(kCodeRows * Form::kValues, kParts * kOfLine) * kOfLine;
        for (Index block = 0; block < kCodeBlocks; ++block) {
            const float* const values = some.values.values + block * some.stride + part * kOfPart;
            for (Index i = 0; i < kOfPart; i += kOfLine) __builtin_prefetch(values + i, 0, 2);
        }
    }

    float* sums(const Column& column, Index row) const {
        return column.sums + (chunks_.is_one() ? row % kWrittenRows : row) * of_sums_.row;
    }

    // Writes rows before `end` that have not been written, once they are enough or the last.
    void write_finished(Index end) const {
        if (end < rows_ && end % kWrittenRows != 0) return;
        const Index begin = (smaller(end, rows_) - 1) / kWrittenRows * kWrittenRows, first = tile_.first_row + begin;
        const Index last = tile_.first_row + smaller(end, rows_);
        for (const Column& column : columns_) write_output(job_, column.to, first, last, sums(column, begin), of_sums_);
    }

    const GemmJob<T>& job_;
    const KeptValues& all_;
    const GemmTile& tile_;
    const std::vector<Column>& columns_;
    Code& code_;
    Chunks chunks_;
    Index rows_;
    Strides of_panel_, of_sums_;
};

}  // namespace nmcompile::NMCOMPILE_ISA
#endif
