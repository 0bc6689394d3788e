// The kernels, written once over a vector type V; every instruction set includes this file.
//
// Outputs lie along the lanes: a vector of words holds the codes of `V::kLanes` outputs, so that no
// sum runs across lanes, scales are loaded as vectors, and the words of a checkpoint are read as
// they are. A word's codes are taken out byte-wise: step i gives those of k = i + j * 8 / width in
// bytes j = 0..3, and activations are laid out in the same order once per call.
#ifndef KERNELS_CPU_KERNEL_H_
#define KERNELS_CPU_KERNEL_H_

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "problem.h"

namespace lowbit {
namespace {  // every instruction set has its own copy, compiled with its own flags

// Lays the rounded row out in the order in which codes of `width` bits leave their words.
inline void Arrange(const int8_t* row, int64_t k_padded, int width, int64_t rows, int32_t* words) {
  const int steps = 8 / width;
  for (int64_t k = 0; k < k_padded; k += 4 * steps) {
    for (int step = 0; step < steps; ++step, words += rows) {
      const int8_t four[4] = {row[k + step], row[k + step + steps], row[k + step + 2 * steps],
                              row[k + step + 3 * steps]};
      std::memcpy(words, four, 4);
    }
  }
}

template <class V>
void QuantizeRow(const Problem& p, int64_t row, Quantized& q) {
  const float* x = p.x + row * p.k;
  int8_t* out = q.rows.data() + row * p.k_padded;
  const float largest = V::LargestMagnitude(x, p.k);
  if (std::isfinite(largest)) {
    // The library's arithmetic: absmax * (1 / 127), then a product with the float32 reciprocal.
    const float scale = std::max(largest * static_cast<float>(1.0 / 127.0), p.smallest_scale);
    q.scales[row] = scale;
    V::Round(x, 1.0f / scale, p.k, out);
    std::memset(out + p.k, 0, p.k_padded - p.k);
  } else {  // spreads over the row, as NaN and infinity * 0 do
    q.scales[row] = std::numeric_limits<float>::quiet_NaN();
    std::memset(out, 0, p.k_padded);
  }
  int32_t* sums = q.sums.data() + row * p.chunks.size();
  for (const Chunk& chunk : p.chunks) {
    int32_t sum = 0;
    for (int64_t k = chunk.begin; k < chunk.end; ++k) sum += out[k];
    *sums++ = sum;
  }
  const int64_t tile = row / kRows * kRows;
  const int64_t rows = std::min<int64_t>(kRows, p.m - tile);
  for (int i = 0; i < p.planes; ++i) {
    const int width = p.plane[i].width;
    int32_t* words = q.words[Log2(width)].data() + tile * (p.k_padded / 4) + (row - tile);
    Arrange(out, p.k_padded, width, rows, words);
  }
}

// Rows of words that are asked for ahead of their use: one row of x waits for memory alone, and the
// hardware's own prefetching starts anew at every page.
inline constexpr int64_t kAhead = 56;

// f(0) .. f(kCount - 1), each with its number as a constant: accumulators that a loop would index
// stay in memory where the compiler unrolls that loop too late, and then cost twice the products.
// Where a vector is itself a loop over lanes, code of that size would take minutes to compile.
#ifdef LOWBIT_ROLLED  // for emulated vectors
inline constexpr bool kRolled = true;
#else
inline constexpr bool kRolled = false;
#endif
template <class F, int... kNumbers>
inline __attribute__((always_inline)) void EachOf(F f, std::integer_sequence<int, kNumbers...>) {
  (f(std::integral_constant<int, kNumbers>{}), ...);
}
template <class V, int kCount, class F>
inline __attribute__((always_inline)) void Each(F f) {
  if constexpr (V::kHardware && !kRolled) {
    EachOf(f, std::make_integer_sequence<int, kCount>{});
  } else {
    for (int i = 0; i < kCount; ++i) f(i);
  }
}

// One row of words: sum[row][vector] += codes * activations.
template <class V, int kWidth, int kM, bool kTable, class Sum>
inline __attribute__((always_inline)) void DotRow(const int32_t* w, const int32_t* x,
                                                  typename V::Table table,
                                                  Sum (&sum)[kM][V::kVectors]) {
  typename V::Int words[V::kVectors];
  Each<V, V::kVectors>([&](auto v) { words[v] = V::Load(w + v * V::kLanes); });
  Each<V, 8 / kWidth>([&](auto step) __attribute__((always_inline)) {
    typename V::Int codes[V::kVectors];
    Each<V, V::kVectors>([&](auto v) __attribute__((always_inline)) {
      codes[v] = V::template Codes<kWidth>(words[v], step);
      if constexpr (kTable) codes[v] = V::Lookup(codes[v], table);
    });
    Each<V, kM>([&](auto m) __attribute__((always_inline)) {
      const typename V::Int four = V::Broadcast(x[step * kM + m]);
      Each<V, V::kVectors>([&](auto v) __attribute__((always_inline)) {
        V::Dot(sum[m][v], codes[v], four);
      });
    });
  });
}

// How many words of codes up to `max_code` a sum holds.
template <class V, int kWidth>
constexpr int64_t WordsPerSum(int max_code) {
  return std::max<int64_t>(1, V::template Period<kWidth>(max_code) / (8 / kWidth));
}

// total[row][vector] += kCount rows of words, which fit into one sum.
template <class V, int kWidth, int kM, bool kTable, int kCount>
inline __attribute__((always_inline)) void DotRows(const int32_t* w, int64_t stride,
                                                   const int32_t* x, typename V::Table table,
                                                   int shift,
                                                   typename V::Int (&total)[kM][V::kVectors]) {
  typename V::template Sum<kWidth> sum[kM][V::kVectors] = {};
  Each<V, kCount>([&](auto u) __attribute__((always_inline)) {
    if constexpr (kM == 1) __builtin_prefetch(w + (kAhead + u) * stride);
    DotRow<V, kWidth, kM, kTable>(w + u * stride, x + u * (8 / kWidth) * kM, table, sum);
  });
  Each<V, kM>([&](auto m) __attribute__((always_inline)) {
    Each<V, V::kVectors>([&](auto v) __attribute__((always_inline)) {
      V::Flush(total[m][v], sum[m][v], shift);
    });
  });
}

// The integer sums of one tile, chunk by chunk, and what becomes of them.
template <class V, int kM>
struct Tile {
  using Sums = typename V::Int[kM][V::kVectors];

  Tile(const Problem& p, const Quantized& q, int64_t panel, int64_t row)
      : p(p), q(q), n0(panel * kPanel), row(row), sums(q.sums.data() + row * p.chunks.size()),
        // Where bytes are signed, an 8-bit code c enters as c - 128.
        low(p.int_low + (p.plane[0].width == 8 ? V::kByteOffset << p.int_shift : 0)) {}

  // y += scale * total, which is that of chunk c.
  inline __attribute__((always_inline)) void Add(size_t c, const Sums& total) {
    const int64_t at = p.chunks[c].group * p.n_padded + n0;
    typename V::Float scale[V::kVectors];
    Each<V, V::kVectors>([&](auto v) { scale[v] = V::LoadFloat(p.scale + at + v * V::kLanes); });
    Each<V, kM>([&](auto m) __attribute__((always_inline)) {
      const int32_t sum = sums[m * p.chunks.size() + c];
      Each<V, V::kVectors>([&](auto v) __attribute__((always_inline)) {
        typename V::Int t = V::ShiftAdd(total[m][v], p.int_shift, low * sum);
        if (p.zero_point) t = V::SubtractProduct(t, p.zero_point + at + v * V::kLanes, sum);
        y[m][v] = V::Fma(V::ToFloat(t), scale[v], y[m][v]);
      });
    });
  }

  void Finish() const {
    for (int m = 0; m < kM; ++m) {
      const typename V::Float unit = V::BroadcastFloat(q.scales[row + m] * p.int_unit);
      float out[kPanel];
      for (int v = 0; v < V::kVectors; ++v) V::Store(out + v * V::kLanes, V::Mul(y[m][v], unit));
      const int64_t inside = std::min<int64_t>(kPanel, p.n - n0);
      std::memcpy(p.y + (row + m) * p.n + n0, out, sizeof(float) * inside);
    }
  }

  const Problem& p;
  const Quantized& q;
  const int64_t n0, row;
  const int32_t* const sums;
  const int32_t low;
  typename V::Float y[kM][V::kVectors] = {};
};

// Where a tile's words and activations of one plane lie.
struct Operands {
  Operands(const Problem& p, const Quantized& q, const Plane& plane, int64_t panel, int64_t row)
      : words(plane.words + panel * plane.panel_stride),
        x(q.words[Log2(plane.width)].data() + row * (p.k_padded / 4)) {}
  const int32_t* words;
  const int32_t* x;
};

// total[row][vector] += `count` rows of words, of which kPeriod at a time fit into one sum.
template <class V, int kWidth, int kM, bool kTable, int64_t kPeriod>
inline __attribute__((always_inline)) void DotPlane(const int32_t* w, int64_t stride, int64_t count,
                                                    const int32_t* x, typename V::Table table,
                                                    int shift,
                                                    typename V::Int (&total)[kM][V::kVectors]) {
  constexpr int kCount = static_cast<int>(std::min<int64_t>(kPeriod, 4));
  constexpr int64_t kStep = 8 / kWidth * kM;
  for (; count >= kCount; count -= kCount, w += kCount * stride, x += kCount * kStep)
    DotRows<V, kWidth, kM, kTable, kCount>(w, stride, x, table, shift, total);
  for (; count > 0; --count, w += stride, x += kStep)
    DotRows<V, kWidth, kM, kTable, 1>(w, stride, x, table, shift, total);
}

// A tile whose codes lie in one plane: a loop of its own, since with one row of x and groups of 128
// what is done once per chunk would else take half as long as the products.
template <class V, int kWidth, int kM, bool kTable, int64_t kPeriod>
__attribute__((noinline)) void OnePlane(const Problem& p, const Quantized& q, int64_t panel,
                                        int64_t row) {
  constexpr int kPerWord = 32 / kWidth;
  const Plane& plane = p.plane[0];
  const Operands operands(p, q, plane, panel, row);
  const typename V::Table table = V::MakeTable(p.int_table);
  Tile<V, kM> tile(p, q, panel, row);
  for (size_t c = 0; c < p.chunks.size(); ++c) {
    const Chunk& chunk = p.chunks[c];
    typename V::Int total[kM][V::kVectors] = {};
    DotPlane<V, kWidth, kM, kTable, kPeriod>(
        operands.words + chunk.begin / kPerWord * plane.row_stride, plane.row_stride,
        (chunk.end - chunk.begin) / kPerWord, operands.x + chunk.begin / 4 * kM, table, plane.shift,
        total);
    tile.Add(c, total);
  }
  tile.Finish();
}

// One plane's part of a chunk, where there are several.
template <class V, int kWidth, int kM>
__attribute__((noinline)) void Part(const Problem& p, const Quantized& q, const Plane& plane,
                                    int64_t panel, int64_t row, const Chunk& chunk,
                                    typename V::Int (&total)[kM][V::kVectors]) {
  constexpr int kPerWord = 32 / kWidth;
  const Operands operands(p, q, plane, panel, row);
  DotPlane<V, kWidth, kM, false, WordsPerSum<V, kWidth>((1 << kWidth) - 1)>(
      operands.words + chunk.begin / kPerWord * plane.row_stride, plane.row_stride,
      (chunk.end - chunk.begin) / kPerWord, operands.x + chunk.begin / 4 * kM,
      V::MakeTable(nullptr), plane.shift, total);
}

template <class V, int kM>
void SeveralPlanes(const Problem& p, const Quantized& q, int64_t panel, int64_t row) {
  Tile<V, kM> tile(p, q, panel, row);
  for (size_t c = 0; c < p.chunks.size(); ++c) {
    typename V::Int total[kM][V::kVectors] = {};
    for (int i = 0; i < p.planes; ++i) {
      const Plane& plane = p.plane[i];
      switch (plane.width) {
        case 8: Part<V, 8, kM>(p, q, plane, panel, row, p.chunks[c], total); break;
        case 4: Part<V, 4, kM>(p, q, plane, panel, row, p.chunks[c], total); break;
        case 2: Part<V, 2, kM>(p, q, plane, panel, row, p.chunks[c], total); break;
        default: Part<V, 1, kM>(p, q, plane, panel, row, p.chunks[c], total);
      }
    }
    tile.Add(c, total);
  }
  tile.Finish();
}

template <class V, int kWidth, int kM>
inline void Plain(const Problem& p, const Quantized& q, int64_t panel, int64_t row) {
  OnePlane<V, kWidth, kM, false, WordsPerSum<V, kWidth>((1 << kWidth) - 1)>(p, q, panel, row);
}

template <class V, int kM>
inline void IntegerTile(const Problem& p, const Quantized& q, int64_t panel, int64_t row) {
  if (p.planes > 1) return SeveralPlanes<V, kM>(p, q, panel, row);
  switch (p.plane[0].width) {
    case 8: return Plain<V, 8, kM>(p, q, panel, row);
    case 4:
      if (!p.int_table) return Plain<V, 4, kM>(p, q, panel, row);
      if (WordsPerSum<V, 4>(p.int_max) < 2) return OnePlane<V, 4, kM, true, 1>(p, q, panel, row);
      return OnePlane<V, 4, kM, true, 2>(p, q, panel, row);
    case 2: return Plain<V, 2, kM>(p, q, panel, row);
    default: return Plain<V, 1, kM>(p, q, panel, row);
  }
}

template <class V>
void IntegerPanels(const Problem& p, const Quantized& q, int64_t first, int64_t last) {
  for (int64_t panel = first; panel < last; ++panel) {
    for (int64_t row = 0; row < p.m; row += kRows) {
      switch (std::min<int64_t>(kRows, p.m - row)) {
        case 1: IntegerTile<V, 1>(p, q, panel, row); break;
        case 2: IntegerTile<V, 2>(p, q, panel, row); break;
        case 3: IntegerTile<V, 3>(p, q, panel, row); break;
        default: IntegerTile<V, 4>(p, q, panel, row);
      }
    }
  }
}

// What turns the codes of one group in one panel into values.
template <class V>
struct Decoder {
  Decoder(const Problem& p, int64_t panel, int64_t group)
      : table(p.table), bits(p.bits), step(V::BroadcastFloat(p.step)) {
    for (int v = 0; v < V::kVectors; ++v) {
      const int64_t at = group * p.n_padded + panel * kPanel + v * V::kLanes;
      scale[v] = V::LoadFloat(p.scale + at);
      low[v] = V::BroadcastFloat(p.low);
      if (p.zero_point) low[v] = V::Sub(low[v], V::ToFloat(V::LoadBytes(p.zero_point + at)));
    }
  }

  // In units of the scale; exact.
  template <bool kTable>
  typename V::Float Level(typename V::Int code, int v) const {
    if constexpr (kTable) return V::Gather(table, code, bits);
    return V::Fma(V::ToFloat(code), step, low[v]);
  }

  const float* table;
  int bits;
  typename V::Float step, scale[V::kVectors], low[V::kVectors];
};

inline constexpr int64_t kUnpacked = 256;  // rows of W that lie unpacked at a time: 16 KiB

// f(k, v, code) for rows [begin, end) of one plane; both are multiples of the codes in a word, but
// for an end inside the last word.
template <class V, int kWidth, class F>
inline void EachCode(const Plane& plane, int64_t panel, int64_t begin, int64_t end, F f) {
  constexpr int64_t kPerWord = 32 / kWidth;
  const int32_t* w =
      plane.words + panel * plane.panel_stride + begin / kPerWord * plane.row_stride;
  for (int64_t k = begin; k < end; k += kPerWord, w += plane.row_stride) {
    typename V::Int words[V::kVectors];
    for (int v = 0; v < V::kVectors; ++v) words[v] = V::Load(w + v * V::kLanes);
    const int count = static_cast<int>(std::min(kPerWord, end - k));
    for (int i = 0; i < count; ++i)
      for (int v = 0; v < V::kVectors; ++v)
        f(k + i, v, V::Field(words[v], i * kWidth, kWidth));
  }
}

template <class V, class F>
inline void EachCodeOf(const Plane& plane, int64_t panel, int64_t begin, int64_t end, F f) {
  switch (plane.width) {
    case 8: EachCode<V, 8>(plane, panel, begin, end, f); break;
    case 4: EachCode<V, 4>(plane, panel, begin, end, f); break;
    case 2: EachCode<V, 2>(plane, panel, begin, end, f); break;
    default: EachCode<V, 1>(plane, panel, begin, end, f);
  }
}

// Dequantizes rows [begin, end) of a panel into out[row][kPanel].
template <class V, bool kTable>
void Unpack(const Problem& p, int64_t panel, int64_t begin, int64_t end, int64_t group,
            float* out) {
  const Decoder<V> decoder(p, panel, group);
  const auto finish = [&](int64_t k, int v, typename V::Int code) {
    const typename V::Float value = V::Mul(decoder.template Level<kTable>(code, v), decoder.scale[v]);
    V::Store(out + (k - begin) * kPanel + v * V::kLanes, value);
  };
  if (p.planes == 1) {
    EachCodeOf<V>(p.plane[0], panel, begin, end, finish);
    return;
  }
  int32_t codes[kUnpacked * kPanel] = {};
  for (int i = 0; i < p.planes; ++i) {
    const int shift = p.plane[i].shift;
    EachCodeOf<V>(p.plane[i], panel, begin, end, [&](int64_t k, int v, typename V::Int code) {
      int32_t* at = codes + (k - begin) * kPanel + v * V::kLanes;
      V::StoreInt(at, V::Or(V::Load(at), V::ShiftLeft(code, shift)));
    });
  }
  for (int64_t k = begin; k < end; ++k)
    for (int v = 0; v < V::kVectors; ++v)
      finish(k, v, V::Load(codes + (k - begin) * kPanel + v * V::kLanes));
}

template <class V, int kM>
inline void FloatTile(const float* w, int64_t count, const float* x, int64_t x_stride, float* y) {
  typename V::Float sum[kM][V::kVectors];
  for (int m = 0; m < kM; ++m)
    for (int v = 0; v < V::kVectors; ++v) sum[m][v] = V::LoadFloat(y + m * kPanel + v * V::kLanes);
  for (int64_t k = 0; k < count; ++k, w += kPanel) {
    typename V::Float row[V::kVectors];
    for (int v = 0; v < V::kVectors; ++v) row[v] = V::LoadFloat(w + v * V::kLanes);
    for (int m = 0; m < kM; ++m) {
      const typename V::Float one = V::BroadcastFloat(x[m * x_stride + k]);
      for (int v = 0; v < V::kVectors; ++v) sum[m][v] = V::Fma(one, row[v], sum[m][v]);
    }
  }
  for (int m = 0; m < kM; ++m)
    for (int v = 0; v < V::kVectors; ++v) V::Store(y + m * kPanel + v * V::kLanes, sum[m][v]);
}

// One tile of rows over all of K without unpacking to memory: for one plane and few rows.
template <class V, int kM, bool kTable>
void FusedTile(const Problem& p, int64_t panel, float* y) {
  typename V::Float total[kM][V::kVectors] = {};
  for (const Chunk& chunk : p.chunks) {
    const Decoder<V> decoder(p, panel, chunk.group);
    typename V::Float sum[kM][V::kVectors] = {};
    const auto add = [&](int64_t k, int v, typename V::Int code) {
      const typename V::Float level = decoder.template Level<kTable>(code, v);
      for (int m = 0; m < kM; ++m)
        sum[m][v] = V::Fma(V::BroadcastFloat(p.x[m * p.k + k]), level, sum[m][v]);
    };
    EachCodeOf<V>(p.plane[0], panel, chunk.begin, std::min(chunk.end, p.k), add);
    for (int m = 0; m < kM; ++m)
      for (int v = 0; v < V::kVectors; ++v)
        total[m][v] = V::Fma(sum[m][v], decoder.scale[v], total[m][v]);
  }
  for (int m = 0; m < kM; ++m)
    for (int v = 0; v < V::kVectors; ++v) V::Store(y + m * kPanel + v * V::kLanes, total[m][v]);
}

template <class V, bool kTable>
void UnpackedPanel(const Problem& p, int64_t panel, float* w, float* y) {
  std::fill(y, y + p.m * kPanel, 0.0f);
  for (const Chunk& chunk : p.chunks) {
    const int64_t inside = std::min(chunk.end, p.k);  // x has nothing to say about the padding
    for (int64_t begin = chunk.begin; begin < inside; begin += kUnpacked) {
      const int64_t end = std::min(inside, begin + kUnpacked);
      Unpack<V, kTable>(p, panel, begin, end, chunk.group, w);
      for (int64_t row = 0; row < p.m; row += kRows) {
        const float* x = p.x + row * p.k + begin;
        float* out = y + row * kPanel;
        switch (std::min<int64_t>(kRows, p.m - row)) {
          case 1: FloatTile<V, 1>(w, end - begin, x, p.k, out); break;
          case 2: FloatTile<V, 2>(w, end - begin, x, p.k, out); break;
          case 3: FloatTile<V, 3>(w, end - begin, x, p.k, out); break;
          default: FloatTile<V, 4>(w, end - begin, x, p.k, out);
        }
      }
    }
  }
}

template <class V, bool kTable>
void FloatPanelsOf(const Problem& p, int64_t first, int64_t last) {
  std::vector<float> w(kUnpacked * kPanel), y(p.m * kPanel);
  for (int64_t panel = first; panel < last; ++panel) {
    const bool fused = p.planes == 1 && p.m <= 2;
    if (fused && p.m == 1) {
      FusedTile<V, 1, kTable>(p, panel, y.data());
    } else if (fused) {
      FusedTile<V, 2, kTable>(p, panel, y.data());
    } else {
      UnpackedPanel<V, kTable>(p, panel, w.data(), y.data());
    }
    const int64_t n0 = panel * kPanel, inside = std::min<int64_t>(kPanel, p.n - n0);
    for (int64_t row = 0; row < p.m; ++row)
      std::memcpy(p.y + row * p.n + n0, y.data() + row * kPanel, sizeof(float) * inside);
  }
}

template <class V>
void FloatPanels(const Problem& p, int64_t first, int64_t last) {
  if (p.table) {
    FloatPanelsOf<V, true>(p, first, last);
  } else {
    FloatPanelsOf<V, false>(p, first, last);
  }
}

template <class V>
constexpr Kernels MakeKernels(const char* name) {
  return {name, QuantizeRow<V>, IntegerPanels<V>, FloatPanels<V>};
}

}  // namespace
}  // namespace lowbit

#endif  // KERNELS_CPU_KERNEL_H_
