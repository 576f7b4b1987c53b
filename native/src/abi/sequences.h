// The struct of a call of several sequences.
#pragma once

#include "abi/problem.h"

namespace qkv {

// Sequences of one call, whose queries follow each other and whose keys lie in pages. A `Problem` says the rest: its lq
// is the number of all queries; its lk, offsets and pages have no meaning; its k and v are (page, head, row, column);
// and its lse, and delta of its `Gradients`, are (heads, all queries). The last query of each sequence stands at its
// last key. Keys that are packed one after the other are those of a single page.
struct Sequences {
    int64_t count;
    const int64_t* starts;   // (count + 1), where the queries of each begin, and the end
    const int64_t* firsts;   // (count), where in its pages the keys of each begin
    const int64_t* lengths;  // (count), keys of each
    const int64_t* tables;   // (count, entries), the pages of each in order; or null: the first one holds all
    int64_t entries;         // for each sequence, of which only those are read that hold keys of it
    int64_t pages, page_size;
    int64_t alibi;  // from the slopes of a sequence to those of the next, 0 or heads
};

}  // namespace qkv
