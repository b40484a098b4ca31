// Products and attention of a decoding step on a CPU, for a few rows at a time. `kernels.py` compiles and calls it.
//
// A decoding step reads every weight once for a few rows, so its time is that of reading them from memory. Weights are
// expanded to float32 in registers; activations and sums are float32. A row's sums are added in an order that depends
// on neither the other rows nor the number of threads, so a row's result is the same alone and in a batch.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));
typedef int8_t Bytes __attribute__((vector_size(LANES)));
typedef uint8_t UnsignedBytes __attribute__((vector_size(LANES)));

enum Kind : int64_t { FLOAT32, BFLOAT16, INT8, INT4, NF4 };

// As `kernels.Matrix` lays it out. A row of `weight` is stored in groups of `group` values, each with one scale.
struct Matrix {
  const uint8_t* weight;  // [out, in]
  const float* scales;    // [out, in / group]
  const float* bias;      // [out], or null
  int64_t kind, out, in, group;
};

// Few products do not pay for waking a thread.
constexpr int64_t WEIGHTS_PER_THREAD = 1 << 15;
constexpr int OUTS = 4;  // weight rows at once: each reads the same x
constexpr int ROWS = 2;  // rows of x at once: each reads the same weights

// The quantiles of a normal distribution that QLoRA defines (arXiv:2305.14314, appendix E).
const float NF4_VALUES[16] = {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
                              -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
                              0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
                              0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

template <class Vector>
inline Vector load(const void* from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}

// a b + c with one rounding. Left to the compiler, it may round twice in one place and once in another.
inline Floats fused(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return Floats(_mm512_fmadd_ps(__m512(a), __m512(b), __m512(c)));
#elif defined(__AVX2__) && defined(__FMA__)
  return Floats(_mm256_fmadd_ps(__m256(a), __m256(b), __m256(c)));
#elif defined(__aarch64__)
  return Floats(vfmaq_f32(float32x4_t(c), float32x4_t(a), float32x4_t(b)));
#else
  return a * b + c;
#endif
}

inline void store(float* to, Floats vector) { std::memcpy(to, &vector, sizeof vector); }

// LANES numbers as int32. The compilers' own conversion takes several times as many instructions.
template <class Narrow>
inline Ints widen(const uint8_t* from) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<Narrow, Halves>) return Ints(_mm512_cvtepu16_epi32(load<__m256i>(from)));
  if constexpr (std::is_same_v<Narrow, Bytes>) return Ints(_mm512_cvtepi8_epi32(load<__m128i>(from)));
  return Ints(_mm512_cvtepu8_epi32(load<__m128i>(from)));
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<Narrow, Halves>) return Ints(_mm256_cvtepu16_epi32(load<__m128i>(from)));
  if constexpr (std::is_same_v<Narrow, Bytes>) return Ints(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from)));
  return Ints(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from)));
#else
  return __builtin_convertvector(load<Narrow>(from), Ints);
#endif
}

inline float sum(Floats vector) {
  float total = 0;
  for (int lane = 0; lane < LANES; lane++) total += vector[lane];
  return total;
}

inline Floats look_up_nf4(Ints index) {
#if defined(__GNUC__) && !defined(__clang__)
  if constexpr (LANES == 16) return __builtin_shuffle(load<Floats>(NF4_VALUES), index);
  if constexpr (LANES == 8) return __builtin_shuffle(load<Floats>(NF4_VALUES), load<Floats>(NF4_VALUES + 8), index);
#endif
  Floats values;
  for (int lane = 0; lane < LANES; lane++) values[lane] = NF4_VALUES[index[lane]];
  return values;
}

// The weights of values j and j + half, and of the LANES - 1 after each, of a group that starts at `group`.
template <int KIND>
inline void unpack(const uint8_t* group, float scale, int64_t j, int64_t half, Floats& low, Floats& high) {
  if constexpr (KIND == FLOAT32) {
    low = load<Floats>(group + 4 * j), high = load<Floats>(group + 4 * (j + half));
  } else if constexpr (KIND == BFLOAT16) {
    low = Floats(widen<Halves>(group + 2 * j) << 16);  // bfloat16 is the upper half of a float32
    high = Floats(widen<Halves>(group + 2 * (j + half)) << 16);
  } else if constexpr (KIND == INT8) {
    low = __builtin_convertvector(widen<Bytes>(group + j), Floats) * scale;
    high = __builtin_convertvector(widen<Bytes>(group + j + half), Floats) * scale;
  } else {
    const Ints bytes = widen<UnsignedBytes>(group + j);
    if constexpr (KIND == INT4) {
      low = __builtin_convertvector((bytes & 15) - 8, Floats) * scale;
      high = __builtin_convertvector((bytes >> 4) - 8, Floats) * scale;
    } else {
      low = look_up_nf4(bytes & 15) * scale, high = look_up_nf4(bytes >> 4) * scale;
    }
  }
}

template <int KIND>
constexpr int64_t bytes_of(int64_t values) {
  return KIND == FLOAT32 ? 4 * values : KIND == BFLOAT16 ? 2 * values : KIND == INT8 ? values : values / 2;
}

// The last values of a row of float32 or bfloat16 whose length is no multiple of its groups, followed by zeros.
template <int KIND>
inline Floats unpack_tail(const uint8_t* from, int64_t count) {
  if constexpr (KIND == BFLOAT16) {
    uint16_t bits[LANES] = {};
    std::memcpy(bits, from, 2 * count);
    return Floats(widen<Halves>(reinterpret_cast<const uint8_t*>(bits)) << 16);
  } else {
    Floats values = {};
    std::memcpy(&values, from, 4 * count);
    return values;
  }
}

// y[r, o] = x[r] · w[o] for `rows` rows of x and `outs` rows of weights from `first` on. [rows, in], [rows, out]
template <int KIND, int outs, int rows>
void products(const Matrix& m, const uint8_t* weight, int64_t first, const float* x, float* y) {
  const int64_t groups = m.in / m.group, half = m.group / 2, row_bytes = bytes_of<KIND>(m.in);
  const float* scales = m.scales + (KIND >= INT8 ? first * groups : 0);
  Floats sums[outs][rows] = {};
  for (int64_t g = 0; g < groups; g++) {
    const uint8_t* group = weight + bytes_of<KIND>(g * m.group);
    const float* read = x + g * m.group;
    for (int64_t j = 0; j < half; j += LANES) {
      Floats low[outs], high[outs];
      for (int o = 0; o < outs; o++)
        unpack<KIND>(group + o * row_bytes, KIND >= INT8 ? scales[o * groups + g] : 1.0f, j, half, low[o], high[o]);
      for (int r = 0; r < rows; r++) {
        const Floats a = load<Floats>(read + r * m.in + j), b = load<Floats>(read + r * m.in + j + half);
        for (int o = 0; o < outs; o++) sums[o][r] = fused(low[o], a, sums[o][r]);
        for (int o = 0; o < outs; o++) sums[o][r] = fused(high[o], b, sums[o][r]);
      }
    }
  }
  if constexpr (KIND <= BFLOAT16)
    for (int64_t c = groups * m.group; c < m.in; c += LANES) {
      const int64_t count = std::min<int64_t>(LANES, m.in - c);
      for (int o = 0; o < outs; o++)
        for (int r = 0; r < rows; r++)
          sums[o][r] = fused(unpack_tail<KIND>(weight + o * row_bytes + bytes_of<KIND>(c), count),
                             unpack_tail<FLOAT32>((const uint8_t*)(x + r * m.in + c), count), sums[o][r]);
    }
  for (int o = 0; o < outs; o++)
    for (int r = 0; r < rows; r++) y[r * m.out + first + o] = sum(sums[o][r]) + (m.bias ? m.bias[first + o] : 0.0f);
}

// Rows `first` to `first + count` of the weights as float32.  → to [count, in]
template <int KIND>
void expand(const Matrix& m, int64_t first, int64_t count, float* to) {
  const int64_t groups = m.in / m.group, half = m.group / 2;
  for (int64_t o = first; o < first + count; o++, to += m.in) {
    const uint8_t* row = m.weight + o * bytes_of<KIND>(m.in);
    for (int64_t g = 0; g < groups; g++)
      for (int64_t j = 0; j < half; j += LANES) {
        Floats low, high;
        unpack<KIND>(row + bytes_of<KIND>(g * m.group), KIND >= INT8 ? m.scales[o * groups + g] : 1.0f, j, half, low,
                     high);
        store(to + g * m.group + j, low), store(to + g * m.group + j + half, high);
      }
    for (int64_t c = groups * m.group; c < m.in; c++) {
      const Floats value = unpack_tail<KIND>(row + bytes_of<KIND>(c), 1);
      to[c] = value[0];
    }
  }
}

template <int outs>
void all_rows(const Matrix& m, const float* weight, int64_t first, const float* x, int64_t rows, float* y) {
  const uint8_t* bytes = reinterpret_cast<const uint8_t*>(weight);
  int64_t r = 0;
  for (; r + ROWS <= rows; r += ROWS) products<FLOAT32, outs, ROWS>(m, bytes, first, x + r * m.in, y + r * m.out);
  for (; r < rows; r++) products<FLOAT32, outs, 1>(m, bytes, first, x + r * m.in, y + r * m.out);
}

// Rows `first` to `last` of the weights times all rows of x. Several rows of x share the expanded weights.
template <int KIND>
void part(const Matrix& m, int64_t first, int64_t last, const float* x, int64_t rows, float* y, float* expanded) {
  const int64_t row_bytes = bytes_of<KIND>(m.in);
  for (int64_t o = first; o < last;) {
    const int64_t count = last - o >= OUTS ? OUTS : 1;
    const uint8_t* weight = m.weight + o * row_bytes;
    if (rows == 1) {
      count == OUTS ? products<KIND, OUTS, 1>(m, weight, o, x, y) : products<KIND, 1, 1>(m, weight, o, x, y);
    } else {
      if (KIND != FLOAT32) expand<KIND>(m, o, count, expanded);
      const float* values = KIND == FLOAT32 ? reinterpret_cast<const float*>(weight) : expanded;
      count == OUTS ? all_rows<OUTS>(m, values, o, x, rows, y) : all_rows<1>(m, values, o, x, rows, y);
    }
    o += count;
  }
}

template <class Function>
void for_kind(int64_t kind, Function&& call) {
  switch (kind) {
    case FLOAT32: return call(std::integral_constant<int, FLOAT32>());
    case BFLOAT16: return call(std::integral_constant<int, BFLOAT16>());
    case INT8: return call(std::integral_constant<int, INT8>());
    case INT4: return call(std::integral_constant<int, INT4>());
    default: return call(std::integral_constant<int, NF4>());
  }
}

// Calls `call(first, last)` with a share of 0 to `count` for each thread, in steps of OUTS.
template <class Function>
void in_shares(int64_t count, int64_t weights, int64_t threads, Function&& call) {
  threads = std::max<int64_t>(1, std::min(threads, weights / WEIGHTS_PER_THREAD));
  const int64_t share = ((count + threads - 1) / threads + OUTS - 1) / OUTS * OUTS;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t t = 0; t < threads; t++) call(std::min(count, t * share), std::min(count, (t + 1) * share));
}

// y = x W^T + bias.  x [rows, in], y [rows, out]
extern "C" void slmkit_linear(const Matrix* m, const float* x, int64_t rows, float* y, int64_t threads) {
  for_kind(m->kind, [&](auto kind) {
    in_shares(m->out, m->out * m->in, threads, [&](int64_t first, int64_t last) {
      std::vector<float> expanded(rows > 1 && kind != FLOAT32 ? OUTS * m->in : 0);
      part<kind>(*m, first, last, x, rows, y, expanded.data());
    });
  });
}

// The weights as float32.  → to [out, in]
extern "C" void slmkit_dequantize(const Matrix* m, float* to, int64_t threads) {
  for_kind(m->kind, [&](auto kind) {
    in_shares(m->out, m->out * m->in, threads,
              [&](int64_t first, int64_t last) { expand<kind>(*m, first, last - first, to + first * m->in); });
  });
}
