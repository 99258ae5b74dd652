// Runs every TEST_CASE, or those whose name contains the first argument.

#include "check_main.h"

#include <exception>

int main(int argc, char** argv) {
  using namespace gauge_ext::test;
  const std::string wanted = argc > 1 ? argv[1] : "";
  int passed = 0;
  int failed = 0;
  for (const Case& test : cases()) {
    if (test.name.find(wanted) == std::string::npos) {
      continue;
    }
    const int before = failures();
    try {
      test.run();
    } catch (const Abandoned&) {
      // REQUIRE has reported it.
    } catch (const std::exception& error) {
      report(false, test.name.c_str(), 0, error.what());
    }
    const bool good = failures() == before;
    ++(good ? passed : failed);
    std::cout << (good ? "ok      " : "FAILED  ") << test.name << '\n';
  }
  // A binary that ran nothing has tested nothing.
  std::cout << passed << " C++ tests passed, " << failed << " failed\n";
  return failed != 0 || passed == 0;
}
