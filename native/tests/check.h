// Tests that register themselves, and checks that say where they fail.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

namespace qkv {

struct Test {
    std::string name;  // FILE:NAME
    void (*run)();
};

inline std::vector<Test>& tests() {
    static std::vector<Test> all;
    return all;
}

struct Registered {
    Registered(const std::string& file, const std::string& name, void (*run)()) {
        tests().push_back({file.substr(file.find_last_of("/\\") + 1) + ":" + name, run});
    }
};

struct Failure : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// A test could not be run here, and why.
struct Skipped : std::runtime_error {
    using std::runtime_error::runtime_error;
};

inline void require(bool condition, const std::string& message) {
    if (!condition) throw Failure(message);
}

}  // namespace qkv

#define TEST(name)                                                         \
    static void name();                                                    \
    static const qkv::Registered registered_##name(__FILE__, #name, name); \
    static void name()
