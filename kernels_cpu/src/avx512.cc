// AVX-512 with VNNI: four products of unsigned codes and signed activations a lane at once.
#include "kernel.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && \
    defined(__AVX512VNNI__)
#include <immintrin.h>

namespace lowbit {
namespace {

struct Avx512 {
  static constexpr int kLanes = 16, kVectors = 1;
  static constexpr bool kHardware = true;
  static constexpr int32_t kByteOffset = 0;
  using Int = __m512i;
  using Float = __m512;
  using Table = __m512i;
  struct Long { __m512i value; };
  template <int kWidth>
  using Sum = Long;

  static Int Zero() { return _mm512_setzero_si512(); }
  static Int Load(const int32_t* p) { return _mm512_loadu_si512(p); }
  static Int LoadBytes(const uint8_t* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static Int Broadcast(int32_t x) { return _mm512_set1_epi32(x); }
  static Float LoadFloat(const float* p) { return _mm512_loadu_ps(p); }
  static Float BroadcastFloat(float x) { return _mm512_set1_ps(x); }
  static void Store(float* p, Float x) { _mm512_storeu_ps(p, x); }
  static void StoreInt(int32_t* p, Int x) { _mm512_storeu_si512(p, x); }
  static Float ToFloat(Int x) { return _mm512_cvtepi32_ps(x); }
  static Float Fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
  static Float Mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
  static Float Sub(Float a, Float b) { return _mm512_sub_ps(a, b); }

  template <int kWidth>
  static constexpr int64_t Period(int) {
    return int64_t{1} << 40;  // sums have 32 bits from the start
  }
  template <int kWidth>
  static Int Codes(Int words, int step) {
    if constexpr (kWidth == 8) return words;
    const Int mask = _mm512_set1_epi8((1 << kWidth) - 1);
    return _mm512_and_si512(_mm512_srli_epi16(words, step * kWidth), mask);
  }
  static Table MakeTable(const uint8_t* values) {
    if (values == nullptr) return Zero();
    return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)));
  }
  static Int Lookup(Int codes, Table table) { return _mm512_shuffle_epi8(table, codes); }
  static void Dot(Long& sum, Int codes, Int four) {
    sum.value = _mm512_dpbusd_epi32(sum.value, codes, four);
  }
  static void Flush(Int& total, Long sum, int shift) {
    total = _mm512_add_epi32(total, ShiftLeft(sum.value, shift));
  }
  static Int ShiftAdd(Int x, int shift, int32_t add) {
    return _mm512_add_epi32(ShiftLeft(x, shift), _mm512_set1_epi32(add));
  }
  static Int SubtractProduct(Int x, const uint8_t* bytes, int32_t factor) {
    return _mm512_sub_epi32(x, _mm512_mullo_epi32(LoadBytes(bytes), _mm512_set1_epi32(factor)));
  }
  static Int Field(Int words, int from, int width) {
    return _mm512_and_si512(_mm512_srl_epi32(words, _mm_cvtsi32_si128(from)),
                            _mm512_set1_epi32((1 << width) - 1));
  }
  static Int ShiftLeft(Int x, int shift) { return _mm512_sll_epi32(x, _mm_cvtsi32_si128(shift)); }
  static Int Or(Int a, Int b) { return _mm512_or_si512(a, b); }
  static Float Gather(const float* table, Int code, int bits) {
    if (bits > 4) return _mm512_i32gather_ps(code, table, 4);
    const __mmask16 there = static_cast<__mmask16>((1u << (1u << bits)) - 1);
    return _mm512_permutexvar_ps(code, _mm512_maskz_loadu_ps(there, table));
  }
  static float LargestMagnitude(const float* x, int64_t k) {
    Float most = _mm512_setzero_ps();
    __mmask16 nan = 0;
    for (int64_t i = 0; i < k; i += 16) {
      const __mmask16 inside = k - i >= 16 ? 0xffff : (1u << (k - i)) - 1;
      const Float magnitude = _mm512_abs_ps(_mm512_maskz_loadu_ps(inside, x + i));
      most = _mm512_max_ps(most, magnitude);
      nan |= _mm512_cmp_ps_mask(magnitude, magnitude, _CMP_UNORD_Q);
    }
    return nan ? std::numeric_limits<float>::quiet_NaN() : _mm512_reduce_max_ps(most);
  }
  static void Round(const float* x, float reciprocal, int64_t k, int8_t* out) {
    const Float factor = BroadcastFloat(reciprocal);
    const Int low = _mm512_set1_epi32(-127), high = _mm512_set1_epi32(127);
    for (int64_t i = 0; i < k; i += 16) {
      const __mmask16 inside = k - i >= 16 ? 0xffff : (1u << (k - i)) - 1;
      const Int rounded = _mm512_cvtps_epi32(Mul(_mm512_maskz_loadu_ps(inside, x + i), factor));
      const Int clipped = _mm512_min_epi32(_mm512_max_epi32(rounded, low), high);
      _mm512_mask_cvtepi32_storeu_epi8(out + i, inside, clipped);
    }
  }
};

}  // namespace

const Kernels* Avx512Kernels() {
  static constexpr Kernels kKernels = MakeKernels<Avx512>("avx512");
  for (const bool has : {__builtin_cpu_supports("avx512f") != 0, __builtin_cpu_supports("avx512bw") != 0,
                         __builtin_cpu_supports("avx512vl") != 0,
                         __builtin_cpu_supports("avx512vnni") != 0})
    if (!has) return nullptr;
  return &kKernels;
}

}  // namespace lowbit
#else
namespace lowbit {
const Kernels* Avx512Kernels() { return nullptr; }
}  // namespace lowbit
#endif
