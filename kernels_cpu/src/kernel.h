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
inline constexpr int64_t kAhead = 24;

// total[row][vector] += the sums of codes * activations over `count` words of a plane.
template <class V, int kWidth, int kM, bool kTable>
inline void DotPlane(const Plane& plane, const int32_t* w, int64_t count, const int32_t* x,
                     typename V::Table table, int max_code,
                     typename V::Int (&total)[kM][V::kVectors]) {
  constexpr int kSteps = 8 / kWidth;
  const int64_t period = std::max<int64_t>(1, V::template Period<kWidth>(max_code) / kSteps);
  for (int64_t begin = 0; begin < count; begin += period) {
    const int64_t end = std::min(count, begin + period);
    typename V::template Sum<kWidth> sum[kM][V::kVectors] = {};
    for (int64_t r = begin; r < end; ++r, w += plane.row_stride) {
      if constexpr (kM == 1) __builtin_prefetch(w + kAhead * plane.row_stride);
      typename V::Int words[V::kVectors];
      for (int v = 0; v < V::kVectors; ++v) words[v] = V::Load(w + v * V::kLanes);
      for (int step = 0; step < kSteps; ++step, x += kM) {
        typename V::Int codes[V::kVectors];
        for (int v = 0; v < V::kVectors; ++v) {
          codes[v] = V::template Codes<kWidth>(words[v], step);
          if constexpr (kTable) codes[v] = V::Lookup(codes[v], table);
        }
        for (int m = 0; m < kM; ++m) {
          const typename V::Int four = V::Broadcast(x[m]);
          for (int v = 0; v < V::kVectors; ++v) V::Dot(sum[m][v], codes[v], four);
        }
      }
    }
    for (int m = 0; m < kM; ++m)
      for (int v = 0; v < V::kVectors; ++v) V::Flush(total[m][v], sum[m][v], plane.shift);
  }
}

template <class V, int kM>
inline void IntegerTile(const Problem& p, const Quantized& q, int64_t panel, int64_t row) {
  typename V::Float y[kM][V::kVectors] = {};
  const typename V::Table table = V::MakeTable(p.int_table);
  const int64_t n0 = panel * kPanel;
  // Where bytes are signed, an 8-bit code c enters as c - 128.
  const int32_t offset = p.plane[0].width == 8 ? V::kByteOffset << p.int_shift : 0;
  for (size_t c = 0; c < p.chunks.size(); ++c) {
    const Chunk& chunk = p.chunks[c];
    typename V::Int total[kM][V::kVectors] = {};
    for (int i = 0; i < p.planes; ++i) {
      const Plane& plane = p.plane[i];
      const int64_t per_word = 32 / plane.width;
      const int64_t first = chunk.begin / per_word, count = (chunk.end - chunk.begin) / per_word;
      const int32_t* w = plane.words + panel * plane.panel_stride + first * plane.row_stride;
      const int32_t* x =
          q.words[Log2(plane.width)].data() + row * (p.k_padded / 4) + chunk.begin / 4 * kM;
      const int most = (1 << plane.width) - 1;
      switch (plane.width) {
        case 8: DotPlane<V, 8, kM, false>(plane, w, count, x, table, most, total); break;
        case 4:
          if (p.int_table) {
            DotPlane<V, 4, kM, true>(plane, w, count, x, table, p.int_max, total);
          } else {
            DotPlane<V, 4, kM, false>(plane, w, count, x, table, most, total);
          }
          break;
        case 2: DotPlane<V, 2, kM, false>(plane, w, count, x, table, most, total); break;
        default: DotPlane<V, 1, kM, false>(plane, w, count, x, table, most, total);
      }
    }
    for (int v = 0; v < V::kVectors; ++v) {
      const int64_t at = chunk.group * p.n_padded + n0 + v * V::kLanes;
      const typename V::Float scale = V::LoadFloat(p.scale + at);
      for (int m = 0; m < kM; ++m) {
        const int32_t sum = q.sums[(row + m) * p.chunks.size() + c];
        typename V::Int t = V::ShiftAdd(total[m][v], p.int_shift, (p.int_low + offset) * sum);
        if (p.zero_point) t = V::SubtractProduct(t, p.zero_point + at, sum);
        y[m][v] = V::Fma(V::ToFloat(t), scale, y[m][v]);
      }
    }
  }
  for (int m = 0; m < kM; ++m) {
    const typename V::Float unit = V::BroadcastFloat(q.scales[row + m] * p.int_unit);
    float out[kPanel];
    for (int v = 0; v < V::kVectors; ++v) V::Store(out + v * V::kLanes, V::Mul(y[m][v], unit));
    const int64_t inside = std::min<int64_t>(kPanel, p.n - n0);
    std::memcpy(p.y + (row + m) * p.n + n0, out, sizeof(float) * inside);
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
