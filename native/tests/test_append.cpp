// New keys and values written into the memory of a cache, through tensors as Python hands them out.
#include "call.h"
#include "library.h"
#include "objects.h"

extern "C" int qkv_append(const void* interpreter, void* k, void* v, void* keys, void* values, void* k_scale,
                          void* v_scale, int64_t start, int threads);

namespace qkv {
namespace {

constexpr int64_t CAPACITY = 7, START = 4;

// Memory of keys or values, in int8 with scales or not, and tokens for it.
struct Part {
    qkv::Tensor tokens, memory, scale;
    Object token_object, memory_object, scale_object;

    Part(Dtype dtype, bool scaled, int64_t rows, int64_t width, const Layout& layout)
        : tokens(dtype, 2, 3, rows, width, layout),
          memory(scaled ? Dtype::i8 : dtype, 2, 3, CAPACITY, width, {false, false, false, 0, 0}),
          scale(Dtype::f32, 2, 3, CAPACITY, 1, {}), token_object(tokens), memory_object(memory),
          scale_object(scale, 3) {
        double number = 0;
        tokens.fill([&] { return number += 0.25; });
        memory.fill([] { return 1; });
        scale.fill([] { return 1; });
    }
};

int append(Part& k, Part& v, bool scaled, int64_t start) {
    void* const scales[] = {scaled ? (void*)&k.scale_object : &none, scaled ? (void*)&v.scale_object : &none};
    return qkv_append(&python, &k.token_object, &v.token_object, &k.memory_object, &v.memory_object, scales[0],
                      scales[1], start, 2);
}

void check_written(const Part& part, bool scaled) {
    for (int64_t b = 0; b < 2; ++b)
        for (int64_t h = 0; h < 3; ++h)
            for (int64_t row = 0; row < CAPACITY; ++row) {
                const bool is_new = row >= START && row < START + part.tokens.rows;
                const double scale = part.scale.get(b, h, row, 0);
                for (int64_t d = 0; d < part.tokens.width; ++d) {
                    const double got = part.memory.get(b, h, row, d);
                    const double given = is_new ? part.tokens.get(b, h, row - START, d) : 1;
                    if (!is_new || !scaled)
                        require(got == given && scale == 1, "a number is not where it should be");
                    else
                        require(std::abs(got * scale - given) <= 0.5001 * scale, "rounded by more than half a step");
                }
            }
    require(part.tokens.is_intact() && part.memory.is_intact() && part.scale.is_intact(), "written beside a tensor");
}

}  // namespace

TEST(append_writes_new_tokens_alone) {
    for (Dtype dtype : {Dtype::f32, Dtype::bf16, Dtype::f16})
        for (bool scaled : {false, true})
            for (int64_t rows : {1, 3})
                for (const Layout& layout : {Layout{}, Layout{true, false, false, 3, 1}, {false, true, true, 1, 0}}) {
                    Part k(dtype, scaled, rows, 33, layout), v(dtype, scaled, rows, 17, layout);
                    taken = 0;
                    require(append(k, v, scaled, START) == 0 && taken == 1, "not appended");
                    check_written(k, scaled);
                    check_written(v, scaled);
                }
}

// Each case changes values alone: keys, which fit, must not be written either.
TEST(append_refuses_what_does_not_fit) {
    const std::function<void(Part&)> changes[] = {
        [](Part& v) { v.token_object.lanes = 0; },
        [](Part& v) { v.token_object.device = (dlpack::Device)2; },
        [](Part& v) { v.token_object.dimensions = 3; },
        [](Part& v) { v.token_object.own_shape[0] = 1; },
        [](Part& v) { v.token_object.own_shape[1] = 1; },
        [](Part& v) { v.token_object.own_shape[2] = 1; },
        [](Part& v) { v.token_object.own_shape[2] = 0; },
        [](Part& v) { v.token_object.own_shape[3] = 16; },
        [](Part& v) { v.token_object.own_strides[3] = 2; },
        [](Part& v) { v.token_object.bits = 64; },
        [](Part& v) { v.token_object.code = dlpack::INT, v.token_object.bits = 8; },
        [](Part& v) { v.memory_object.own_shape[2] = START + 1; },
        [](Part& v) { v.memory_object.own_strides[3] = 2; },
        [](Part& v) { v.memory_object.code = dlpack::BOOL; },
        [](Part& v) { v.memory_object.device = (dlpack::Device)2; },
    };
    const std::function<void(Part&)> changes_of_scales[] = {
        [](Part& v) { v.scale_object.dimensions = 4; },     [](Part& v) { v.scale_object.own_shape[0] = 1; },
        [](Part& v) { v.scale_object.own_shape[1] = 4; },   [](Part& v) { v.scale_object.own_shape[2] = START + 1; },
        [](Part& v) { v.scale_object.own_strides[2] = 2; }, [](Part& v) { v.scale_object.bits = 16; },
        [](Part& v) { v.scale_object.dimensions = -1; },
    };
    const auto refuses = [](const std::function<void(Part&)>& change, bool scaled, int64_t start) {
        Part k(Dtype::f32, scaled, 2, 33, {}), v(Dtype::f32, scaled, 2, 17, {});
        const std::string keys = k.memory.bits(), values = v.memory.bits();
        change(v);
        require(append(k, v, scaled, start) == 2, "appended what does not fit");
        require(k.memory.bits() == keys && v.memory.bits() == values, "written before it was refused");
    };
    for (bool scaled : {false, true}) {
        for (const auto& change : changes) refuses(change, scaled, START);
        for (int64_t start : {(int64_t)-1, CAPACITY - 1, CAPACITY, INT64_MAX}) refuses([](Part&) {}, scaled, start);
    }
    for (const auto& change : changes_of_scales) refuses(change, true, START);
}

}  // namespace qkv
