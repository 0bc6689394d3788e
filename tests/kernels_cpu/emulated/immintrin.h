// AVX-512 in plain C++ for machines without it: SIMDe, and the few intrinsics that it lacks.
#ifndef TESTS_EMULATED_IMMINTRIN_H_
#define TESTS_EMULATED_IMMINTRIN_H_

#define SIMDE_ENABLE_NATIVE_ALIASES
#define SIMDE_NO_NATIVE
#include <simde/x86/avx512.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

using __mmask16 = simde__mmask16;

inline __m512i _mm512_cvtepu8_epi32(__m128i x) {
  alignas(64) uint8_t in[16];
  alignas(64) int32_t out[16];
  simde_mm_storeu_si128(in, x);
  std::copy(in, in + 16, out);
  return simde_mm512_loadu_si512(out);
}
inline __m512 _mm512_cvtepi32_ps(__m512i x) {
  alignas(64) int32_t in[16];
  alignas(64) float out[16];
  simde_mm512_storeu_si512(in, x);
  std::copy(in, in + 16, out);
  return simde_mm512_loadu_ps(out);
}
inline __m512i _mm512_cvtps_epi32(__m512 x) {
  alignas(64) float in[16];
  alignas(64) int32_t out[16];
  simde_mm512_storeu_ps(in, x);
  for (int i = 0; i < 16; ++i) out[i] = static_cast<int32_t>(std::lrintf(in[i]));
  return simde_mm512_loadu_si512(out);
}
inline __m512 _mm512_i32gather_ps(__m512i at, const float* table, int) {
  alignas(64) int32_t in[16];
  alignas(64) float out[16];
  simde_mm512_storeu_si512(in, at);
  for (int i = 0; i < 16; ++i) out[i] = table[in[i]];
  return simde_mm512_loadu_ps(out);
}
inline __m512 _mm512_maskz_loadu_ps(__mmask16 mask, const float* p) {
  alignas(64) float out[16] = {};
  for (int i = 0; i < 16; ++i)
    if (mask >> i & 1) out[i] = p[i];
  return simde_mm512_loadu_ps(out);
}
inline float _mm512_reduce_max_ps(__m512 x) {
  alignas(64) float in[16];
  simde_mm512_storeu_ps(in, x);
  return *std::max_element(in, in + 16);
}
inline void _mm512_mask_cvtepi32_storeu_epi8(void* p, __mmask16 mask, __m512i x) {
  alignas(64) int32_t in[16];
  simde_mm512_storeu_si512(in, x);
  for (int i = 0; i < 16; ++i)
    if (mask >> i & 1) static_cast<int8_t*>(p)[i] = static_cast<int8_t>(in[i]);
}

#endif  // TESTS_EMULATED_IMMINTRIN_H_
