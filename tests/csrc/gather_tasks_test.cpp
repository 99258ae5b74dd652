// How the rows of lora_gather are dealt out, and brought together and back, against plain loops.

#include "ops/cpu/gather_tasks.h"

#include <set>
#include <vector>

#include "check_main.h"

namespace {

using gauge_ext::gather_tasks;
using gauge_ext::GatherTask;
using gauge_ext::kTaskRows;
using gauge_ext::TaskRows;

// Every row once, in a task of its own entry's adapter; adapters and rows in order.
void check_tasks(const std::vector<int64_t>& index, int64_t rows_each) {
  const auto tasks = gather_tasks(index, rows_each);
  std::set<int64_t> seen;
  int64_t last_adapter = -2, last_row = -1;
  for (const GatherTask& task : tasks) {
    REQUIRE(task.count() > 0 && task.count() <= kTaskRows);
    CHECK(task.adapter >= last_adapter);
    for (const int64_t row : task.rows) {
      CHECK(index[static_cast<size_t>(row / rows_each)] == task.adapter);
      CHECK(task.adapter > last_adapter || row > last_row);
      CHECK(seen.insert(row).second);
      last_adapter = task.adapter;
      last_row = row;
    }
    bool neighbours = true;
    for (size_t i = 1; i < task.rows.size(); ++i) {
      neighbours = neighbours && task.rows[i] == task.rows[i - 1] + 1;
    }
    CHECK(task.contiguous() == neighbours);
  }
  CHECK(seen.size() == index.size() * static_cast<size_t>(rows_each));
}

TEST_CASE("each row goes into one task of its adapter") {
  check_tasks({}, 1);
  check_tasks({0}, 1);
  check_tasks({2, -1, 0, 2, 2, -1, 1}, 1);
  check_tasks({2, -1, 0, 2}, 3);
  check_tasks({1, 0}, kTaskRows + 1);
  check_tasks(std::vector<int64_t>(3 * kTaskRows + 5, 4), 1);
  std::vector<int64_t> turns;
  for (int64_t i = 0; i < 2 * kTaskRows + 3; ++i) {
    turns.push_back(i % 2);
  }
  check_tasks(turns, 2);
}

TEST_CASE("a task is full before the next of its adapter begins") {
  const auto tasks = gather_tasks(std::vector<int64_t>(2 * kTaskRows + 1, 0), 1);
  REQUIRE(tasks.size() == 3);
  CHECK(tasks[0].count() == kTaskRows);
  CHECK(tasks[1].count() == kTaskRows);
  CHECK(tasks[2].count() == 1);
}

TEST_CASE("rows that are neighbours are read and written in place") {
  const GatherTask task = {0, {1, 2}};
  std::vector<double> data = {0, 1, 2, 3, 4, 5, 6, 7};
  const TaskRows<double> rows(task, data.data(), 2);
  CHECK(rows.read() == data.data() + 2);
  CHECK(rows.get() == data.data() + 2);
  rows.write();
  CHECK(data == std::vector<double>{0, 1, 2, 3, 4, 5, 6, 7});
}

TEST_CASE("other rows are copied, and put back where they belong") {
  const GatherTask task = {0, {0, 2, 3}};
  std::vector<float> data = {0, 1, 2, 3, 4, 5, 6, 7};
  const TaskRows<float> rows(task, data.data(), 2);
  float* copy = rows.read();
  const std::vector<float> expected = {0, 1, 4, 5, 6, 7};
  CHECK(std::vector<float>(copy, copy + 6) == expected);
  for (int i = 0; i < 6; ++i) {
    copy[i] = static_cast<float>(10 + i);
  }
  CHECK(data == std::vector<float>{0, 1, 2, 3, 4, 5, 6, 7});
  rows.write();
  CHECK(data == std::vector<float>{10, 11, 2, 3, 12, 13, 14, 15});
}

}  // namespace
