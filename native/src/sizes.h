// The sizes that were chosen by measuring, except that of huge pages (runtime/huge_pages.h). "Step" is a numbered trial
// of docs/log.md; sizes after "not" were tried there and are worse. A size without a step was not tried otherwise.
#pragma once

#include <cstdint>

namespace qkv {

// Blocks
constexpr int BLOCK_M = 64;               // query rows of a tile: steps 1, 17, 40; not 32, 128
constexpr int BLOCK_N = 96;               // keys of a block of scores: steps 1, 17, 41; not 48, 192 to 384
constexpr int SUBBLOCK = 12;              // keys of a segment at the edge of a mask: steps 1, 22; not 16 to 32
constexpr int KV_SPLIT = 480;             // keys that are accumulated separately and merged in order: steps 8, 41
constexpr int BWD_BLOCK_N = 3 * BLOCK_N;  // keys whose gradients a thread keeps: steps 9, 21; not 192

// The micro-kernel
constexpr int micro_vecs(int registers) { return registers == 32 ? 4 : 2; }  // vectors of C side by side: step 1
constexpr int micro_rows(int registers, int lanes, int vecs) {               // rows of C, in registers: steps 1, 3, 15
    if (registers == 32) return vecs <= 2 ? 12 : (vecs == 3 ? 8 : 6);        // up to 24 vectors of 32 registers
    if (lanes == 8) return vecs == 1 ? 12 : 6;                               // 12 of 16
    return vecs == 1 ? 8 : 4;
}
constexpr int64_t F32_CHAIN = 32;       // multiply-adds of a sum along the width: steps 91, 98; not 16, 64
constexpr int PREFETCH_ROWS = BLOCK_N;  // keys or values ahead that are prefetched: step 54
constexpr int VECS_AT_ONCE = 4;         // vectors of rows whose maxima and sums stay in registers: step 14
constexpr int SUMS_AT_ONCE = 4;         // sums or maxima side by side, not to wait for one: steps 59, 101
constexpr int AMX_IDLE_KEYS = 24;       // keys between two products that keep AMX warm: steps 39, 83

// Operands
constexpr int64_t FAR_STRIDE = 512;       // numbers between rows that are copied side by side: step 51
constexpr int64_t FEW_KEYS = 32;          // the most keys whose rows are read in place all the same: step 104
constexpr int64_t PREPARE_TILES = 16;     // the fewest tiles for which they are copied once for all: step 61
constexpr int64_t PREPARE_TILES_OWN = 4;  // the same for a thread that keeps the memory: step 86
constexpr int64_t PREPARE_KEYS = 4;       // the most keys for each query row with which it pays
constexpr int64_t COPY_ROWS = 256;        // rows that a thread copies at a time
constexpr int64_t COPY_K_BLOCKS = 16;     // blocks of AMX_K keys that a thread packs at a time

// Decoding and short queries
constexpr int DECODE_ROWS = 8;             // rows of one query that go key by key, at most: steps 2, 5, 10
constexpr int AMX_DECODE_ROWS = 3;         // the fewest rows of bf16 that go by tiles: step 43
constexpr int DECODE_KEYS = 2;             // keys that several rows read side by side: steps 11, 36
constexpr int DECODE_PREFETCH_KEYS = 16;   // keys ahead that several rows prefetch: steps 7, 26, 68
constexpr int SHORT_PREFETCH_VALUES = 32;  // values ahead that a short query prefetches: step 97; not 16
constexpr int decode_vecs(int lanes) { return lanes == 4 ? 4 : 1; }  // vectors of a key or value for each prefetch
constexpr int dot_spans(int rows) { return rows <= 4 ? 2 : 1; }      // vectors of pairs at a time: step 36

// Few rows through a projection
constexpr int64_t FEW_ROWS_CHAIN = 256;              // columns of a chain of sums: step 106; not 512, 1024
constexpr int64_t FEW_ROWS_CHUNK = 6;                // rows of the weight that a thread takes: step 107; not 12, 24
constexpr int64_t FEW_ROWS_AT_ONCE = 4;              // rows of x in registers, at most
constexpr int64_t FEW_ROWS_AHEAD = 16 << 10;         // bytes of a row that are prefetched ahead: step 107; not 2, 4 KB
constexpr int64_t FEW_ROWS_SHORT = 2 << 10;          // the most bytes of rows that are prefetched in order: step 108
constexpr int64_t FEW_ROWS_THREAD_BYTES = 64 << 10;  // of weights for each thread
constexpr int few_rows_weights(int registers, int rows) {  // rows of the weight in registers beside them: step 106
    return rows == 1 ? 6 : (rows == 2 ? 4 : (rows == 3 ? 3 : (registers == 32 ? 4 : 2)));
}

// Rotary embedding
constexpr int ROTARY_PAIRS = 64;  // pairs of a table, a multiple of LANES
constexpr int ROTARY_TOKENS = 8;  // tokens whose tables are made at a time, to stay in the L1 cache

// Norms
constexpr int NORM_SUMS = 4;               // vectors of sums side by side, not to wait for one
constexpr int64_t NORM_NUMBERS = 1 << 12;  // numbers that a thread takes at a time

// A gated MLP
constexpr int64_t GATE_NUMBERS = 1 << 12;  // numbers that a thread activates at a time

// A layer's step
constexpr int64_t PARALLEL_STEP = 1 << 14;  // the fewest numbers of queries that several threads prepare

// Softmax
constexpr float ROW_MAX_LAG = 8;    // exponents of 2 by which a maximum may lag behind: step 1
constexpr float LARGE_SCORE = 256;  // scores from here on round so that weights show it: step 93

// Threads
constexpr int64_t OWN_HEADS = 8;          // the fewest heads for each thread with which it prepares its own: step 86
constexpr int SPLIT_TILES = 4;            // tiles for each thread below which their keys are split
constexpr int SPIN_TRIES = 1000;          // reads of a counter before a thread yields
constexpr int64_t SEQUENCE_OVERHEAD = 8;  // cost of a sequence besides its scores, in tokens

}  // namespace qkv
