// The fast path from tensors of Python to a gated MLP of few rows.
#include <initializer_list>

#include "abi/python_rows.h"
#include "abi/python_steps.h"

namespace qkv {
namespace {

// The tensors of a call, in the order in which Python gives them.
struct Tensors {
    dlpack::Tensor x, gate_weight, gate_bias, up_weight, up_bias, down_weight, down_bias, out;

    // Whether all could be read.
    bool look(const Interpreter& python, void* const* objects) {
        for (dlpack::Tensor* tensor :
             {&x, &gate_weight, &gate_bias, &up_weight, &up_bias, &down_weight, &down_bias, &out})
            if (!python.look(*objects++, *tensor)) return false;
        return true;
    }
};

// The second half of a projection, as a projection; the first one stays.
Projection split(Projection& both) {
    both.out_features /= 2;
    Projection second = both;
    const int64_t item = size_of(both.dtype);
    second.weight = (const char*)both.weight + both.out_features * both.weight_row * item;
    if (both.bias) second.bias = (const char*)both.bias + both.out_features * item;
    return second;
}

// Whether the tensors fit together; if so, the MLP is filled in, apart from numbers.
bool make_mlp(const Tensors& t, GatedMlp& mlp) {
    Dtype dtype, of_out;
    if (!holds_rows(t.x) || !holds_rows(t.out) || !dtype_of(t.x, dtype) || !dtype_of(t.out, of_out)) return false;
    if (dtype == Dtype::i8 || of_out != dtype || !holds_rows(t.gate_weight) || !holds_rows(t.down_weight)) return false;
    int64_t rows, x_row, out_rows;
    if (!rows_of(t.x, rows, x_row) || !rows_of(t.out, out_rows, mlp.down.out_row) || out_rows != rows) return false;
    const int64_t in = t.x.shape[t.x.dimensions - 1], gate = t.gate_weight.shape[0];
    if (!projection_of(t.gate_weight, t.gate_bias, dtype, rows, in, gate, mlp.gate)) return false;
    if (!is_given(t.up_weight)) {
        if (gate % 2 != 0) return false;
        mlp.up = split(mlp.gate);
    } else if (!projection_of(t.up_weight, t.up_bias, dtype, rows, in, gate, mlp.up)) {
        return false;
    }
    mlp.gate.x = mlp.up.x = data_of(t.x), mlp.gate.x_row = mlp.up.x_row = x_row;
    const int64_t out_row = mlp.down.out_row, out = t.out.shape[t.out.dimensions - 1];
    if (!projection_of(t.down_weight, t.down_bias, dtype, rows, mlp.gate.out_features, out, mlp.down)) return false;
    mlp.down.out = data_of(t.out), mlp.down.out_row = out_row;
    return true;
}

}  // namespace

bool read_mlp(const Interpreter& python, void* const* tensors, GatedMlp& mlp) {
    Tensors given;
    mlp = {};
    return given.look(python, tensors) && make_mlp(given, mlp);
}

}  // namespace qkv

// A gated MLP (abi/gated_mlp.h) of the rows of x, written to out, of tensors of Python, whose lock the caller has.
// Biases may be None; so may up_weight, and then the first half of gate_weight is that of the gate, the second one of
// up. Returns as qkv_gated_mlp; or OTHER, and does nothing, if the tensors are of another kind or do not fit together.
QKV_EXPORT int qkv_fast_gated_mlp(const void* interpreter, void* x, void* gate_weight, void* gate_bias, void* up_weight,
                                  void* up_bias, void* down_weight, void* down_bias, void* out, int activation,
                                  int threads) {
    const auto& python = *(const qkv::Interpreter*)interpreter;
    void* const objects[] = {x, gate_weight, gate_bias, up_weight, up_bias, down_weight, down_bias, out};
    qkv::GatedMlp mlp;
    if (!qkv::read_mlp(python, objects, mlp)) return qkv::OTHER;
    mlp.activation = (qkv::Activation)activation, mlp.threads = threads;
    return python.unlocked([&] { return qkv_gated_mlp(&mlp); });
}
