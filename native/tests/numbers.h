// Numbers of any dtype as doubles, and back to the nearest: from the definition of the formats, by arithmetic alone.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "abi/problem.h"

namespace qkv {

struct Format {
    int64_t item;      // bytes
    int mantissa;      // bits that are stored
    int least;         // exponent of the smallest normal number
    double roundoff;   // largest relative error of rounding
    double subnormal;  // half the smallest number
    const char* name;
};

inline const Format& format_of(Dtype dtype) {
    static const Format all[] = {
        {4, 23, -126, 0x1p-24, 0x1p-150, "f32"},
        {2, 7, -126, 0x1p-8, 0x1p-134, "bf16"},
        {2, 10, -14, 0x1p-11, 0x1p-25, "f16"},
        {1, 0, 0, 0.0, 0.0, "u8"},
        {1, 0, 0, 0.0, 0.0, "i8"},
    };
    return all[(int)dtype];
}

inline double decode_half(const Format& format, int bits) {
    const int fraction = bits & ((1 << format.mantissa) - 1), exponent = (bits & 0x7fff) >> format.mantissa;
    double x;
    if (exponent == 0x7fff >> format.mantissa)
        x = fraction ? std::numeric_limits<double>::quiet_NaN() : std::numeric_limits<double>::infinity();
    else if (exponent == 0)
        x = std::ldexp(fraction, format.least - format.mantissa);
    else
        x = std::ldexp(fraction + (1 << format.mantissa), format.least + exponent - 1 - format.mantissa);
    return bits & 0x8000 ? -x : x;
}

// All numbers of 16 bits: the oracle reads each of its numbers often.
inline std::vector<double> all_halves(const Format& format) {
    std::vector<double> all;
    for (int bits = 0; bits < 1 << 16; ++bits) all.push_back(decode_half(format, bits));
    return all;
}

inline double decode(Dtype dtype, const void* from) {
    static const std::vector<double> bf16 = all_halves(format_of(Dtype::bf16)), f16 = all_halves(format_of(Dtype::f16));
    if (dtype == Dtype::u8) return *(const uint8_t*)from;
    if (dtype == Dtype::i8) return *(const int8_t*)from;
    if (dtype == Dtype::f32) {
        float x;
        std::memcpy(&x, from, sizeof x);
        return x;
    }
    uint16_t bits;
    std::memcpy(&bits, from, sizeof bits);
    return (dtype == Dtype::bf16 ? bf16 : f16)[bits];
}

inline void encode(Dtype dtype, double x, void* to) {
    if (dtype == Dtype::u8 || dtype == Dtype::i8) {
        *(uint8_t*)to = (uint8_t)(int)x;
        return;
    }
    if (dtype == Dtype::f32) {
        const float y = (float)x;
        std::memcpy(to, &y, sizeof y);
        return;
    }
    const Format& format = format_of(dtype);
    const int infinity = 0x7fff >> format.mantissa << format.mantissa;
    int bits = 0;
    if (std::isnan(x)) {
        bits = 0x7fff;
    } else if (std::isinf(x)) {
        bits = infinity;
    } else if (x != 0) {
        const int exponent = std::max(std::ilogb(x), format.least);
        // A mantissa that is rounded up to the next power of two carries into the exponent, as it should.
        const double whole = std::nearbyint(std::ldexp(std::fabs(x), format.mantissa - exponent));
        bits = std::min((int)whole + ((exponent - format.least) << format.mantissa), infinity);
    }
    const uint16_t half = (uint16_t)(bits | (std::signbit(x) ? 0x8000 : 0));
    std::memcpy(to, &half, sizeof half);
}

}  // namespace qkv
