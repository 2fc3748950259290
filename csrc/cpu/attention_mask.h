// Which keys the queries of a windowed attention see, as ranges and as whole tiles to visit.
//
// The same holds the other way round, for the queries that keys are seen by: columns are keys in the
// forward and queries in the backward.
#pragma once

#include <algorithm>
#include <cmath>

#include "../rope_attention.h"

namespace wavflow {

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Ranges of columns: of the first stream, of the spread one, and of all that follow.
constexpr int kParts = 3;
struct Ranges {
  int64_t begin[kParts], end[kParts];
};

// The columns of `columns` that rows [first, last] see some of; one row's are those it sees.
WF_HD Ranges seen(int64_t first, int64_t last, int64_t columns, AttentionMask mask) {
  const int64_t local = mask.local, paced = local + mask.spread;
  if (mask.window < 0 || last >= paced || (first < local && last >= local))
    return {{0, columns, columns}, {columns, columns, columns}};
  // Places on the clock, `unit` to a token of the first stream.
  const int64_t unit = std::max<int64_t>(mask.spread, 1), reach = mask.window * unit;
  const int64_t step = first < local ? unit : local, from = first < local ? 0 : local;
  const int64_t low = std::max<int64_t>((first - from) * step - reach, 0);
  const int64_t high = (last - from) * step + reach;
  const int64_t begin = std::min((low + unit - 1) / unit, local);
  const int64_t end = std::min(high / unit + 1, local);
  const int64_t spread = local + std::min((low + local - 1) / local, mask.spread);
  const int64_t spread_end = local + std::min(high / local + 1, mask.spread);
  return {{std::min(begin, columns), std::min(spread, columns), std::min(paced, columns)},
          {std::min(end, columns), std::min(spread_end, columns), columns}};
}

// The same in whole tiles, in order and none twice.
WF_HD Ranges visits(int64_t first, int64_t last, int64_t columns, AttentionMask mask,
                    int64_t tile) {
  Ranges ranges = seen(first, last, columns, mask);
  int64_t done = 0;
  for (int part = 0; part < kParts; ++part) {
    int64_t &begin = ranges.begin[part], &end = ranges.end[part];
    end = begin < end ? std::max(round_up(end, tile), done) : done;
    begin = std::min(std::max(begin / tile * tile, done), end);
    done = end;
  }
  return ranges;
}

// Sets the scores of columns [begin, end) that row i does not see to minus infinity.
template <class A>
WF_HD void hide(A* scores, int64_t i, int64_t begin, int64_t end, AttentionMask mask) {
  if (mask.window < 0) return;
  const Ranges ranges = seen(i, i, end, mask);
  int64_t done = begin;
  for (int part = 0; part < kParts; ++part) {
    for (int64_t j = done; j < ranges.begin[part]; ++j) scores[j - begin] = -INFINITY;
    done = std::max(ranges.end[part], done);
  }
}

}  // namespace wavflow
