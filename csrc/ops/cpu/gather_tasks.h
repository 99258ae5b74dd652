#pragma once

// How lora_gather's rows are dealt out on the CPU: by adapter, in tasks of neighbours in memory or
// of rows that are copied together.

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include <c10/util/ArrayRef.h>

#include "ops/cpu/pieces.h"

namespace gauge_ext {

// Rows that one task reads together: enough for a factor to be read once, few enough to stay in
// cache.
constexpr int64_t kTaskRows = 128;

// Some rows of one adapter. Neighbours in `rows` need not be neighbours in x.
struct GatherTask {
  int64_t adapter;  // -1: none
  std::vector<int64_t> rows;

  int64_t count() const { return static_cast<int64_t>(rows.size()); }
  bool contiguous() const { return rows.back() - rows.front() + 1 == count(); }
};

// The rows sorted by adapter, of which each entry of `index` names one or none for `rows_each` of
// them, and cut into tasks, by sizes alone: every sum over tasks, taken in order, is the same for
// any number of threads.
std::vector<GatherTask> gather_tasks(at::ArrayRef<int64_t> index, int64_t rows_each);

// The rows of a task one after the other: in place where they lie so, else copied, and back.
template <typename T>
class TaskRows {
 public:
  using scalar_t = std::remove_const_t<T>;

  TaskRows(const GatherTask& task, T* data, int64_t columns)
      : task_(task), data_(data), columns_(columns) {
    if (!task.contiguous()) {
      copy_ = Buffer<scalar_t>(task.count() * columns);
    }
  }

  // Where the rows are to be written to
  T* get() const { return copied() ? copy_.data() : data_ + task_.rows.front() * columns_; }

  // The rows as they are
  T* read() const {
    for (int64_t i = 0; copied() && i < task_.count(); ++i) {
      std::memcpy(copy_.data() + i * columns_, row(i), bytes());
    }
    return get();
  }

  // Puts what was written where it belongs.
  void write() const {
    static_assert(!std::is_const_v<T>);
    for (int64_t i = 0; copied() && i < task_.count(); ++i) {
      std::memcpy(row(i), copy_.data() + i * columns_, bytes());
    }
  }

 private:
  bool copied() const { return copy_.data() != nullptr; }
  size_t bytes() const { return static_cast<size_t>(columns_) * sizeof(scalar_t); }
  T* row(int64_t i) const { return data_ + task_.rows[static_cast<size_t>(i)] * columns_; }

  const GatherTask& task_;
  T* data_;
  int64_t columns_;
  Buffer<scalar_t> copy_;
};

}  // namespace gauge_ext
