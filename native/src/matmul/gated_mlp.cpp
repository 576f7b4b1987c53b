// A gated MLP of few rows: its products and what lies between them, one after the other on the same threads.
#include "abi/gated_mlp.h"

#include "mask/query_tile.h"
#include "matmul/few_rows.h"
#include "rowwise/activation.h"
#include "runtime/parallel.h"
#include "simd/transpose.h"
#include "sizes.h"

namespace qkv {
namespace QKV_ISA {

namespace {

// What lies between the products, in the dtype of x: (row, feature).
struct MlpScratch {
    float *gate, *up;

    MlpScratch(const GatedMlp& mlp, ArenaLayout& arena) {
        gate = arena(mlp.gate.rows * mlp.gate.out_features);
        up = arena(mlp.up.rows * mlp.up.out_features);
    }
};

// gate = activation(gate) * up, of `count` numbers.
template <Activation ACTIVATION, class DtypeConstant>
void activate_numbers(DtypeConstant dtype, char* gate, const char* up, int64_t count) {
    constexpr int64_t ITEM = size_of(DtypeConstant::value);
    for_columns(count, [&](int64_t i, int64_t part) {
        const vec activated = round_to(dtype, activate<ACTIVATION>(load_part(dtype, gate + i * ITEM, part)));
        store_part(dtype, gate + i * ITEM, activated * load_part(dtype, up + i * ITEM, part), part);
    });
}

void activate_all(const GatedMlp& mlp, char* gate, const char* up) {
    const int64_t numbers = mlp.gate.rows * mlp.gate.out_features, item = size_of(mlp.gate.dtype);
    for_activation(mlp.activation, [&](auto activation) {
        for_dtype(mlp.gate.dtype, [&](auto dtype) {
            parallel_for((numbers + GATE_NUMBERS - 1) / GATE_NUMBERS, mlp.threads, [&](int64_t part) {
                const int64_t begin = part * GATE_NUMBERS, count = std::min(GATE_NUMBERS, numbers - begin);
                activate_numbers<activation.value>(dtype, gate + begin * item, up + begin * item, count);
            });
        });
    });
}

}  // namespace

void gated_mlp(const GatedMlp& mlp) {
    const MlpScratch scratch = thread_scratch<MlpScratch>(mlp);
    Projection products[] = {mlp.gate, mlp.up}, down = mlp.down;
    products[0].out = scratch.gate, products[1].out = scratch.up;
    for (Projection& product : products) product.out_row = product.out_features;
    project(products, 2, mlp.threads);
    activate_all(mlp, (char*)scratch.gate, (const char*)scratch.up);
    down.x = scratch.gate, down.x_row = down.in_features;
    project(&down, 1, mlp.threads);
}

}  // namespace QKV_ISA
}  // namespace qkv
