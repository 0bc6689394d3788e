// What every instruction set's kernel is given: one product x @ W of a packed matrix.
#ifndef KERNELS_CPU_PROBLEM_H_
#define KERNELS_CPU_PROBLEM_H_

#include <cstdint>
#include <functional>
#include <vector>

namespace lowbit {

inline constexpr int kPanel = 16;   // outputs that are computed together
inline constexpr int kRows = 4;     // rows of x that are computed together
inline constexpr int kMaxPlanes = 3;

// Of a plane's width: where `Quantized` keeps the activations for it.
inline int Log2(int width) { return width == 8 ? 3 : width == 4 ? 2 : width == 2 ? 1 : 0; }

// Words of one plane: codes of `width` bits, consecutive along K from the lowest bits up. The word
// of row r and output n is words[(n / 16) * panel_stride + r * row_stride + n % 16].
struct Plane {
  const int32_t* words;
  int width;
  int shift;  // of its bits within a code
  int64_t panel_stride;
  int64_t row_stride;
};

// Part of K that lies within one group and whose integer sums fit.
struct Chunk {
  int64_t begin;
  int64_t end;
  int64_t group;
};

struct Problem {
  int64_t m, n, k;   // of y = x @ W; k is that of x
  int64_t k_padded;  // multiple of 32: what the words hold
  int64_t n_padded;  // multiple of 16: what the words, scales and zero points hold
  int planes;
  Plane plane[kMaxPlanes];
  int bits;
  std::vector<Chunk> chunks;
  const float* scale;         // [groups, n_padded]
  const uint8_t* zero_point;  // the same shape, or null
  // A code stands for code * step + low, or for table[code] where there is a table.
  float step, low;
  const float* table;          // 2**bits values, or null
  // The same in integers, for int8 activations: ((code << int_shift) + int_low) * int_unit, codes
  // being looked up in int_table first where there is one.
  int32_t int_shift, int_low;
  float int_unit;
  const uint8_t* int_table;  // 16 values, or null
  int int_max;               // its largest value
  float smallest_scale;      // of activations
  const float* x;  // [m, k]
  float* y;        // [m, n]
};

// Activations of an integer product.
struct Quantized {
  std::vector<int8_t> rows;       // [m, k_padded] rounded activations
  std::vector<int32_t> words[4];  // by log2(width): per tile of rows [k / 4, rows in the tile]
  std::vector<int32_t> sums;      // [m, chunks]
  std::vector<float> scales;      // [m]
};

// Runs f(0) .. f(count - 1), in any order, on the threads there are.
using Parallel = std::function<void(int64_t count, const std::function<void(int64_t)>& f)>;

// One instruction set.
struct Kernels {
  const char* name;
  void (*quantize_row)(const Problem&, int64_t row, Quantized&);
  void (*integer_panels)(const Problem&, const Quantized&, int64_t first, int64_t last);
  void (*float_panels)(const Problem&, int64_t first, int64_t last);
};

const Kernels* PortableKernels();
const Kernels* Avx2Kernels();  // null where not compiled in or not supported by the machine
const Kernels* Avx512Kernels();
const Kernels* NeonKernels();

}  // namespace lowbit

#endif  // KERNELS_CPU_PROBLEM_H_
