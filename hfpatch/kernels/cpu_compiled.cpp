// Attention of blocks of queries over lists of keys, for x86 CPUs with AVX2 and FMA or with AVX-512.
//
// A task is one tile of queries of the query heads that share one list. Its keys are packed chunk by chunk into panels of
// 64; for a few rows at a time, scores, softmax and the product with the values follow each other while all three are in
// the core's cache. Scores, statistics and sums are fp32. The operands of the two products are bf16 where the model is in
// it and the CPU multiplies it (AVX512-BF16), else fp32: bf16 is widened as it is packed, and rounded only in the result.
// Rows are ordered by query, then head, so that the rows of one tile see nearly the same keys and what none of them sees
// is not computed.
//
// `cpu_compiled.py` compiles this file, fills in `Job` and calls `hfpatch_work` from several threads.

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>

namespace {

constexpr int kPanel = 64;    // keys in a panel
constexpr int kChunk = 1024;  // keys packed at once, at most
constexpr int kPacked = 1 << 18;  // bytes of packed keys and values that leave room in a core's cache
constexpr int kRows = 12;     // rows whose scores are in the cache together
constexpr int kTile = 6;      // rows of one register tile
constexpr float kNone = -std::numeric_limits<float>::infinity();
constexpr float kLog2E = 1.44269504088896f;
constexpr float kLn2 = 0.693147180559945f;

enum Kind : int64_t { kBlocks, kWindow, kBand };

}  // namespace

extern "C" {

// Strides count elements: batch, head, token. The same fields, in this order, are in cpu_compiled.py.
struct Job {
  const void *query, *key, *value;
  void* out;
  float* lse;           // [B, Hq, q_len] or null
  const float* sinks;   // [Hq] or null
  const uint8_t* mask;  // [B, kv_len] or null
  const int32_t *blk_idx, *blk_cnt, *col_idx, *col_cnt;
  const int32_t *order, *slots;  // [order_heads, kv_len], and the slots that hold a query [order_heads, q_len]
  int64_t q_stride[3], k_stride[3], v_stride[3], o_stride[3];
  int64_t batch, heads, kv_heads, q_len, kv_len, q_offset, dim, v_dim;
  int64_t kind, tile, group;  // `tile` queries and `group` query heads make a task
  int64_t plan_batch, lists, num_q, max_blocks, max_columns, block_q, block_k;
  int64_t sink, window, local, before, after, circular, order_heads;
  float scaling, softcap;  // softcap 0: none
};

}  // extern "C"

namespace {

// Memory that a thread keeps from call to call: fresh pages would cost more than the arithmetic.
template <typename T>
class Buffer {
 public:
  T* take(size_t count) {
    if (count > size_) {
      std::free(data_);
      const size_t bytes = (count * sizeof(T) + 63) / 64 * 64;
      data_ = static_cast<T*>(std::aligned_alloc(64, bytes));
      size_ = count;
    }
    return data_;
  }
  ~Buffer() { std::free(data_); }

 private:
  T* data_ = nullptr;
  size_t size_ = 0;
};

struct Scratch {
  Buffer<int32_t> keys, query, low, high;
  Buffer<uint32_t> query_rows, key_panels, value_panels, probs;
  Buffer<float> scores, sums, highest, total;
};

// Sixteen lanes: one register of AVX-512, two of AVX2 ----------------------------------------------------------------

#ifdef __AVX512F__

constexpr int kVectors = 4;  // vectors of a row in a register tile

using Floats = __m512;
using Ints = __m512i;
using Lanes = __mmask16;

inline Floats zeros() { return _mm512_setzero_ps(); }
inline Floats all(float x) { return _mm512_set1_ps(x); }
inline Ints all(int32_t x) { return _mm512_set1_epi32(x); }
inline Ints counting() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
inline Lanes first_lanes(int64_t count) {
  return count >= 16 ? __mmask16(0xffff) : count <= 0 ? __mmask16(0) : __mmask16((1u << count) - 1);
}

inline Ints as_ints(Floats x) { return _mm512_castps_si512(x); }
inline Floats as_floats(Ints x) { return _mm512_castsi512_ps(x); }

inline Floats load(const float* p) { return _mm512_load_ps(p); }
inline Ints load(const uint32_t* p) { return _mm512_load_si512(p); }
inline Floats load_first(const float* p, int64_t count) { return _mm512_maskz_loadu_ps(first_lanes(count), p); }
inline Ints load_first(const int32_t* p, int64_t count) { return _mm512_maskz_loadu_epi32(first_lanes(count), p); }
inline __m256i load_first(const uint16_t* p, int64_t count) { return _mm256_maskz_loadu_epi16(first_lanes(count), p); }
inline void store(float* p, Floats x) { _mm512_store_ps(p, x); }
inline void store(uint32_t* p, Ints x) { _mm512_store_si512(p, x); }
inline void store_first(float* p, int64_t count, Floats x) { _mm512_mask_storeu_ps(p, first_lanes(count), x); }
inline void store_first(uint16_t* p, int64_t count, __m256i x) { _mm256_mask_storeu_epi16(p, first_lanes(count), x); }

inline Floats add(Floats x, Floats y) { return _mm512_add_ps(x, y); }
inline Floats sub(Floats x, Floats y) { return _mm512_sub_ps(x, y); }
inline Floats mul(Floats x, Floats y) { return _mm512_mul_ps(x, y); }
inline Floats div(Floats x, Floats y) { return _mm512_div_ps(x, y); }
inline Floats fma(Floats x, Floats y, Floats sum) { return _mm512_fmadd_ps(x, y, sum); }
inline Floats larger(Floats x, Floats y) { return _mm512_max_ps(x, y); }  // y if one of them is NaN
inline Floats magnitude(Floats x) { return _mm512_abs_ps(x); }
inline Floats nearest(Floats x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Floats pick(Lanes lanes, Floats yes, Floats no) { return _mm512_mask_blend_ps(lanes, no, yes); }
inline Floats negate(Lanes lanes, Floats x) { return _mm512_mask_sub_ps(x, lanes, _mm512_setzero_ps(), x); }
inline Floats times_2_to(Floats x, Floats n, Lanes lanes) { return _mm512_maskz_scalef_ps(lanes, x, n); }
inline Lanes below(Floats x, Floats y) { return _mm512_cmp_ps_mask(x, y, _CMP_LT_OQ); }
inline Lanes not_below(Floats x, Floats y) { return _mm512_cmp_ps_mask(x, y, _CMP_NLT_UQ); }
inline float largest(Floats x) { return _mm512_reduce_max_ps(x); }
inline float sum_of(Floats x) { return _mm512_reduce_add_ps(x); }

inline Ints add(Ints x, Ints y) { return _mm512_add_epi32(x, y); }
inline Lanes below(Ints x, Ints y) { return _mm512_cmplt_epi32_mask(x, y); }
inline Lanes at_least(Ints x, Ints y) { return _mm512_cmpge_epi32_mask(x, y); }
inline Lanes at_most(Ints x, Ints y) { return _mm512_cmple_epi32_mask(x, y); }
inline Ints high_halves(Ints x) { return _mm512_srli_epi32(x, 16); }
inline __m256i low_halves(Ints x) { return _mm512_cvtepi32_epi16(x); }
inline Ints to_high_halves(__m256i x) { return _mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16); }

inline void transpose16(Ints* r) {
  __m512i t[16];
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
    t[8 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
    t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[4 + i], 0x88);
    r[8 + i] = _mm512_shuffle_i32x4(t[i], t[4 + i], 0xdd);
    r[4 + i] = _mm512_shuffle_i32x4(t[8 + i], t[12 + i], 0x88);
    r[12 + i] = _mm512_shuffle_i32x4(t[8 + i], t[12 + i], 0xdd);
  }
}

#else

constexpr int kVectors = 1;  // 6 rows are 12 registers of the 16

struct Floats {
  __m256 a, b;
};
struct Ints {
  __m256i a, b;
};
using Lanes = Ints;  // all bits of a lane, or none

inline Ints operator&(Ints x, Ints y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
inline Ints operator|(Ints x, Ints y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
inline Ints operator~(Ints x) { return {~x.a, ~x.b}; }

inline Floats zeros() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Floats all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Ints all(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline Ints counting() {
  return {_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15)};
}

inline Ints as_ints(Floats x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
inline Floats as_floats(Ints x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }

inline Ints add(Ints x, Ints y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
inline Lanes below(Ints x, Ints y) { return {_mm256_cmpgt_epi32(y.a, x.a), _mm256_cmpgt_epi32(y.b, x.b)}; }
inline Lanes at_least(Ints x, Ints y) { return ~below(x, y); }
inline Lanes at_most(Ints x, Ints y) { return ~below(y, x); }
inline Ints high_halves(Ints x) { return {_mm256_srli_epi32(x.a, 16), _mm256_srli_epi32(x.b, 16)}; }
inline __m256i low_halves(Ints x) { return _mm256_permute4x64_epi64(_mm256_packus_epi32(x.a, x.b), 0xd8); }
inline Ints to_high_halves(__m256i x) {
  return {_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm256_castsi256_si128(x)), 16),
          _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm256_extracti128_si256(x, 1)), 16)};
}
inline Lanes first_lanes(int64_t count) { return below(counting(), all(int32_t(count))); }

inline Floats load(const float* p) { return {_mm256_load_ps(p), _mm256_load_ps(p + 8)}; }
inline Ints load(const uint32_t* p) { return as_ints(load(reinterpret_cast<const float*>(p))); }
inline Floats load_first(const float* p, int64_t count) {
  if (count >= 16) return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)};
  const Lanes lanes = first_lanes(count);
  return {_mm256_maskload_ps(p, lanes.a), _mm256_maskload_ps(p + 8, lanes.b)};
}
inline Ints load_first(const int32_t* p, int64_t count) {
  return as_ints(load_first(reinterpret_cast<const float*>(p), count));
}
inline __m256i load_first(const uint16_t* p, int64_t count) {
  alignas(32) uint16_t own[16] = {};
  if (count < 16) p = static_cast<const uint16_t*>(std::memcpy(own, p, size_t(std::max<int64_t>(count, 0)) * 2));
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
inline void store(float* p, Floats x) { _mm256_store_ps(p, x.a), _mm256_store_ps(p + 8, x.b); }
inline void store(uint32_t* p, Ints x) { store(reinterpret_cast<float*>(p), as_floats(x)); }
inline void store_first(float* p, int64_t count, Floats x) {
  alignas(32) float own[16];
  store(own, x);
  std::memcpy(p, own, size_t(std::min<int64_t>(count, 16)) * 4);
}
inline void store_first(uint16_t* p, int64_t count, __m256i x) {
  std::memcpy(p, &x, size_t(std::min<int64_t>(count, 16)) * 2);
}

inline Floats add(Floats x, Floats y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline Floats sub(Floats x, Floats y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline Floats mul(Floats x, Floats y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline Floats div(Floats x, Floats y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline Floats fma(Floats x, Floats y, Floats sum) {
  return {_mm256_fmadd_ps(x.a, y.a, sum.a), _mm256_fmadd_ps(x.b, y.b, sum.b)};
}
inline Floats larger(Floats x, Floats y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline Floats magnitude(Floats x) { return as_floats(as_ints(x) & all(0x7fffffff)); }
inline Floats nearest(Floats x) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.a, kNearest), _mm256_round_ps(x.b, kNearest)};
}
inline Floats pick(Lanes lanes, Floats yes, Floats no) {
  return {_mm256_blendv_ps(no.a, yes.a, _mm256_castsi256_ps(lanes.a)),
          _mm256_blendv_ps(no.b, yes.b, _mm256_castsi256_ps(lanes.b))};
}
inline Floats negate(Lanes lanes, Floats x) { return pick(lanes, sub(zeros(), x), x); }
// n from -127, where the result is 0, to 127
inline Floats times_2_to(Floats x, Floats n, Lanes lanes) {
  const Ints exponent = add({_mm256_cvtps_epi32(n.a), _mm256_cvtps_epi32(n.b)}, all(127));
  const Ints power = {_mm256_slli_epi32(exponent.a, 23), _mm256_slli_epi32(exponent.b, 23)};
  return as_floats(as_ints(mul(x, as_floats(power))) & lanes);
}
inline Lanes below(Floats x, Floats y) {
  return as_ints({_mm256_cmp_ps(x.a, y.a, _CMP_LT_OQ), _mm256_cmp_ps(x.b, y.b, _CMP_LT_OQ)});
}
inline Lanes not_below(Floats x, Floats y) {
  return as_ints({_mm256_cmp_ps(x.a, y.a, _CMP_NLT_UQ), _mm256_cmp_ps(x.b, y.b, _CMP_NLT_UQ)});
}
inline float largest(Floats x) {
  const __m256 eight = _mm256_max_ps(x.a, x.b);
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}
inline float sum_of(Floats x) {
  const __m256 eight = _mm256_add_ps(x.a, x.b);
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

inline void transpose8(__m256i* r) {
  __m256i t[8];
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i) {
    r[4 * i] = _mm256_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm256_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm256_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm256_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm256_permute2x128_si256(r[i], r[4 + i], 0x20);
    t[4 + i] = _mm256_permute2x128_si256(r[i], r[4 + i], 0x31);
  }
  std::copy(t, t + 8, r);
}

inline void transpose16(Ints* r) {
  __m256i quarter[4][8];
  for (int i = 0; i < 8; ++i) {
    quarter[0][i] = r[i].a, quarter[1][i] = r[8 + i].a;
    quarter[2][i] = r[i].b, quarter[3][i] = r[8 + i].b;
  }
  for (auto& q : quarter) transpose8(q);
  for (int i = 0; i < 8; ++i) {
    r[i] = {quarter[0][i], quarter[1][i]};
    r[8 + i] = {quarter[2][i], quarter[3][i]};
  }
}

#endif

// Operands -----------------------------------------------------------------------------------------------------------

#ifdef __AVX512BF16__
constexpr bool kHasBf16 = true;
#else
constexpr bool kHasBf16 = false;
#endif

inline __m256i to_bf16(Floats x) {
#ifdef __AVX512BF16__
  return (__m256i)_mm512_cvtneps_pbh(x);
#else
  // to nearest, ties to even; a NaN from bf16 or from arithmetic has zeros in its low half and stays one
  const Ints bits = as_ints(x);
  return low_halves(high_halves(add(add(bits, all(0x7fff)), high_halves(bits) & all(1))));
#endif
}

// An operand is handled in units of 32 bits: one fp32 number, or two bf16 numbers that are multiplied together.
template <bool kBf16>
struct Units {
  using Element = std::conditional_t<kBf16, uint16_t, float>;
  static constexpr bool kPairs = kBf16 && kHasBf16;
  static constexpr bool kWiden = kBf16 && !kHasBf16;
  static constexpr int kPer = kPairs ? 2 : 1;

  static Floats dot(Floats sum, Ints a, Ints b) {
#ifdef __AVX512BF16__
    if constexpr (kBf16) return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
#endif
    return fma(as_floats(a), as_floats(b), sum);
  }

  // Up to 16 units, 0 past the last; bf16 that is not multiplied as it is becomes fp32.
  static Ints load(const Element* p, int64_t count) {
    if constexpr (kWiden) {
      return to_high_halves(load_first(p, count));
    } else {
      return load_first(reinterpret_cast<const int32_t*>(p), count);
    }
  }
};

// 2^x for x <= 0; 0 below 2^-126; NaN stays NaN. Minimax polynomials on [-1/2, 1/2]: relative error 3e-6, and 1e-7 for
// fp32.
template <bool kBf16>
inline Floats exp2_ps(Floats x) {
  const Lanes normal = not_below(x, all(-126.f));
  x = larger(all(-127.f), x);
  const Floats whole = nearest(x), part = sub(x, whole);
  constexpr float kShort[] = {9.582852866e-03f, 5.590642492e-02f, 2.402409862e-01f, 6.931241934e-01f, 1.f};
  constexpr float kLong[] = {1.326472690e-03f, 9.671512661e-03f, 5.550733744e-02f,
                             2.402224208e-01f, 6.931469776e-01f, 1.f};
  Floats y;
  if constexpr (kBf16) {
    y = all(kShort[0]);
    for (int i = 1; i < 5; ++i) y = fma(y, part, all(kShort[i]));
  } else {
    y = all(kLong[0]);
    for (int i = 1; i < 6; ++i) y = fma(y, part, all(kLong[i]));
  }
  return times_2_to(y, whole, normal);
}

// Keys [count <= 64] as [units][64].
template <bool kBf16>
void pack_keys(const char* base, int64_t stride, const int32_t* keys, int count, int units, uint32_t* panel) {
  using Element = typename Units<kBf16>::Element;
  for (int group = 0; group < kPanel; group += 16) {
    for (int unit = 0; unit < units; unit += 16) {
      Ints r[16];
      for (int i = 0; i < 16; ++i) {
        const int key = group + i;
        const Element* row = key < count ? reinterpret_cast<const Element*>(base) + keys[key] * stride : nullptr;
        r[i] = row ? Units<kBf16>::load(row + unit * Units<kBf16>::kPer, units - unit) : as_ints(zeros());
      }
      transpose16(r);
      for (int i = 0; i < std::min(16, units - unit); ++i) store(panel + int64_t(unit + i) * kPanel + group, r[i]);
    }
  }
}

// Values [count <= 64] as [64 / kPer][width]: the units of a pair of bf16 keys are their numbers side by side.
template <bool kBf16>
void pack_values(const char* base, int64_t stride, const int32_t* keys, int count, int dim, int width, uint32_t* panel) {
  const auto* rows = reinterpret_cast<const typename Units<kBf16>::Element*>(base);
#ifdef __AVX512BF16__
  if constexpr (kBf16) {
    alignas(64) uint16_t low[32], high[32];
    for (int i = 0; i < 16; ++i) {
      low[2 * i] = uint16_t(i), low[2 * i + 1] = uint16_t(32 + i);
      high[2 * i] = uint16_t(16 + i), high[2 * i + 1] = uint16_t(48 + i);
    }
    const __m512i to_low = _mm512_load_si512(low), to_high = _mm512_load_si512(high);
    for (int pair = 0; pair < kPanel / 2; ++pair) {
      uint32_t* target = panel + int64_t(pair) * width;
      const uint16_t* a = 2 * pair < count ? rows + keys[2 * pair] * stride : nullptr;
      const uint16_t* b = 2 * pair + 1 < count ? rows + keys[2 * pair + 1] * stride : nullptr;
      for (int d = 0; d < width; d += 32) {
        const int left = std::max(0, std::min(32, dim - d));
        const __mmask32 lanes = left == 32 ? __mmask32(0xffffffff) : __mmask32((1u << left) - 1);
        const __m512i x = a ? _mm512_maskz_loadu_epi16(lanes, a + d) : _mm512_setzero_si512();
        const __m512i y = b ? _mm512_maskz_loadu_epi16(lanes, b + d) : _mm512_setzero_si512();
        _mm512_store_si512(target + d, _mm512_permutex2var_epi16(x, to_low, y));
        if (d + 16 < width) _mm512_store_si512(target + d + 16, _mm512_permutex2var_epi16(x, to_high, y));
      }
    }
    return;
  }
#endif
  for (int key = 0; key < kPanel; ++key) {
    const auto* row = key < count ? rows + keys[key] * stride : nullptr;
    for (int d = 0; d < width; d += 16) {
      store(panel + int64_t(key) * width + d, row ? Units<kBf16>::load(row + d, dim - d) : as_ints(zeros()));
    }
  }
}

// kM rows of `a`, units [kM][depth], times `b`, units [depth][kN * 16 of b_width]; the sums start at 0.
template <bool kBf16, int kM, int kN>
inline void product(Floats (&sum)[kM][kN], const uint32_t* const* a, const uint32_t* b, int64_t b_width, int depth) {
  for (int k = 0; k < depth; ++k) {
    Ints column[kN];
    for (int n = 0; n < kN; ++n) column[n] = load(b + k * b_width + n * 16);
    for (int m = 0; m < kM; ++m) {
      const Ints row = all(int(a[m][k]));
      for (int n = 0; n < kN; ++n) sum[m][n] = Units<kBf16>::dot(sum[m][n], row, column[n]);
    }
  }
}

// A function of its own, so that nothing around it takes registers from the sums.
template <bool kBf16, int kM, int kN>
__attribute__((noinline)) void scores_tile(const uint32_t* const* query, const uint32_t* panel, int units,
                                           float* scores, int64_t width) {
  Floats sum[kM][kN] = {};
  product<kBf16, kM, kN>(sum, query, panel, kPanel, units);
  for (int m = 0; m < kM; ++m)
    for (int n = 0; n < kN; ++n) store(scores + m * width + n * 16, sum[m][n]);
}

// sums[m] = sums[m] * scale[m] + probs times values, over the listed panels.
template <bool kBf16, int kM, int kN>
__attribute__((noinline)) void values_tile(const uint32_t* const* probs, const uint32_t* panels, int64_t panel_size,
                                           int64_t width, const int* listed, const int* depth, int count,
                                           const float* scale, float* sums) {
  constexpr int kSteps = kPanel / Units<kBf16>::kPer;
  Floats sum[kM][kN];
  for (int m = 0; m < kM; ++m)
    for (int n = 0; n < kN; ++n)
      sum[m][n] = scale[m] == 0.f ? zeros() : mul(load(sums + m * width + n * 16), all(scale[m]));
  for (int i = 0; i < count; ++i) {
    const uint32_t* rows[kM];
    for (int m = 0; m < kM; ++m) rows[m] = probs[m] + i * kSteps;
    product<kBf16, kM, kN>(sum, rows, panels + listed[i] * panel_size, width, depth[i]);
  }
  for (int m = 0; m < kM; ++m)
    for (int n = 0; n < kN; ++n) store(sums + m * width + n * 16, sum[m][n]);
}

// Calls f(std::integral_constant<int, n>, first) for tiles of n vectors of columns: kVectors, and one smaller last tile.
template <typename F>
void for_column_tiles(int64_t vectors, F f) {
  int64_t first = 0;
  for (; first + kVectors <= vectors; first += kVectors) f(std::integral_constant<int, kVectors>{}, first * 16);
  if constexpr (kVectors > 1) {
    switch (vectors - first) {
      case 1: f(std::integral_constant<int, 1>{}, first * 16); break;
      case 2: f(std::integral_constant<int, 2>{}, first * 16); break;
      case 3: f(std::integral_constant<int, 3>{}, first * 16); break;
    }
  }
}

template <bool kBf16, int kM>
void scores_rows(const uint32_t* const* query, const uint32_t* panel, int units, int keys, float* scores,
                 int64_t width) {
  for_column_tiles((keys + 15) / 16, [&](auto n, int64_t first) {
    scores_tile<kBf16, kM, decltype(n)::value>(query, panel + first, units, scores + first, width);
  });
}

template <bool kBf16, int kM>
void values_rows(const uint32_t* const* probs, const uint32_t* panels, int64_t panel_size, int64_t width,
                 const int* listed, const int* depth, int count, const float* scale, float* sums) {
  for_column_tiles(width / 16, [&](auto n, int64_t first) {
    values_tile<kBf16, kM, decltype(n)::value>(probs, panels + first, panel_size, width, listed, depth, count, scale,
                                               sums + first);
  });
}

// Calls f(std::integral_constant<int, m>, first) for tiles of 6 rows and one smaller last tile.
template <typename F>
void for_row_tiles(int rows, F f) {
  int first = 0;
  for (; first + kTile <= rows; first += kTile) f(std::integral_constant<int, kTile>{}, first);
  switch (rows - first) {
    case 1: f(std::integral_constant<int, 1>{}, first); break;
    case 2: f(std::integral_constant<int, 2>{}, first); break;
    case 3: f(std::integral_constant<int, 3>{}, first); break;
    case 4: f(std::integral_constant<int, 4>{}, first); break;
    case 5: f(std::integral_constant<int, 5>{}, first); break;
  }
}

// What a task computes. Query i sees entries of `keys` below high[i] that are below `sink` or from low[i] on, and of those
// in a permuted order only keys up to query[i] - local and from `first_key` on.
struct Task {
  int64_t row, head, heads, kv_head;
  int64_t queries, count;  // entries of query, low, high; and of keys
  const int32_t *keys, *query, *low, *high;
  int32_t sink = 0, local = 0, first_key = 0;
  bool permuted = false;
};

// Entries of a panel that query i sees.
inline Lanes seen(const Task& task, int i, int32_t entry) {
  const Ints entries = add(all(entry), counting());
  Lanes keep = at_least(entries, all(task.low[i])) | below(entries, all(task.sink));
  keep = keep & below(entries, all(task.high[i]));
  if (task.permuted) {
    const Ints key = load_first(task.keys + entry, task.count - entry);
    keep = keep & at_most(key, all(task.query[i] - task.local)) & at_least(key, all(task.first_key));
  }
  return keep;
}

// cap * tanh(x * scaling / cap), through 2^-|y| so that nothing overflows.
template <bool kBf16>
inline Floats soft_cap(Floats x, float scaling, float cap) {
  const Floats y = mul(x, all(scaling / cap)), one = all(1.f);
  const Floats e = exp2_ps<kBf16>(mul(magnitude(y), all(-2.f * kLog2E)));
  const Floats t = div(sub(one, e), add(one, e));
  return mul(negate(below(y, zeros()), t), all(cap));
}

template <bool kBf16>
void store_row(const float* sums, float factor, int64_t dim, typename Units<kBf16>::Element* target) {
  for (int64_t d = 0; d < dim; d += 16) {
    const Floats x = mul(load(sums + d), all(factor));
    if constexpr (kBf16) {
      store_first(target + d, dim - d, to_bf16(x));
    } else {
      store_first(target + d, dim - d, x);
    }
  }
}

template <bool kBf16>
void finish_row(const Job& job, const Task& task, int64_t head, int64_t query, const float* sums, float highest,
                float total) {
  using Element = typename Units<kBf16>::Element;
  // one NaN among the scores makes the total NaN, and with it the whole row
  float factor = total == 0.f ? 0.f : 1.f / total;
  float lse = total == 0.f ? kNone : highest * kLn2 + std::log(total);
  if (job.sinks) {
    const float sink = job.sinks[head], larger = std::max(lse, sink);
    const float joined = larger + std::log1p(std::exp(std::min(lse, sink) - larger));
    factor *= std::exp(lse - joined);
    lse = joined;
  }
  Element* out = static_cast<Element*>(job.out) + task.row * job.o_stride[0] + head * job.o_stride[1] +
                 query * job.o_stride[2];
  store_row<kBf16>(sums, factor, job.v_dim, out);
  if (job.lse) job.lse[(task.row * job.heads + head) * job.q_len + query] = lse;
}

template <bool kBf16>
void attend(const Job& job, const Task& task, Scratch& scratch) {
  using Element = typename Units<kBf16>::Element;
  constexpr int kPer = Units<kBf16>::kPer, kPanels = kChunk / kPanel, kSteps = kPanel / kPer;
  const int units = int(job.dim) / kPer;
  const int64_t width = (job.v_dim + 15) / 16 * 16, key_panel = int64_t(units) * kPanel, value_panel = kSteps * width;
  const int64_t rows = task.queries * task.heads, query_row = (job.dim + 15) / 16 * 16;
  uint32_t* key_panels = scratch.key_panels.take(kPanels * key_panel);
  uint32_t* value_panels = scratch.value_panels.take(kPanels * value_panel);
  uint32_t* query_rows = Units<kBf16>::kWiden ? scratch.query_rows.take(kRows * query_row) : nullptr;
  float* scores = scratch.scores.take(kRows * kChunk);
  uint32_t* probs = scratch.probs.take(kRows * kChunk / kPer);
  float* sums = scratch.sums.take(rows * width);
  float* highest = scratch.highest.take(rows);
  float* total = scratch.total.take(rows);
  std::fill(sums, sums + rows * width, 0.f);
  std::fill(highest, highest + rows, kNone);
  std::fill(total, total + rows, 0.f);
  const char* key = static_cast<const char*>(job.key) +
                    (task.row * job.k_stride[0] + task.kv_head * job.k_stride[1]) * int64_t(sizeof(Element));
  const char* value = static_cast<const char*>(job.value) +
                      (task.row * job.v_stride[0] + task.kv_head * job.v_stride[1]) * int64_t(sizeof(Element));
  const Element* query = static_cast<const Element*>(job.query) + task.row * job.q_stride[0] +
                         task.head * job.q_stride[1];
  const float factor = job.softcap > 0.f ? kLog2E : job.scaling * kLog2E;

  const int64_t fitting = kPacked / ((key_panel + value_panel) * 4) * kPanel;
  const int64_t chunk = std::min<int64_t>(kChunk, std::max<int64_t>(4 * kPanel, fitting));
  for (int64_t begin = 0; begin < task.count; begin += chunk) {
    const int64_t end = std::min<int64_t>(begin + chunk, task.count);
    for (int64_t first = begin; first < end; first += kPanel) {
      const int here = int(std::min<int64_t>(kPanel, end - first)), at = int((first - begin) / kPanel);
      pack_keys<kBf16>(key, job.k_stride[2], task.keys + first, here, units, key_panels + at * key_panel);
      pack_values<kBf16>(value, job.v_stride[2], task.keys + first, here, int(job.v_dim), int(width),
                         value_panels + at * value_panel);
    }
    for (int64_t row = 0; row < rows; row += kRows) {
      const int here = int(std::min<int64_t>(kRows, rows - row));
      const int from = int(row / task.heads), to = int((row + here - 1) / task.heads);
      int32_t low = task.low[from], high = task.high[from], low_most = low, high_least = high;
      for (int i = from + 1; i <= to; ++i) {
        low = std::min(low, task.low[i]), low_most = std::max(low_most, task.low[i]);
        high = std::max(high, task.high[i]), high_least = std::min(high_least, task.high[i]);
      }
      const uint32_t* queries[kRows];
      float* own_scores[kRows];
      for (int r = 0; r < here; ++r) {
        const int64_t i = (row + r) / task.heads, g = (row + r) % task.heads;
        const Element* own = query + (task.query[i] - job.q_offset) * job.q_stride[2] + g * job.q_stride[1];
        queries[r] = reinterpret_cast<const uint32_t*>(own);
        if constexpr (Units<kBf16>::kWiden) {
          uint32_t* wide = query_rows + r * query_row;
          for (int64_t d = 0; d < job.dim; d += 16) store(wide + d, Units<kBf16>::load(own + d, job.dim - d));
          queries[r] = wide;
        }
        own_scores[r] = scores + r * kChunk;
      }
      // panels that some row sees, their keys up to the last one seen, and whether all rows see all of it
      int listed[kPanels], size[kPanels], depth[kPanels], count = 0;
      bool full[kPanels];
      for (int64_t first = begin; first < end; first += kPanel) {
        const int32_t start = int32_t(first), stop = int32_t(std::min<int64_t>(first + kPanel, end));
        const bool in_window = low < stop && high > start;
        const int32_t last = std::min({stop, high, in_window ? stop : task.sink});
        if (last <= start) continue;
        listed[count] = int((first - begin) / kPanel);
        size[count] = last - start;
        depth[count] = (size[count] + kPer - 1) / kPer;
        full[count] = !task.permuted && size[count] % 16 == 0 && last <= high_least &&
                      (start >= low_most || last <= task.sink);
        ++count;
      }
      if (count == 0) continue;
      for (int i = 0; i < count; ++i) {
        const uint32_t* panel = key_panels + listed[i] * key_panel;
        for_row_tiles(here, [&](auto m, int first) {
          scores_rows<kBf16, decltype(m)::value>(queries + first, panel, units, size[i],
                                                 own_scores[first] + i * kPanel, kChunk);
        });
      }
      float scale[kRows];
      const uint32_t* own_probs[kRows];
      for (int r = 0; r < here; ++r) {
        const int query_at = int((row + r) / task.heads);
        Floats most = all(kNone);
        for (int i = 0; i < count; ++i) {
          float* s = own_scores[r] + i * kPanel;
          for (int k = 0; k < size[i]; k += 16) {
            Floats x = load(s + k);
            if (job.softcap > 0.f) x = soft_cap<kBf16>(x, job.scaling, job.softcap);
            if (!full[i]) {
              x = pick(seen(task, query_at, int32_t(begin + listed[i] * kPanel + k)), x, all(kNone));
            }
            if (job.softcap > 0.f || !full[i]) store(s + k, x);
            most = larger(most, x);
          }
        }
        const float before = highest[row + r];
        const float now = std::max(before, largest(most) * factor);
        // a row that has seen nothing yet keeps zero sums
        scale[r] = before == kNone ? 0.f : std::exp2(before - now);
        highest[row + r] = now;
        const Floats shift = all(now == kNone ? 0.f : -now), times = all(factor);
        Floats sum = zeros();
        uint32_t* own = probs + r * (kChunk / kPer);
        own_probs[r] = own;
        for (int i = 0; i < count; ++i) {
          const float* s = own_scores[r] + i * kPanel;
          uint32_t* p = own + i * kSteps;
          for (int k = 0; k < size[i]; k += 16) {
            const Floats e = exp2_ps<kBf16>(fma(load(s + k), times, shift));
            sum = add(sum, e);
            if constexpr (Units<kBf16>::kPairs) {
              _mm256_store_si256(reinterpret_cast<__m256i*>(p + k / 2), to_bf16(e));
            } else {
              store(p + k, as_ints(e));
            }
          }
        }
        total[row + r] = total[row + r] * scale[r] + sum_of(sum);
      }
      for_row_tiles(here, [&](auto m, int first) {
        values_rows<kBf16, decltype(m)::value>(own_probs + first, value_panels, value_panel, width, listed, depth,
                                               count, scale + first, sums + (row + first) * width);
      });
    }
  }
  for (int64_t row = 0; row < rows; ++row) {
    finish_row<kBf16>(job, task, task.head + row % task.heads, task.query[row / task.heads] - job.q_offset,
                      sums + row * width, highest[row], total[row]);
  }
}

// The keys of a tile -------------------------------------------------------------------------------------------------

// Query tile [first, last) of the call, and its places in `task`.
void contiguous_queries(const Job& job, Task& task, int64_t first, int64_t last, Scratch& scratch) {
  task.queries = last - first;
  int32_t* query = scratch.query.take(task.queries);
  for (int64_t i = 0; i < task.queries; ++i) query[i] = int32_t(job.q_offset + first + i);
  task.query = query;
}

void list_blocks(const Job& job, Task& task, int64_t block, int64_t first, int64_t last, Scratch& scratch) {
  contiguous_queries(job, task, first, last, scratch);
  const int64_t list = ((job.plan_batch > 1 ? task.row : 0) * job.lists + task.head * job.lists / job.heads) *
                           job.num_q + block;
  const int32_t* blocks = job.blk_idx + list * job.max_blocks;
  const int32_t num_blocks = job.blk_cnt[list];
  const int32_t* columns = job.col_idx ? job.col_idx + list * job.max_columns : nullptr;
  const int32_t num_columns = !columns ? 0 : job.col_cnt ? job.col_cnt[list] : int32_t(job.max_columns);
  int32_t* keys = scratch.keys.take(num_blocks * job.block_k + num_columns + 16);
  const int64_t limit = std::min<int64_t>(job.q_offset + last, job.kv_len);
  const uint8_t* mask = job.mask ? job.mask + task.row * job.kv_len : nullptr;
  int64_t count = 0;
  int32_t column = 0;
  const auto add = [&](int64_t key) {
    if (key < limit && (!mask || mask[key])) keys[count++] = int32_t(key);
  };
  for (int32_t b = 0; b < num_blocks; ++b) {
    const int64_t start = int64_t(blocks[b]) * job.block_k;
    while (column < num_columns && columns[column] < start) add(columns[column++]);
    for (int64_t key = start; key < start + job.block_k; ++key) add(key);
  }
  while (column < num_columns) add(columns[column++]);
  int32_t* low = scratch.low.take(task.queries);
  int32_t* high = scratch.high.take(task.queries);
  for (int64_t i = 0; i < task.queries; ++i) {
    low[i] = 0;
    high[i] = int32_t(std::upper_bound(keys, keys + count, task.query[i]) - keys);
    if (mask && !mask[task.query[i]]) high[i] = 0;
  }
  task.keys = keys, task.count = count, task.low = low, task.high = high;
}

void list_window(const Job& job, Task& task, int64_t first, int64_t last, Scratch& scratch) {
  contiguous_queries(job, task, first, last, scratch);
  int64_t start = std::max<int64_t>(job.q_offset + first - job.window + 1, 0);
  const int64_t end = job.q_offset + last;
  int64_t sink = std::min(job.sink, start);
  if (job.sink >= start) start = 0, sink = 0;  // one piece
  int32_t* keys = scratch.keys.take(sink + end - start + 16);
  for (int64_t i = 0; i < sink; ++i) keys[i] = int32_t(i);
  for (int64_t i = start; i < end; ++i) keys[sink + i - start] = int32_t(i);
  int32_t* low = scratch.low.take(task.queries);
  int32_t* high = scratch.high.take(task.queries);
  for (int64_t i = 0; i < task.queries; ++i) {
    low[i] = int32_t(std::max<int64_t>(task.query[i] - job.window + 1 - start, 0) + sink);
    high[i] = int32_t(task.query[i] + 1 - start + sink);
  }
  task.sink = int32_t(std::min(sink ? sink : job.sink, end));
  task.keys = keys, task.count = sink + end - start, task.low = low, task.high = high;
}

void list_band(const Job& job, Task& task, int64_t first, int64_t last, Scratch& scratch) {
  const int64_t head = job.order_heads > 1 ? task.kv_head : 0, n = job.kv_len;
  const int32_t* order = job.order + head * n;
  const int32_t* slots = job.slots + head * job.q_len;
  int64_t start = slots[first] - job.before, end = slots[last - 1] + job.after + 1;
  if (!job.circular) start = std::max<int64_t>(start, 0), end = std::min(end, n);
  int32_t* keys = scratch.keys.take(end - start + 16);
  for (int64_t slot = start; slot < end; ++slot) keys[slot - start] = order[(slot + n) % n];
  task.queries = last - first;
  int32_t* query = scratch.query.take(task.queries);
  int32_t* low = scratch.low.take(task.queries);
  int32_t* high = scratch.high.take(task.queries);
  for (int64_t i = 0; i < task.queries; ++i) {
    const int64_t slot = slots[first + i];
    query[i] = order[slot];
    low[i] = int32_t(std::max<int64_t>(slot - job.before - start, 0));
    high[i] = int32_t(std::min<int64_t>(slot + job.after + 1, end) - start);
  }
  task.keys = keys, task.count = end - start, task.query = query, task.low = low, task.high = high;
  task.permuted = true;
  task.local = int32_t(job.local);
  task.first_key = job.local ? int32_t(job.sink) : 0;
}

template <bool kBf16>
void work(const Job& job, int64_t* ticket) {
  static thread_local Scratch scratch;
  const int64_t span = job.kind == kBlocks ? job.block_q : job.q_len;
  const int64_t tiles = (span + job.tile - 1) / job.tile;
  const int64_t blocks = (job.q_len + span - 1) / span, groups = job.heads / job.group;
  const int64_t tasks = blocks * tiles * job.batch * groups;
  for (;;) {
    const int64_t mine = __atomic_fetch_add(ticket, 1, __ATOMIC_RELAXED);
    if (mine >= tasks) return;
    Task task;
    task.row = mine / groups % job.batch;
    task.head = mine % groups * job.group;
    task.heads = job.group;
    task.kv_head = task.head * job.kv_heads / job.heads;
    // the longest lists first, so that no thread is left with one at the end
    const int64_t at = blocks * tiles - 1 - mine / (groups * job.batch);
    const int64_t block = at / tiles, first = block * span + at % tiles * job.tile;
    const int64_t last = std::min({first + job.tile, (block + 1) * span, job.q_len});
    if (first >= last) continue;
    if (job.kind == kBlocks) list_blocks(job, task, block, first, last, scratch);
    if (job.kind == kWindow) list_window(job, task, first, last, scratch);
    if (job.kind == kBand) list_band(job, task, first, last, scratch);
    attend<kBf16>(job, task, scratch);
  }
}

}  // namespace

extern "C" {

// Takes tasks until none is left; `ticket` is shared by the threads that call this and starts at 0.
void hfpatch_work_bf16(const Job* job, int64_t* ticket) { work<true>(*job, ticket); }
void hfpatch_work_fp32(const Job* job, int64_t* ticket) { work<false>(*job, ticket); }

}  // extern "C"
