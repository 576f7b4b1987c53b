// Which keys padding, documents and global tokens show, in the form that costs least: an interval of keys for each row
// if they leave no holes, otherwise a summary of each block of keys.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "abi/problem.h"
#include "sizes.h"

namespace qkv {
namespace QKV_ISA {

class KeyVisibility {
   public:
    struct BlockSummary {
        int64_t low = std::numeric_limits<int64_t>::max(), high = std::numeric_limits<int64_t>::min();
        bool any = false, all = true;  // whether any key is kept, and whether all are
        bool any_global = false;
    };

    // Of the keys of one batch.
    struct Keys {
        int64_t first = 0, end;               // keys outside are hidden
        const uint8_t* keep = nullptr;        // whether each key is kept, where those that are have holes
        const int64_t* documents = nullptr;   // of each key, where some document lies in several runs
        const uint8_t* is_global = nullptr;   // whether each position is a global token
        const int32_t* run_first = nullptr;   // first and last key of the document of each position, where all
        const int32_t* run_last = nullptr;    // documents are runs
        const BlockSummary* parts = nullptr;  // blocks, where there are holes or documents in several runs
    };

    explicit KeyVisibility(const Problem& p) {
        const bool shared = p.document_ids_batch == 0 && p.keep_batch == 0 && p.is_global_batch == 0;
        all.resize(shared ? 1 : p.batch);
        for (Keys& keys : all) keys.end = p.lk;
        if (!p.document_ids && !p.keep && !p.is_global) return;
        const int64_t rows = (int64_t)all.size(), blocks = (p.lk + BLOCK_N - 1) / BLOCK_N;
        if (p.document_ids) bounds.resize(2 * rows * p.lk);
        parts.resize(rows * blocks);
        for (int64_t row = 0; row < rows; ++row) {
            Keys& keys = all[row];
            const uint8_t* const keep = p.keep ? p.keep + row * p.keep_batch : nullptr;
            const int64_t* const documents = p.document_ids ? p.document_ids + row * p.document_ids_batch : nullptr;
            if (p.is_global) keys.is_global = p.is_global + row * p.is_global_batch;
            // No interval says that sink tokens and global tokens are seen from far away as well.
            const bool has_far_keys = p.sink_tokens > 0 || p.is_global;
            if (keep && (has_far_keys || !find_ends(keep, p.lk, keys))) keys.keep = keep;
            if (documents && (has_far_keys || !find_runs(documents, p.lk, &bounds[2 * row * p.lk], keys)))
                keys.documents = documents;
            if (keys.keep || keys.documents || keys.is_global) summarise_blocks(p.lk, &parts[row * blocks], keys);
        }
    }

    KeyVisibility(const KeyVisibility&) = delete;
    KeyVisibility& operator=(const KeyVisibility&) = delete;

    const Keys& of(int64_t batch) const { return all[all.size() == 1 ? 0 : batch]; }

   private:
    // The keys that are kept, if they follow each other.
    static bool find_ends(const uint8_t* keep, int64_t count, Keys& keys) {
        const int64_t first = std::find_if(keep, keep + count, [](uint8_t kept) { return kept; }) - keep;
        const int64_t end = std::find(keep + first, keep + count, 0) - keep;
        if (std::any_of(keep + end, keep + count, [](uint8_t kept) { return kept; })) return false;
        keys.first = first;
        keys.end = end;
        return true;
    }

    // Where each document begins and ends, if each is one run.
    static bool find_runs(const int64_t* documents, int64_t count, int32_t* bounds, Keys& keys) {
        std::vector<int64_t> names;
        for (int64_t first = 0, end; first < count; first = end) {
            for (end = first + 1; end < count && documents[end] == documents[first]; ++end) {
            }
            names.push_back(documents[first]);
            std::fill(bounds + first, bounds + end, (int32_t)first);
            std::fill(bounds + count + first, bounds + count + end, (int32_t)(end - 1));
        }
        std::sort(names.begin(), names.end());
        if (std::adjacent_find(names.begin(), names.end()) != names.end()) return false;
        keys.run_first = bounds;
        keys.run_last = bounds + count;
        return true;
    }

    // Summarises blocks of keys: range of documents, whether any key or all are kept, whether any is global.
    static void summarise_blocks(int64_t count, BlockSummary* parts, Keys& keys) {
        keys.parts = parts;
        for (int64_t key = 0; key < count; ++key) {
            BlockSummary& part = parts[key / BLOCK_N];
            if (keys.documents) {
                part.low = std::min(part.low, keys.documents[key]);
                part.high = std::max(part.high, keys.documents[key]);
            }
            if (keys.keep) {
                part.any |= keys.keep[key] != 0;
                part.all &= keys.keep[key] != 0;
            }
            if (keys.is_global) part.any_global |= keys.is_global[key] != 0;
        }
    }

    std::vector<Keys> all;  // one, or one a batch
    std::vector<int32_t> bounds;
    std::vector<BlockSummary> parts;
};

}  // namespace QKV_ISA
}  // namespace qkv
