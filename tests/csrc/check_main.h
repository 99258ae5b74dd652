#pragma once

// The few macros that the C++ tests need, in doctest's spelling. doctest itself is on no Python
// registry, and `make cpp-test` has to work where there is only Python, pip, make and a compiler.

#include <cmath>
#include <exception>
#include <iostream>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

namespace gauge_ext::test {

struct Case {
  std::string name;
  void (*run)();
};

// Thrown by REQUIRE to leave the test; CHECK only counts.
struct Abandoned {};

inline std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}

inline int& failures() {
  static int count = 0;
  return count;
}

inline bool add(std::string name, void (*run)()) {
  cases().push_back({std::move(name), run});
  return true;
}

inline bool report(bool holds, const char* file, int line, const std::string& what) {
  if (!holds) {
    ++failures();
    std::cerr << file << ':' << line << ": " << what << '\n';
  }
  return holds;
}

// NaN is close to nothing.
inline bool report_close(double got,
                         double expected,
                         double tolerance,
                         const char* file,
                         int line) {
  std::ostringstream what;
  what.precision(17);
  what << "got " << got << ", expected " << expected << " within " << tolerance;
  return report(std::abs(got - expected) <= tolerance, file, line, what.str());
}

}  // namespace gauge_ext::test

#define GAUGE_JOIN_(a, b) a##b
#define GAUGE_JOIN(a, b) GAUGE_JOIN_(a, b)
#define GAUGE_TEST_CASE(function, name)                             \
  static void function();                                           \
  [[maybe_unused]] static const bool GAUGE_JOIN(function, _added) = \
      gauge_ext::test::add(name, function);                         \
  static void function()

#define TEST_CASE(name) GAUGE_TEST_CASE(GAUGE_JOIN(test_case_, __COUNTER__), name)
#define CHECK(...) gauge_ext::test::report(bool(__VA_ARGS__), __FILE__, __LINE__, #__VA_ARGS__)
#define CHECK_CLOSE(got, expected, tolerance) \
  gauge_ext::test::report_close(double(got), double(expected), tolerance, __FILE__, __LINE__)
#define REQUIRE(...)                      \
  do {                                    \
    if (!CHECK(__VA_ARGS__)) {            \
      throw gauge_ext::test::Abandoned{}; \
    }                                     \
  } while (false)
#define CHECK_THROWS(...)                                                               \
  do {                                                                                  \
    bool thrown = false;                                                                \
    try {                                                                               \
      (void)(__VA_ARGS__);                                                              \
    } catch (const std::exception&) {                                                   \
      thrown = true;                                                                    \
    }                                                                                   \
    gauge_ext::test::report(thrown, __FILE__, __LINE__, "should throw: " #__VA_ARGS__); \
  } while (false)
