// Products of 1 to 16 rows with the weight of a linear layer as it lies in memory, at the speed of memory.
//
// Lanes lie along the columns that are summed over, which are next to each other in x and in the weight. Each weight is
// read once: while FEW_ROWS_CHUNK rows of the weight meet all rows of x over FEW_ROWS_CHAIN columns, the next columns
// are prefetched.
//
// A number of out is the sum of chains of multiply-adds, FEW_ROWS_CHAIN columns each, in the order of columns, and
// then of its lanes: an order that depends on the number of columns alone. So a row has the same bits whatever the rows
// beside it, the products and the threads.
#pragma once

#include "abi/projection.h"

namespace qkv {
namespace QKV_ISA {

// Products as the items of one parallel loop over all of their output features. A product has 1 to MOST_ROWS rows, and
// there are at most MOST_PRODUCTS. Construction packs the rows of x, once for neighbours that have the same, in memory
// of this thread that it keeps: there is one FewRows at a time in a thread. Then any thread may take any item.
class FewRows {
   public:
    FewRows(const Projection* products, int count);

    int64_t items() const { return first[count]; }

    void operator()(int64_t item) const;

   private:
    const Projection* products;
    int count;
    int64_t first[MOST_PRODUCTS + 1];  // items
    const float* packed[MOST_PRODUCTS];
};

// All items of `FewRows`, on up to `threads` threads; small weights on fewer.
void project(const Projection* products, int count, int threads);

}  // namespace QKV_ISA
}  // namespace qkv
