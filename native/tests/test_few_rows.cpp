// Products of few rows: numbers against doubles, bits by row, and nothing read or written beyond rows.
#include <algorithm>
#include <random>

#include "check.h"
#include "rows.h"

extern "C" int qkv_project(const void* projections, int count, int threads);
extern "C" int qkv_projection_size();

namespace qkv {
namespace {

void project(const Projection& p, int threads = 2) {
    require(qkv_project(&p, 1, threads) == 0, "not a product that the kernel takes");
}

// Numbers are multiples of 1 / 32 up to 2, so that sums of their products are exact in fp32.
void check(Dtype dtype, Dtype out_dtype, int64_t rows, int64_t columns, int64_t features, int64_t apart) {
    const Rows x(dtype, rows, columns, apart), weight(dtype, features, columns, apart), bias(dtype, 1, features);
    const Rows out(out_dtype, rows, features, apart);
    x.fill(1), weight.fill(2), bias.fill(3);
    project(projection(x, weight, &bias, out));
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t f = 0; f < features; ++f) {
            double sum = bias(0, f);
            for (int64_t c = 0; c < columns; ++c) sum += x(r, c) * weight(f, c);
            char rounded[4];
            encode(out_dtype, sum, rounded);
            require(out(r, f) == decode(out_dtype, rounded), "wrong number");
        }
}

TEST(numbers_are_those_of_doubles) {
    require(qkv_projection_size() == sizeof(Projection), "another struct");
    for (const Dtype dtype : {Dtype::f32, Dtype::bf16, Dtype::f16})
        for (const int64_t columns : {1, 2, 7, 16, 31, 33, 64, 255, 256, 289, 600})
            for (const int64_t features : {1, 5, 6, 13, 24})
                for (const int64_t rows : {1 + columns % 5, 6 + columns % 11})
                    for (const Dtype out_dtype : {dtype, Dtype::f32})
                        check(dtype, out_dtype, rows, columns, features, columns % 3);
}

TEST(rows_have_the_same_bits_alone_and_products_together) {
    for (const Dtype dtype : {Dtype::f32, Dtype::bf16, Dtype::f16}) {
        const Rows x(dtype, 16, 300), weights[] = {{dtype, 50, 300}, {dtype, 7, 300}, {dtype, 13, 300}};
        const Rows together[] = {{Dtype::f32, 16, 50}, {Dtype::f32, 16, 7}, {Dtype::f32, 16, 13}};
        std::mt19937 random(1);
        std::normal_distribution<double> normal;
        for (const Rows* rows : {&x, &weights[0], &weights[1], &weights[2]})
            for (int64_t r = 0; r < rows->rows; ++r)
                for (int64_t c = 0; c < 300; ++c) encode(dtype, normal(random), rows->at(r, c));
        Projection products[3];
        for (int i = 0; i < 3; ++i) products[i] = projection(x, weights[i], nullptr, together[i]);
        require(qkv_project(products, 3, 3) == 0, "not products that the kernel takes");
        for (int i = 0; i < 3; ++i)
            for (int64_t r = 0; r < 16; ++r) {
                const Rows alone(Dtype::f32, 1, weights[i].rows);
                Projection p = products[i];
                p.rows = 1, p.x = x.at(r, 0), p.out = alone.at(0, 0);
                project(p, 1);
                require(std::memcmp(alone.at(0, 0), together[i].at(r, 0), alone.memory.size) == 0, "other bits");
            }
    }
}

TEST(other_numbers_of_rows_and_products_are_refused) {
    const Rows x(Dtype::f32, 17, 8), weight(Dtype::f32, 3, 8), out(Dtype::f32, 17, 3);
    Projection p = projection(x, weight, nullptr, out);
    require(qkv_project(&p, 1, 1) == 2, "17 rows");
    p.rows = 0;
    require(qkv_project(&p, 1, 1) == 2, "no rows");
    require(qkv_project(&p, MOST_PRODUCTS + 1, 1) == 2, "too many products");
    require(qkv_project(&p, 0, 1) == 0, "no products");
}

}  // namespace
}  // namespace qkv
