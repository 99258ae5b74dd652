#include "ops/cpu/gather_tasks.h"

#include <algorithm>
#include <numeric>

namespace gauge_ext {

std::vector<GatherTask> gather_tasks(at::ArrayRef<int64_t> index, int64_t rows_each) {
  std::vector<size_t> order(index.size());
  std::iota(order.begin(), order.end(), size_t(0));
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return index[a] < index[b]; });
  std::vector<GatherTask> tasks;
  for (const size_t entry : order) {
    const int64_t first = static_cast<int64_t>(entry) * rows_each;
    for (int64_t row = first; row < first + rows_each; ++row) {
      if (tasks.empty() || tasks.back().adapter != index[entry] ||
          tasks.back().count() == kTaskRows) {
        tasks.push_back({index[entry], {}});
      }
      tasks.back().rows.push_back(row);
    }
  }
  return tasks;
}

}  // namespace gauge_ext
