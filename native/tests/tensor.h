// Tensors of heads in any layout, surrounded by NaN.
#pragma once

#include <functional>
#include <memory>
#include <random>

#include "memory.h"
#include "numbers.h"

namespace qkv {

// How a tensor (batch, head, row, column) lies in memory.
struct Layout {
    bool tokens_first = false;  // (batch, row, head, column) in memory
    bool one_batch = false;     // all batches are the same memory
    bool one_head = false;      // all heads are
    int64_t gap = 0;            // elements between rows
    int64_t slack = 0;          // elements between the end and a page that faults
};

class Tensor {
   public:
    // All NaN.
    Tensor(Dtype dtype, int64_t batch, int64_t heads, int64_t rows, int64_t width, Layout layout)
        : dtype(dtype), batch(batch), heads(heads), rows(rows), width(width), item(format_of(dtype).item) {
        const int64_t pitch = width + layout.gap, batches = layout.one_batch ? 1 : batch;
        const int64_t own_heads = layout.one_head ? 1 : heads;
        const int64_t elements = std::max<int64_t>(0, batches * own_heads * rows * pitch - layout.gap);
        memory = std::make_shared<Memory>(elements * item, layout.slack * item);
        memory->poison();
        view.data = memory->as<void>();
        view.row = layout.tokens_first ? own_heads * pitch : pitch;
        view.head = layout.one_head ? 0 : (layout.tokens_first ? pitch : rows * pitch);
        view.batch = layout.one_batch ? 0 : own_heads * rows * pitch;
        each_row([&](char* row) { memory->allow(row, width * item); });
    }

    // The first columns of another tensor, in its memory.
    Tensor(const Tensor& whole, int64_t width)
        : dtype(whole.dtype), batch(whole.batch), heads(whole.heads), rows(whole.rows), width(width), view(whole.view),
          item(whole.item), memory(whole.memory) {}

    void fill(const std::function<double()>& number) const {
        each_row([&](char* row) {
            for (int64_t d = 0; d < width; ++d) encode(dtype, number(), row + d * item);
        });
    }

    void set(int64_t b, int64_t h, int64_t row, int64_t d, double x) const {
        encode(dtype, x, at(b, h, row) + d * item);
    }

    // Makes the bits of a row those of another, of the same dtype and width.
    void copy_row(int64_t b, int64_t h, int64_t row, const char* from) const {
        std::memcpy(at(b, h, row), from, width * item);
    }

    double get(int64_t b, int64_t h, int64_t row, int64_t d) const { return decode(dtype, at(b, h, row) + d * item); }

    char* at(int64_t b, int64_t h, int64_t row) const {
        return (char*)view.data + (b * view.batch + h * view.head + row * view.row) * item;
    }

    // The bits of all elements, whatever the layout.
    std::string bits() const {
        std::string all;
        each_row([&](const char* row) { all.append(row, width * item); });
        return all;
    }

    // Whether nothing was written outside of the elements.
    bool is_intact() const {
        if (memory->is_vast()) return true;
        memory->allow(memory->as<void>(), memory->size);
        std::string image(memory->as<char>(), memory->size);
        each_row([&](const char* row) { std::memset(&image[row - memory->as<char>()], 0xff, width * item); });
        return image.find_first_not_of('\xff') == std::string::npos;
    }

    const Dtype dtype;
    const int64_t batch, heads, rows, width;
    View view;

   private:
    void each_row(const std::function<void(char*)>& work) const {
        if (width == 0) return;
        for (int64_t b = 0; b < batch; ++b)
            for (int64_t h = 0; h < heads; ++h)
                for (int64_t row = 0; row < rows; ++row) work(at(b, h, row));
    }

    const int64_t item;
    std::shared_ptr<Memory> memory;
};

}  // namespace qkv
