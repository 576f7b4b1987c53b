// Gated MLPs of few rows: numbers against doubles, and bits by row and by threads.
#include "abi/gated_mlp.h"
#include "check.h"
#include "rows.h"

extern "C" int qkv_gated_mlp(const void* mlp);

namespace qkv {
namespace {

// An MLP of so many rows, and its memory.
struct Example {
    Rows x, gate, gate_bias, up, up_bias, down, down_bias, out;

    Example(Dtype dtype, int64_t rows, int64_t width, int64_t features)
        : x(dtype, rows, width, 3), gate(dtype, features, width, 1), gate_bias(dtype, 1, features),
          up(dtype, features, width), up_bias(dtype, 1, features), down(dtype, width, features, 2),
          down_bias(dtype, 1, width), out(dtype, rows, width, 5) {
        unsigned seed = 0;
        for (const Rows* each : {&x, &gate, &gate_bias, &up, &up_bias, &down, &down_bias}) each->fill(++seed);
    }

    GatedMlp mlp(Activation activation, int threads = 2) const {
        const Rows unset(x.dtype, x.rows, gate.rows);
        return {projection(x, gate, &gate_bias, unset), projection(x, up, &up_bias, unset),
                projection(Rows(x.dtype, x.rows, gate.rows), down, &down_bias, out), activation, threads};
    }
};

double activated(Activation activation, double x) {
    switch (activation) {
        case Activation::silu: return x / (1 + std::exp(-x));
        case Activation::gelu: return 0.5 * x * std::erfc(-x / std::sqrt(2.0));
        case Activation::gelu_tanh: return 0.5 * x * (1 + std::tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)));
        case Activation::relu: break;
    }
    return std::max(x, 0.0);
}

void check(Dtype dtype, Activation activation, int64_t rows, int64_t width, int64_t features) {
    const Example e(dtype, rows, width, features);
    const GatedMlp mlp = e.mlp(activation);
    require(qkv_gated_mlp(&mlp) == 0, "not an MLP that the kernel takes");
    const double unit = std::max(format_of(dtype).roundoff, 0x1p-24);
    for (int64_t r = 0; r < rows; ++r) {
        std::vector<double> hidden, off;  // and how far that may be off
        for (int64_t f = 0; f < features; ++f) {
            double gate = e.gate_bias(0, f), up = e.up_bias(0, f);
            for (int64_t c = 0; c < width; ++c) gate += e.x(r, c) * e.gate(f, c), up += e.x(r, c) * e.up(f, c);
            hidden.push_back(activated(activation, gate) * up);
            // One rounding each of gate (slopes are below 1.2), activation, up and product; those of the activation.
            off.push_back(std::abs(gate * up) * 1.2 * 4 * (unit + 4 * 0x1p-24));
        }
        for (int64_t c = 0; c < width; ++c) {
            double sum = e.down_bias(0, c), terms = std::abs(sum), bound = 0;
            for (int64_t f = 0; f < features; ++f) {
                sum += hidden[f] * e.down(c, f);
                terms += std::abs(hidden[f] * e.down(c, f)), bound += off[f] * std::abs(e.down(c, f));
            }
            bound += (double)(features + 8) * 0x1p-24 * terms + unit * std::abs(sum);
            require(std::abs(e.out(r, c) - sum) <= bound, std::string(format_of(dtype).name) + ": wrong number");
        }
    }
}

TEST(gated_mlps_are_those_of_doubles) {
    for (const Dtype dtype : {Dtype::f32, Dtype::bf16, Dtype::f16})
        for (const Activation activation :
             {Activation::silu, Activation::gelu, Activation::gelu_tanh, Activation::relu})
            for (const int64_t width : {1, 8, 21})
                for (const int64_t features : {1, 7, 16, 35}) check(dtype, activation, 1 + width % 16, width, features);
}

TEST(rows_of_an_mlp_have_the_same_bits_alone_and_on_any_number_of_threads) {
    for (const Dtype dtype : {Dtype::f32, Dtype::bf16, Dtype::f16}) {
        const Example e(dtype, 16, 40, 700);
        const GatedMlp together = e.mlp(Activation::silu, 3);
        require(qkv_gated_mlp(&together) == 0, "not an MLP that the kernel takes");
        for (int64_t r = 0; r < 16; ++r) {
            const Rows alone(dtype, 1, 40);
            GatedMlp mlp = e.mlp(Activation::silu, 1);
            for (Projection* part : {&mlp.gate, &mlp.up, &mlp.down}) part->rows = 1;
            mlp.gate.x = mlp.up.x = e.x.at(r, 0), mlp.down.out = alone.at(0, 0);
            require(qkv_gated_mlp(&mlp) == 0, "not an MLP that the kernel takes");
            require(std::memcmp(alone.at(0, 0), e.out.at(r, 0), 40 * size_of(dtype)) == 0, "other bits");
        }
    }
}

TEST(other_numbers_of_rows_of_an_mlp_are_refused) {
    const Example e(Dtype::f32, 17, 8, 8);
    GatedMlp mlp = e.mlp(Activation::relu);
    require(qkv_gated_mlp(&mlp) == 2, "17 rows");
    mlp.gate.rows = 0;
    require(qkv_gated_mlp(&mlp) == 2, "no rows");
}

}  // namespace
}  // namespace qkv
