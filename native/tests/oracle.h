// What a problem's results are: plain loops in double, which never use a hidden key; and how far a kernel that computes
// in fp32 may be off, from the roundings on its way.
#pragma once

#include <algorithm>
#include <vector>

#include "abi/problem.h"

namespace qkv {

// Values, and the error that each may have.
struct Allowed {
    std::vector<double> value, error;

    explicit Allowed(int64_t size = 0) : value(size), error(size) {}
};

// Dense, in the order (batch, head, row, column).
struct Expected {
    Allowed out, lse;
    Allowed dq, dk, dv, d_bias, d_alibi;  // empty without gradients
};

// Whether the mask of a problem shows a key to a query.
bool is_visible(const Problem& p, int64_t batch, int64_t head, int64_t query, int64_t key);

// How far a kernel may round what it multiplies: weights to a dtype, keys and values that were i8 to a dtype, and
// queries and the products of weights and scales to fixed point.
struct Roundoff {
    double weights = 0, keys = 0;  // of each number
    double fixed_point = 0;        // of the largest number of a row

    double of_fixed_point(double largest) const {
        return fixed_point > 0 ? std::max(fixed_point * largest, 0x1.1p-127) : 0;
    }
};

// `kept` says which weights dropout keeps, (batch, head, query, key), and is empty without dropout.
Expected expect(const Problem& p, const Gradients* g, const std::vector<bool>& kept, const Roundoff& roundoff);

}  // namespace qkv
