// Norms of rows: numbers against doubles, in any order of rounding, and nothing read or written beyond rows.
#include "abi/rms_norm.h"
#include "check.h"
#include "rows.h"

extern "C" void qkv_rms_norm(const void* norm);

namespace qkv {
namespace {

RmsNorm norm_of(const Rows& x, const Rows* gains, const Rows& out, Gain gain) {
    return {x.dtype,      gain,       x.rows, x.columns, x.at(0, 0), x.stride, gains ? gains->at(0, 0) : nullptr,
            out.at(0, 0), out.stride, 1e-3f,  2};
}

double round_to(Dtype dtype, double x) {
    char rounded[4];
    encode(dtype, x, rounded);
    return decode(dtype, rounded);
}

void check(Dtype dtype, Gain gain, bool has_gains, int64_t rows, int64_t width, int64_t apart) {
    const Rows x(dtype, rows, width, apart), gains(dtype, 1, width), out(dtype, rows, width, apart);
    x.fill(1), gains.fill(2);
    const RmsNorm norm = norm_of(x, has_gains ? &gains : nullptr, out, gain);
    qkv_rms_norm(&norm);
    const Format& format = format_of(dtype);
    // Squares of numbers as they are filled in add up exactly; what follows has at most six roundings in fp32.
    for (int64_t r = 0; r < rows; ++r) {
        double squares = 0;
        for (int64_t c = 0; c < width; ++c) squares += x(r, c) * x(r, c);
        const double factor = 1 / std::sqrt(squares / (double)width + 1e-3f);
        for (int64_t c = 0; c < width; ++c) {
            const double y = x(r, c) * factor, scale = has_gains ? gains(0, c) + (gain == Gain::one_more) : 1.0;
            const int roundings = gain == Gain::rounded && has_gains ? 2 : 1;
            const double bound = std::abs(y * scale) * (6 * 0x1p-24 + roundings * format.roundoff * 1.01) +
                                 (1 + std::abs(scale)) * format.subnormal;
            require(std::abs(out(r, c) - y * scale) <= bound, std::string(format.name) + ": wrong number");
        }
    }
}

TEST(norms_are_those_of_doubles) {
    for (const Dtype dtype : {Dtype::f32, Dtype::bf16, Dtype::f16})
        for (const Gain gain : {Gain::rounded, Gain::widened, Gain::one_more})
            for (const bool has_gains : {true, false})
                for (const int64_t width : {1, 2, 7, 8, 15, 16, 31, 33, 64, 65, 127, 600})
                    check(dtype, gain, has_gains, 1 + width % 4, width, width % 3);
}

TEST(gains_meet_rounded_numbers_or_wide_ones) {
    const Rows x(Dtype::bf16, 1, 3), gains(Dtype::bf16, 1, 3), out(Dtype::bf16, 1, 3);
    const double given[] = {1, 2, 1.015625};
    for (int64_t c = 0; c < 3; ++c) encode(Dtype::bf16, given[c], x.at(0, c)), encode(Dtype::bf16, 1.4, gains.at(0, c));
    double squares = 0;
    for (const double number : given) squares += number * number;
    const double factor = 1 / std::sqrt(squares / 3 + 1e-3f), gain = gains(0, 0);
    int differ = 0;
    for (const Gain how : {Gain::rounded, Gain::widened}) {
        const RmsNorm norm = norm_of(x, &gains, out, how);
        qkv_rms_norm(&norm);
        for (int64_t c = 0; c < 3; ++c) {
            const double y = given[c] * factor;
            const double rounded = round_to(Dtype::bf16, round_to(Dtype::bf16, y) * gain);
            const double wide = round_to(Dtype::bf16, y * gain);
            require(out(0, c) == (how == Gain::rounded ? rounded : wide), "rounded elsewhere");
            differ += rounded != wide;
        }
    }
    require(differ > 0, "an example that tells nothing");
}

TEST(norms_are_computed_in_place_and_by_row) {
    for (const Dtype dtype : {Dtype::f32, Dtype::bf16, Dtype::f16}) {
        const Rows x(dtype, 90, 131), out(dtype, 90, 131), gains(dtype, 1, 131);
        x.fill(1), gains.fill(2);
        RmsNorm norm = norm_of(x, &gains, out, Gain::widened);
        qkv_rms_norm(&norm);
        for (int64_t r = 0; r < x.rows; ++r) {
            norm.rows = 1, norm.x = norm.out = x.at(r, 0);
            qkv_rms_norm(&norm);
            require(std::memcmp(x.at(r, 0), out.at(r, 0), 131 * size_of(dtype)) == 0, "other bits");
        }
    }
}

}  // namespace
}  // namespace qkv
