// NEON with the dot product instructions, which take signed bytes alone: an 8-bit code c enters as
// c - 128, which the offset of the codes takes back.
#include "kernel.h"

#if defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#if defined(__linux__)
#include <sys/auxv.h>
#endif

namespace lowbit {
namespace {

struct Neon {
  static constexpr int kLanes = 4, kVectors = 4;
  static constexpr bool kHardware = true;
  static constexpr int32_t kByteOffset = 128;
  using Int = int32x4_t;
  using Float = float32x4_t;
  using Table = uint8x16_t;
  template <int kWidth>
  using Sum = Int;

  static Int Zero() { return vdupq_n_s32(0); }
  static Int Load(const int32_t* p) { return vld1q_s32(p); }
  static Int LoadBytes(const uint8_t* p) {
    const int32_t lanes[4] = {p[0], p[1], p[2], p[3]};
    return vld1q_s32(lanes);
  }
  static Int Broadcast(int32_t x) { return vdupq_n_s32(x); }
  static Float LoadFloat(const float* p) { return vld1q_f32(p); }
  static Float BroadcastFloat(float x) { return vdupq_n_f32(x); }
  static void Store(float* p, Float x) { vst1q_f32(p, x); }
  static void StoreInt(int32_t* p, Int x) { vst1q_s32(p, x); }
  static Float ToFloat(Int x) { return vcvtq_f32_s32(x); }
  static Float Fma(Float a, Float b, Float c) { return vfmaq_f32(c, a, b); }
  static Float Mul(Float a, Float b) { return vmulq_f32(a, b); }
  static Float Sub(Float a, Float b) { return vsubq_f32(a, b); }

  template <int kWidth>
  static constexpr int64_t Period(int) {
    return int64_t{1} << 40;
  }
  template <int kWidth>
  static Int Codes(Int words, int step) {
    const uint8x16_t bytes = vreinterpretq_u8_s32(words);
    if constexpr (kWidth == 8) return vreinterpretq_s32_u8(veorq_u8(bytes, vdupq_n_u8(128)));
    const uint8x16_t moved = vshlq_u8(bytes, vdupq_n_s8(static_cast<int8_t>(-step * kWidth)));
    return vreinterpretq_s32_u8(vandq_u8(moved, vdupq_n_u8((1 << kWidth) - 1)));
  }
  static Table MakeTable(const uint8_t* values) {
    return values == nullptr ? vdupq_n_u8(0) : vld1q_u8(values);
  }
  static Int Lookup(Int codes, Table table) {
    return vreinterpretq_s32_u8(vqtbl1q_u8(table, vreinterpretq_u8_s32(codes)));
  }
  static void Dot(Int& sum, Int codes, Int four) {
    sum = vdotq_s32(sum, vreinterpretq_s8_s32(codes), vreinterpretq_s8_s32(four));
  }
  static void Flush(Int& total, Int sum, int shift) {
    total = vaddq_s32(total, ShiftLeft(sum, shift));
  }
  static Int ShiftAdd(Int x, int shift, int32_t add) {
    return vaddq_s32(ShiftLeft(x, shift), vdupq_n_s32(add));
  }
  static Int SubtractProduct(Int x, const uint8_t* bytes, int32_t factor) {
    return vmlsq_s32(x, LoadBytes(bytes), vdupq_n_s32(factor));
  }
  static Int Field(Int words, int from, int width) {
    const uint32x4_t moved = vshlq_u32(vreinterpretq_u32_s32(words), vdupq_n_s32(-from));
    return vreinterpretq_s32_u32(vandq_u32(moved, vdupq_n_u32((1u << width) - 1)));
  }
  static Int ShiftLeft(Int x, int shift) { return vshlq_s32(x, vdupq_n_s32(shift)); }
  static Int Or(Int a, Int b) { return vorrq_s32(a, b); }
  static Float Gather(const float* table, Int code, int) {
    const float lanes[4] = {table[vgetq_lane_s32(code, 0)], table[vgetq_lane_s32(code, 1)],
                            table[vgetq_lane_s32(code, 2)], table[vgetq_lane_s32(code, 3)]};
    return vld1q_f32(lanes);
  }
  static float LargestMagnitude(const float* x, int64_t k) {
    float largest = 0;  // compilers make vectors of this where they may
    bool nan = false;
    for (int64_t i = 0; i < k; ++i) {
      nan |= std::isnan(x[i]);
      largest = std::max(largest, std::fabs(x[i]));
    }
    return nan ? std::numeric_limits<float>::quiet_NaN() : largest;
  }
  static void Round(const float* x, float reciprocal, int64_t k, int8_t* out) {
    int64_t i = 0;
    for (; i + 4 <= k; i += 4) {
      const Int rounded = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x + i), reciprocal));
      const Int clipped = vminq_s32(vmaxq_s32(rounded, vdupq_n_s32(-127)), vdupq_n_s32(127));
      int32_t lanes[4];
      vst1q_s32(lanes, clipped);
      for (int j = 0; j < 4; ++j) out[i + j] = static_cast<int8_t>(lanes[j]);
    }
    for (; i < k; ++i) {
      const long rounded = std::lrintf(x[i] * reciprocal);
      out[i] = static_cast<int8_t>(std::clamp(rounded, -127L, 127L));
    }
  }
};

}  // namespace

const Kernels* NeonKernels() {
  static constexpr Kernels kKernels = MakeKernels<Neon>("neon");
#if defined(__linux__)
  constexpr unsigned long kDotProduct = 1ul << 20;  // HWCAP_ASIMDDP
  if (!(getauxval(AT_HWCAP) & kDotProduct)) return nullptr;
#endif
  return &kKernels;
}

}  // namespace lowbit
#else
namespace lowbit {
const Kernels* NeonKernels() { return nullptr; }
}  // namespace lowbit
#endif
