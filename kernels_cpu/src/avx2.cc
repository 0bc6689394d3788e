// AVX2 and FMA: products of unsigned codes and signed activations in pairs of 16 bits.
#include "kernel.h"

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>

namespace lowbit {
namespace {

struct Avx2 {
  static constexpr int kLanes = 8, kVectors = 2;
  static constexpr bool kHardware = true;
  static constexpr int32_t kByteOffset = 0;
  using Int = __m256i;
  using Float = __m256;
  using Table = __m256i;
  struct Short { __m256i value; };
  struct Long { __m256i value; };
  template <int kWidth>
  using Sum = std::conditional_t<kWidth == 8, Long, Short>;

  static Int Zero() { return _mm256_setzero_si256(); }
  static Int Load(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const Int*>(p)); }
  static Int LoadBytes(const uint8_t* p) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }
  static Int Broadcast(int32_t x) { return _mm256_set1_epi32(x); }
  static Float LoadFloat(const float* p) { return _mm256_loadu_ps(p); }
  static Float BroadcastFloat(float x) { return _mm256_set1_ps(x); }
  static void Store(float* p, Float x) { _mm256_storeu_ps(p, x); }
  static void StoreInt(int32_t* p, Int x) { _mm256_storeu_si256(reinterpret_cast<Int*>(p), x); }
  static Float ToFloat(Int x) { return _mm256_cvtepi32_ps(x); }
  static Float Fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
  static Float Mul(Float a, Float b) { return _mm256_mul_ps(a, b); }
  static Float Sub(Float a, Float b) { return _mm256_sub_ps(a, b); }

  // How many products of a code and an activation (at most 127), two at a time, 16 bits hold.
  template <int kWidth>
  static constexpr int64_t Period(int max_code) {
    return kWidth == 8 ? int64_t{1} << 40 : 32767 / (2 * 127 * max_code);
  }
  template <int kWidth>
  static Int Codes(Int words, int step) {
    if constexpr (kWidth == 8) return words;
    const Int mask = _mm256_set1_epi8((1 << kWidth) - 1);
    return _mm256_and_si256(_mm256_srli_epi16(words, step * kWidth), mask);
  }
  static Table MakeTable(const uint8_t* values) {
    if (values == nullptr) return Zero();
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)));
  }
  static Int Lookup(Int codes, Table table) { return _mm256_shuffle_epi8(table, codes); }
  static void Dot(Short& sum, Int codes, Int four) {
    sum.value = _mm256_add_epi16(sum.value, _mm256_maddubs_epi16(codes, four));
    // GCC takes these additions for ordinary ones and makes a tree of them, whose many products do
    // not fit into the registers: a quarter of the time went into keeping them in memory.
    asm("" : "+x"(sum.value));
  }
  // Codes of 8 bits would overflow 16 bits at once: even and odd bytes are widened before.
  static void Dot(Long& sum, Int codes, Int four) {
    const Int even = _mm256_and_si256(codes, _mm256_set1_epi16(255));
    const Int odd = _mm256_srli_epi16(codes, 8);
    const Int four_even = _mm256_srai_epi16(_mm256_slli_epi16(four, 8), 8);
    const Int four_odd = _mm256_srai_epi16(four, 8);
    sum.value = _mm256_add_epi32(sum.value, _mm256_madd_epi16(even, four_even));
    sum.value = _mm256_add_epi32(sum.value, _mm256_madd_epi16(odd, four_odd));
  }
  static void Flush(Int& total, Short sum, int shift) {
    total = _mm256_add_epi32(total, _mm256_madd_epi16(sum.value, _mm256_set1_epi16(1 << shift)));
  }
  static void Flush(Int& total, Long sum, int) { total = _mm256_add_epi32(total, sum.value); }
  static Int ShiftAdd(Int x, int shift, int32_t add) {
    return _mm256_add_epi32(_mm256_slli_epi32(x, shift), _mm256_set1_epi32(add));
  }
  static Int SubtractProduct(Int x, const uint8_t* bytes, int32_t factor) {
    return _mm256_sub_epi32(x, _mm256_mullo_epi32(LoadBytes(bytes), _mm256_set1_epi32(factor)));
  }
  static Int Field(Int words, int from, int width) {
    return _mm256_and_si256(_mm256_srli_epi32(words, from), _mm256_set1_epi32((1 << width) - 1));
  }
  static Int ShiftLeft(Int x, int shift) { return _mm256_slli_epi32(x, shift); }
  static Int Or(Int a, Int b) { return _mm256_or_si256(a, b); }
  static Float Gather(const float* table, Int code, int bits) {
    if (bits > 4) return _mm256_i32gather_ps(table, code, 4);
    const Float low = _mm256_permutevar8x32_ps(LoadFloat(table), code);
    if (bits < 4) return low;
    const Float high = _mm256_permutevar8x32_ps(LoadFloat(table + 8), code);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(code, 28)));
  }
  static float LargestMagnitude(const float* x, int64_t k) {
    const Float sign = _mm256_set1_ps(-0.0f);
    Float most = _mm256_setzero_ps(), sum = _mm256_setzero_ps();
    int64_t i = 0;
    for (; i + 8 <= k; i += 8) {
      const Float magnitude = _mm256_andnot_ps(sign, LoadFloat(x + i));
      most = _mm256_max_ps(most, magnitude);
      sum = _mm256_or_ps(sum, _mm256_cmp_ps(magnitude, magnitude, _CMP_UNORD_Q));
    }
    float lanes[8], largest = 0;
    Store(lanes, most);
    bool nan = _mm256_movemask_ps(sum) != 0;
    for (float lane : lanes) largest = std::max(largest, lane);
    for (; i < k; ++i) {
      nan |= std::isnan(x[i]);
      largest = std::max(largest, std::fabs(x[i]));
    }
    return nan ? std::numeric_limits<float>::quiet_NaN() : largest;
  }
  static void Round(const float* x, float reciprocal, int64_t k, int8_t* out) {
    const Float factor = BroadcastFloat(reciprocal);
    int64_t i = 0;
    for (; i + 16 <= k; i += 16) {
      const Int low = _mm256_cvtps_epi32(Mul(LoadFloat(x + i), factor));
      const Int high = _mm256_cvtps_epi32(Mul(LoadFloat(x + i + 8), factor));
      const Int words = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8);
      const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words),
                                            _mm256_extracti128_si256(words, 1));
      const __m128i limit = _mm_set1_epi8(-127);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), _mm_max_epi8(bytes, limit));
    }
    for (; i < k; ++i) {
      const long rounded = std::lrintf(x[i] * reciprocal);
      out[i] = static_cast<int8_t>(std::clamp(rounded, -127L, 127L));
    }
  }
};

}  // namespace

const Kernels* Avx2Kernels() {
  static constexpr Kernels kKernels = MakeKernels<Avx2>("avx2");
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? &kKernels : nullptr;
}

}  // namespace lowbit
#else
namespace lowbit {
const Kernels* Avx2Kernels() { return nullptr; }
}  // namespace lowbit
#endif
