// Plain C++, for machines without a vector unit that has its own file.
#include "kernel.h"

namespace lowbit {
namespace {

struct Portable {
  static constexpr int kLanes = 16, kVectors = 1;
  static constexpr bool kHardware = false;
  static constexpr int32_t kByteOffset = 0;
  struct Int { int32_t lane[kLanes]; };
  struct Float { float lane[kLanes]; };
  struct Table { const uint8_t* values; };
  template <int kWidth>
  using Sum = Int;

  template <class Result, class F>
  static Result Each(F f) {
    Result r;
    for (int i = 0; i < kLanes; ++i) r.lane[i] = f(i);
    return r;
  }
  static Int Zero() { return {}; }
  static Int Load(const int32_t* p) { return Each<Int>([&](int i) { return p[i]; }); }
  static Int LoadBytes(const uint8_t* p) { return Each<Int>([&](int i) { return p[i]; }); }
  static Int Broadcast(int32_t x) { return Each<Int>([&](int) { return x; }); }
  static Float LoadFloat(const float* p) { return Each<Float>([&](int i) { return p[i]; }); }
  static Float BroadcastFloat(float x) { return Each<Float>([&](int) { return x; }); }
  static void Store(float* p, Float x) { std::copy(x.lane, x.lane + kLanes, p); }
  static void StoreInt(int32_t* p, Int x) { std::copy(x.lane, x.lane + kLanes, p); }
  static Float ToFloat(Int x) {
    return Each<Float>([&](int i) { return static_cast<float>(x.lane[i]); });
  }
  static Float Fma(Float a, Float b, Float c) {
    return Each<Float>([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
  }
  static Float Mul(Float a, Float b) {
    return Each<Float>([&](int i) { return a.lane[i] * b.lane[i]; });
  }
  static Float Sub(Float a, Float b) {
    return Each<Float>([&](int i) { return a.lane[i] - b.lane[i]; });
  }
  template <int kWidth>
  static constexpr int64_t Period(int) {
    return int64_t{1} << 40;
  }
  template <int kWidth>
  static Int Codes(Int words, int step) {
    const uint32_t mask = 0x01010101u * ((1u << kWidth) - 1);
    return Each<Int>([&](int i) {
      return static_cast<int32_t>((static_cast<uint32_t>(words.lane[i]) >> (step * kWidth)) & mask);
    });
  }
  static Table MakeTable(const uint8_t* values) { return {values}; }
  static Int Lookup(Int codes, Table table) {
    return Each<Int>([&](int i) {
      uint32_t looked_up = 0;
      for (int j = 0; j < 4; ++j) {
        const uint32_t code = (static_cast<uint32_t>(codes.lane[i]) >> (8 * j)) & 15;
        looked_up |= static_cast<uint32_t>(table.values[code]) << (8 * j);
      }
      return static_cast<int32_t>(looked_up);
    });
  }
  static void Dot(Int& sum, Int codes, Int four) {
    for (int i = 0; i < kLanes; ++i) {
      for (int j = 0; j < 4; ++j) {
        const int32_t code = (static_cast<uint32_t>(codes.lane[i]) >> (8 * j)) & 255;
        const int8_t x = static_cast<int8_t>(static_cast<uint32_t>(four.lane[i]) >> (8 * j));
        sum.lane[i] += code * x;
      }
    }
  }
  static void Flush(Int& total, Int sum, int shift) {
    for (int i = 0; i < kLanes; ++i) total.lane[i] += sum.lane[i] * (1 << shift);
  }
  static Int ShiftAdd(Int x, int shift, int32_t add) {
    return Each<Int>([&](int i) { return x.lane[i] * (1 << shift) + add; });
  }
  static Int SubtractProduct(Int x, const uint8_t* bytes, int32_t factor) {
    return Each<Int>([&](int i) { return x.lane[i] - bytes[i] * factor; });
  }
  static Int Field(Int words, int from, int width) {
    return Each<Int>([&](int i) {
      const uint32_t word = static_cast<uint32_t>(words.lane[i]);
      return static_cast<int32_t>((word >> from) & ((1u << width) - 1));
    });
  }
  static Int ShiftLeft(Int x, int shift) {
    return Each<Int>([&](int i) { return x.lane[i] * (1 << shift); });
  }
  static Int Or(Int a, Int b) {
    return Each<Int>([&](int i) { return a.lane[i] | b.lane[i]; });
  }
  static Float Gather(const float* table, Int code, int) {
    return Each<Float>([&](int i) { return table[code.lane[i]]; });
  }
  static float LargestMagnitude(const float* x, int64_t k) {
    float largest = 0;
    for (int64_t i = 0; i < k; ++i) {
      if (std::isnan(x[i])) return x[i];
      largest = std::max(largest, std::fabs(x[i]));
    }
    return largest;
  }
  static void Round(const float* x, float reciprocal, int64_t k, int8_t* out) {
    for (int64_t i = 0; i < k; ++i) {
      const long rounded = std::lrintf(x[i] * reciprocal);
      out[i] = static_cast<int8_t>(std::clamp(rounded, -127L, 127L));
    }
  }
};

}  // namespace

const Kernels* PortableKernels() {
  static constexpr Kernels kKernels = MakeKernels<Portable>("portable");
  return &kKernels;
}

}  // namespace lowbit
