// What the binding hands to the kernels of one instruction set. Plain data: this header is compiled into objects for
// different CPUs, so it must not define anything that a linker could merge (no inline functions, no std containers).
//
// Letters, as in ../attend.py: B images, L tokens of a map, N heads, D head_dim, n tokens of a tile.
// A tile's longest axis is called its rows (h of them); the other axes together are its columns (r = n / h).
// Keys are visited row by row, queries column by column. See bias.h for why.
#pragma once

#include <cstddef>
#include <cstdint>

namespace swinv2 {

// All tiles of one shape.
struct Group {
  const int64_t* tokens;   // (tiles, n): positions in 0..L-1, row-major inside the tile
  int64_t tiles;
  int n, h, r;
  const int* key_place;    // (n): where in a tile's list of tokens the j-th key stands
  const int* query_place;  // (n): and the i-th query
  const int* column;       // (r): what a column adds to an index of the bias table
  int row_stride;          // what a row adds
  int centre;              // the table's entry for a token and itself
};

// One head of tiles [first, last) of the B * tiles of a group: done by one thread from beginning to end.
struct Item {
  const Group* group;
  int head;
  int64_t first, last;
};

// Pointers to the compute type are float for bfloat16 and float inputs, double for double.
struct Problem {
  const void* qkv;          // (B, L, 3, N, D)
  const void* logit_scale;  // (N), compute type
  const void* bias_table;   // (N, table_size), compute type
  void* out;                // (B, L, N, D); forward writes it, backward reads it
  void* logsumexp;          // (B, N, L), compute type, base 2; the same
  const void* grad_out;     // (B, L, N, D)
  void* grad_qkv;           // (B, L, 3, N, D)
  void* grad_table;         // (items, table_size), compute type, zero: one partial sum an item
  double* grad_scale;       // (items)
  int64_t length, heads, table_size;
  int dim;
};

// Rows of float32 or bfloat16: x + share * LayerNorm(branch), or of its gradient the branch's.
struct Norm {
  const void *x, *branch, *grad;  // (rows, channels)
  const float *weight, *bias;     // (channels)
  const float* share;             // (samples), or none: 1
  void* out;                      // (rows, channels)
  float *mean, *rstd;             // (rows); forward writes them, backward reads them
  int64_t rows_a_sample;
  int channels;
  float eps;
};

enum Type { kFloat, kDouble, kBFloat16, kNumTypes };

struct KernelsOfType {
  size_t (*forward_bytes)(const Problem&, const Group&);  // scratch that one item needs, aligned to 64
  size_t (*backward_bytes)(const Problem&, const Group&);
  void (*forward)(const Problem&, const Item&, char* scratch);
  void (*backward)(const Problem&, const Item&, int64_t index, char* scratch);
  void (*gelu)(const void* x, void* y, int64_t count);  // none for double
  void (*gelu_backward)(const void* x, void* grad, void* y, int64_t count);
  void (*add_norm)(const Norm&, int64_t first, int64_t last);  // of rows; none for double
  void (*add_norm_backward)(const Norm&, int64_t first, int64_t last, float* sums);
};

struct Kernels {
  const char* name;
  KernelsOfType of[kNumTypes];
};

}  // namespace swinv2
