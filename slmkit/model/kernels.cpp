// Products and attention of a decoding step on a CPU, for a few rows at a time. `kernels.py` compiles and calls it.
//
// A decoding step reads every weight once for a few rows, so its time is that of reading and expanding them. Weights of
// FLOAT32, BFLOAT16 and NF4 are expanded to float32 in registers. For INT8 and INT4 the activations are rounded to 16
// bits by groups, and a group's products are summed as integers: half the instructions. A row's sums are added in an
// order that depends on neither the other rows nor the number of threads, so its result is the same in every batch.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef float Floats8 __attribute__((vector_size(32)));
typedef int32_t Ints8 __attribute__((vector_size(32)));
typedef int16_t Words __attribute__((vector_size(32)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));
typedef int8_t Bytes __attribute__((vector_size(LANES)));
typedef uint8_t UnsignedBytes __attribute__((vector_size(LANES)));
typedef int8_t Bytes16 __attribute__((vector_size(16)));
typedef uint8_t UnsignedBytes16 __attribute__((vector_size(16)));

enum Kind : int64_t { FLOAT32, BFLOAT16, INT8, INT4, NF4, WORDS };  // WORDS: expanded INT8 or INT4

// As `kernels.Matrix` lays it out. A row of `weight` is stored in groups of `group` values, each with one scale.
struct Matrix {
  const uint8_t* weight;  // [out, in]
  const float* scales;    // [out, in / group]
  const void* bias;       // [out] of float32 or bfloat16, or null
  int64_t kind, out, in, group, bias_is_bfloat16;
};

// Products that pay for a thread: it waits for the others several times a layer, which takes milliseconds where other
// programs run on its core. Reading a weight from memory takes about as long as four products.
constexpr int64_t PRODUCTS_PER_THREAD = 1 << 22, PRODUCTS_PER_READ = 4;
constexpr int OUTS = 4;  // weight rows at once: each reads the same x
constexpr int ROWS = 2;  // rows of x at once: each reads the same weights
constexpr int64_t AHEAD = 1024;      // bytes, between the weights that are read and those fetched from memory meanwhile
constexpr int64_t SCALES_AHEAD = 64;  // the same of scales

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

// One by one: `Vector vectors[count] = {}` becomes `rep stos`, which takes as long as dozens of products.
template <class Vector, int count>
inline void clear(Vector (&vectors)[count]) {
#pragma GCC unroll 8
  for (int i = 0; i < count; i++) vectors[i] = Vector{};
}

// a b + c with one rounding. Left to the compiler, it may round twice in one place and once in another.
inline Floats fused(Floats a, Floats b, Floats c) {
#if defined(__AVX2__) && defined(__FMA__)
  return Floats(_mm256_fmadd_ps(__m256(a), __m256(b), __m256(c)));
#elif defined(__aarch64__)
  return Floats(vfmaq_f32(float32x4_t(c), float32x4_t(a), float32x4_t(b)));
#else
  return a * b + c;
#endif
}

inline Floats8 fused8(Floats8 a, Floats8 b, Floats8 c) {
#if defined(__AVX2__) && defined(__FMA__)
  return Floats8(_mm256_fmadd_ps(__m256(a), __m256(b), __m256(c)));
#else
  return a * b + c;
#endif
}

// c + the products of a and b, each two neighbours added.
inline Ints8 multiply_add(Words a, Words b, Ints8 c) {
#if defined(__AVX2__)
  return c + Ints8(_mm256_madd_epi16(__m256i(a), __m256i(b)));
#else
  for (int i = 0; i < 8; i++) c[i] += a[2 * i] * b[2 * i] + a[2 * i + 1] * b[2 * i + 1];
  return c;
#endif
}

inline void store(float* to, Floats vector) { std::memcpy(to, &vector, sizeof vector); }

// LANES numbers as int32. The compilers' own conversion takes several times as many instructions.
template <class Narrow>
inline Ints widen(const uint8_t* from) {
#if defined(__AVX2__)
  if constexpr (std::is_same_v<Narrow, Halves>) return Ints(_mm256_cvtepu16_epi32(load<__m128i>(from)));
  if constexpr (std::is_same_v<Narrow, Bytes>) return Ints(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from)));
  return Ints(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from)));
#else
  return __builtin_convertvector(load<Narrow>(from), Ints);
#endif
}

// The sum of a vector, by halves.
template <class Vector>
inline float sum(Vector vector) {
#if defined(__AVX2__)
  if constexpr (sizeof vector == 32) {
    const __m256 v = __m256(vector);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
#endif
  float parts[sizeof vector / 4];
  std::memcpy(parts, &vector, sizeof vector);
  for (size_t half = sizeof vector / 8; half; half /= 2)
    for (size_t i = 0; i < half; i++) parts[i] += parts[i + half];
  return parts[0];
}

inline Floats look_up_nf4(Ints index) {
#if defined(__GNUC__) && !defined(__clang__)
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
  return KIND == FLOAT32                        ? 4 * values
         : KIND == BFLOAT16 || KIND == WORDS ? 2 * values
         : KIND == INT8                      ? values
                                             : values / 2;
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

// Number i of a vector of float32 or bfloat16.
inline float number(const void* vector, int64_t i, bool is_bfloat16) {
  if (!is_bfloat16) return static_cast<const float*>(vector)[i];
  const uint32_t bits = uint32_t(static_cast<const uint16_t*>(vector)[i]) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline float bias(const Matrix& m, int64_t o) { return m.bias ? number(m.bias, o, m.bias_is_bfloat16) : 0.0f; }

// y[first + o apart] = the sum of vector o, and the bias.
template <int outs, class Vector>
inline void write_sums(const Matrix& m, const Vector* vectors, int64_t first, int64_t apart, float* y) {
  float sums[outs];
#if defined(__AVX2__)
  if constexpr (outs == 4) {  // as `sum`, four at once
    __m128 v[4];
    for (int o = 0; o < 4; o++)
      v[o] = _mm_add_ps(_mm256_castps256_ps128(__m256(vectors[o])), _mm256_extractf128_ps(__m256(vectors[o]), 1));
    const __m128 low = _mm_add_ps(_mm_unpacklo_ps(v[0], v[1]), _mm_unpackhi_ps(v[0], v[1]));
    const __m128 high = _mm_add_ps(_mm_unpacklo_ps(v[2], v[3]), _mm_unpackhi_ps(v[2], v[3]));
    _mm_storeu_ps(sums, _mm_add_ps(_mm_movelh_ps(low, high), _mm_movehl_ps(high, low)));
  } else
#endif
    for (int o = 0; o < outs; o++) sums[o] = sum(vectors[o]);
  if (apart == 1 && !m.bias) return void(std::memcpy(y + first, sums, sizeof sums));
  for (int o = 0; o < outs; o++) y[first + o * apart] = sums[o] + bias(m, first + o * apart);
}

// y[r, o] = x[r] · w[o] for `rows` rows of x, and `outs` rows of weights, from `first` on, each `apart` rows from the
// one before. They are at `weight` and each `bytes_apart` behind the one before.  x [rows, in], y [rows, out]
template <int KIND, int outs, int rows>
void products(const Matrix& m, const uint8_t* weight, int64_t first, int64_t apart, int64_t bytes_apart, const float* x,
              float* y) {
  const int64_t groups = m.in / m.group, half = m.group / 2;
  const float* scales = m.scales + (KIND >= INT8 ? first * groups : 0);
  Floats sums[rows][outs];
  for (auto& of_row : sums) clear(of_row);
  for (int64_t g = 0; g < groups; g++) {
    const uint8_t* group = weight + bytes_of<KIND>(g * m.group);
    const float* read = x + g * m.group;
    if (rows == 1)
      for (int o = 0; o < outs; o++)
        for (int64_t i = 0; i < bytes_of<KIND>(32); i += 64) __builtin_prefetch(group + o * bytes_apart + i + AHEAD);
    for (int64_t j = 0; j < half; j += LANES) {
      Floats low[outs], high[outs];
      for (int o = 0; o < outs; o++)
        unpack<KIND>(group + o * bytes_apart, KIND >= INT8 ? scales[o * apart * groups + g] : 1.0f, j, half, low[o],
                     high[o]);
      for (int r = 0; r < rows; r++) {
        const Floats a = load<Floats>(read + r * m.in + j), b = load<Floats>(read + r * m.in + j + half);
        for (int o = 0; o < outs; o++) sums[r][o] = fused(low[o], a, sums[r][o]);
        for (int o = 0; o < outs; o++) sums[r][o] = fused(high[o], b, sums[r][o]);
      }
    }
  }
  if constexpr (KIND <= BFLOAT16)
    for (int64_t c = groups * m.group; c < m.in; c += LANES) {
      const int64_t count = std::min<int64_t>(LANES, m.in - c);
      for (int o = 0; o < outs; o++)
        for (int r = 0; r < rows; r++)
          sums[r][o] = fused(unpack_tail<KIND>(weight + o * bytes_apart + bytes_of<KIND>(c), count),
                             unpack_tail<FLOAT32>((const uint8_t*)(x + r * m.in + c), count), sums[r][o]);
    }
  for (int r = 0; r < rows; r++) write_sums<outs>(m, sums[r], first, apart, y + r * m.out);
}

// The integers j to j + 15 and j + half to j + half + 15 of a group.
template <int KIND>
inline void unpack_words(const uint8_t* group, int64_t j, int64_t half, Words& low, Words& high) {
  if constexpr (KIND == WORDS) {
    low = load<Words>(group + 2 * j), high = load<Words>(group + 2 * (j + half));
#if defined(__AVX2__)
  } else if constexpr (KIND == INT8) {
    low = Words(_mm256_cvtepi8_epi16(load<__m128i>(group + j)));
    high = Words(_mm256_cvtepi8_epi16(load<__m128i>(group + j + half)));
  } else {
    const __m256i bytes = _mm256_cvtepu8_epi16(load<__m128i>(group + j));
    low = (Words(bytes) & 15) - 8, high = Words(_mm256_srli_epi16(bytes, 4)) - 8;
#else
  } else if constexpr (KIND == INT8) {
    low = __builtin_convertvector(load<Bytes16>(group + j), Words);
    high = __builtin_convertvector(load<Bytes16>(group + j + half), Words);
  } else {
    const Words bytes = __builtin_convertvector(load<UnsignedBytes16>(group + j), Words);
    low = (bytes & 15) - 8, high = (bytes >> 4) - 8;
#endif
  }
}

// Rows of x as integers of 16 bits, by groups of the weights: x[j] is about values[j] * scale.
struct Rounded {
  std::vector<int16_t> values;   // [rows, in]
  std::vector<float> scales;     // [rows, in / group]

  Rounded(const Matrix& m, const float* x, int64_t rows)
      : values(rows * m.in), scales(rows * (m.in / m.group)) {
    for (size_t g = 0; g < scales.size(); g++, x += m.group) {
      float largest = 0, total = 0;
      for (int64_t j = 0; j < m.group; j++) largest = std::max(largest, std::fabs(x[j])), total += std::fabs(x[j]);
      const float inverse = largest > 0 ? 32767 / largest : 0;
      for (int64_t j = 0; j < m.group; j++) values[g * m.group + j] = int16_t(std::nearbyint(x[j] * inverse));
      scales[g] = std::isfinite(total) ? largest / 32767 : NAN;  // one that is not finite makes all results NaN
    }
  }
};

// As `products`, by integers, of INT8, INT4 and WORDS, and for row number `row` of x.
template <int KIND, int GROUP, int outs>
void integer_products(const Matrix& m, const uint8_t* weight, int64_t first, int64_t apart, int64_t bytes_apart,
                      const Rounded& x, int64_t row, float* y) {
  constexpr int64_t half = GROUP / 2, group_bytes = bytes_of<KIND>(GROUP);
  const int64_t groups = m.in / GROUP;
  const int16_t* values = x.values.data() + row * m.in;
  const float *scales = m.scales + first * groups, *x_scales = x.scales.data() + row * groups;
  if (KIND != WORDS)
    for (int o = 0; o < outs; o++)
      for (int64_t g = 0; g < groups; g += 16) __builtin_prefetch(scales + o * apart * groups + g + SCALES_AHEAD);
  Floats8 sums[outs];
  clear(sums);
  for (int64_t g = 0; g < groups; g++, values += GROUP) {
    Ints8 group[outs];
    clear(group);
    for (int64_t j = 0; j < half; j += 16) {
      const Words a = load<Words>(values + j), b = load<Words>(values + j + half);
      for (int o = 0; o < outs; o++) {
        Words low, high;
        unpack_words<KIND>(weight + o * bytes_apart + g * group_bytes, j, half, low, high);
        group[o] = multiply_add(high, b, multiply_add(low, a, group[o]));
      }
    }
    for (int o = 0; o < outs; o++) {
      if (KIND != WORDS && g * group_bytes % 64 == 0)
        __builtin_prefetch(weight + o * bytes_apart + g * group_bytes + AHEAD);
      const float scale = scales[o * apart * groups + g] * x_scales[g];
      const Floats8 scale8 = {scale, scale, scale, scale, scale, scale, scale, scale};
      sums[o] = fused8(__builtin_convertvector(group[o], Floats8), scale8, sums[o]);
    }
  }
  write_sums<outs>(m, sums, first, apart, y);
}

template <int KIND>
void expand_words(const Matrix& m, int64_t first, int64_t count, int16_t* to) {
  const int64_t groups = m.in / m.group, half = m.group / 2;
  for (int64_t g = first * groups; g < (first + count) * groups; g++, to += m.group)
    for (int64_t j = 0; j < half; j += 16) {
      Words low, high;
      unpack_words<KIND>(m.weight + bytes_of<KIND>(g * m.group), j, half, low, high);
      std::memcpy(to + j, &low, sizeof low), std::memcpy(to + j + half, &high, sizeof high);
    }
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

// `outs` rows of the weights, `apart` rows apart, times all rows of x. Several rows of x share the expanded weights.
template <int KIND, int GROUP, int outs>
void all_rows(const Matrix& m, int64_t first, int64_t apart, const float* x, const Rounded* rounded, int64_t rows,
              float* y, float* expanded) {
  const int64_t row_bytes = bytes_of<KIND>(m.in), bytes_apart = apart * row_bytes;
  const uint8_t* weight = m.weight + first * row_bytes;
  if constexpr (KIND == INT8 || KIND == INT4) {
    if (rows == 1) return integer_products<KIND, GROUP, outs>(m, weight, first, apart, bytes_apart, *rounded, 0, y);
    for (int o = 0; o < outs; o++)
      expand_words<KIND>(m, first + o * apart, 1, reinterpret_cast<int16_t*>(expanded) + o * m.in);
    const uint8_t* shared = reinterpret_cast<const uint8_t*>(expanded);
    for (int64_t r = 0; r < rows; r++)
      integer_products<WORDS, GROUP, outs>(m, shared, first, apart, 2 * m.in, *rounded, r, y + r * m.out);
  } else {
    if (rows == 1) return products<KIND, outs, 1>(m, weight, first, apart, bytes_apart, x, y);
    if (KIND != FLOAT32)
      for (int o = 0; o < outs; o++) expand<KIND>(m, first + o * apart, 1, expanded + o * m.in);
    const uint8_t* shared = KIND == FLOAT32 ? weight : reinterpret_cast<const uint8_t*>(expanded);
    const int64_t between = KIND == FLOAT32 ? bytes_apart : 4 * m.in;
    constexpr int at_once = outs == OUTS ? ROWS : 1;
    int64_t r = 0;
    for (; r + at_once <= rows; r += at_once)
      products<FLOAT32, outs, at_once>(m, shared, first, apart, between, x + r * m.in, y + r * m.out);
    for (; r < rows; r++)
      products<FLOAT32, outs, 1>(m, shared, first, apart, between, x + r * m.in, y + r * m.out);
  }
}

template <class Function>
void for_group(int64_t group, Function&& call) {
  if (group == 32) return call(std::integral_constant<int, 32>());
  if (group == 64) return call(std::integral_constant<int, 64>());
  return call(std::integral_constant<int, 128>());
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

// Calls `call(thread, threads)` on each of up to `threads` threads.
template <class Function>
void on_threads(int64_t threads, Function&& call) {
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
  call(int64_t(omp_get_thread_num()), int64_t(omp_get_num_threads()));
#else
  call(int64_t(0), int64_t(1));
#endif
}

inline void wait_for_all() {
#ifdef _OPENMP
#pragma omp barrier
#endif
}

// The share of a thread in `count`, in multiples of OUTS.
struct Share {
  int64_t first, last;

  Share(int64_t count, int64_t thread, int64_t threads) {
    const int64_t size = ((count + threads - 1) / threads + OUTS - 1) / OUTS * OUTS;
    first = std::min(count, thread * size), last = std::min(count, first + size);
  }
};

// One thread's share of y = x W^T + bias.  x [rows, in], y [rows, out]
void multiply(const Matrix& m, const float* x, int64_t rows, float* y, int64_t thread, int64_t threads) {
  Share share(m.out, thread, threads);
  for_kind(m.kind, [&](auto kind) {
    constexpr bool by_integers = kind == INT8 || kind == INT4;
    const Rounded rounded(m, x, by_integers ? rows : 0);
    std::vector<float> expanded(rows > 1 && kind != FLOAT32 ? OUTS * m.in : 0);
    for_group(by_integers ? m.group : 32, [&](auto group) {
      // For one row each of OUTS streams of weights is read from its beginning to its end, which is how memory is
      // fastest. For several rows neighbours are computed together, whose results are written together.
      const int64_t times = (share.last - share.first) / OUTS, apart = rows == 1 ? times : 1;
      for (int64_t i = 0; i < times; i++)
        all_rows<kind, group, OUTS>(m, share.first + (rows == 1 ? i : OUTS * i), apart, x, &rounded, rows, y,
                                    expanded.data());
      for (int64_t o = share.first + OUTS * times; o < share.last; o++)
        all_rows<kind, group, 1>(m, o, 0, x, &rounded, rows, y, expanded.data());
    });
  });
}

inline int64_t useful_threads(int64_t weights, int64_t rows, int64_t threads) {
  return std::max<int64_t>(1, std::min(threads, weights * (rows + PRODUCTS_PER_READ) / PRODUCTS_PER_THREAD));
}

// y = x W^T + bias.  x [rows, in], y [rows, out]
extern "C" void slmkit_linear(const Matrix* m, const float* x, int64_t rows, float* y, int64_t threads) {
  on_threads(useful_threads(m->out * m->in, rows, threads), [&](int64_t t, int64_t count) { multiply(*m, x, rows, y, t, count); });
}

// The weights as float32.  → to [out, in]
extern "C" void slmkit_dequantize(const Matrix* m, float* to, int64_t threads) {
  on_threads(useful_threads(m->out * m->in, 0, threads), [&](int64_t thread, int64_t count) {
    const Share share(m->out, thread, count);
    for_kind(m->kind, [&](auto kind) {
      expand<kind>(*m, share.first, share.last - share.first, to + share.first * m->in);
    });
  });
}

enum NormKind : int64_t { NO_NORM, RMS, LAYER };
enum Activation : int64_t { SILU, GELU, GELU_TANH, RELU, RELU_SQUARED };

struct Norm {
  const void *weight, *bias;  // [size] of float32 or bfloat16
  int64_t kind, size;
  double eps, offset;  // offset: added to the weight
  int64_t is_bfloat16;
};

// A layer of the decoder, as `decoder.Block` computes it. Matrices and norms that it lacks are zeros.
struct Block {
  Norm attention_in, query_norm, key_norm, attention_out, mlp_in, mlp_out;
  Matrix query, key, value, out, gate, up, down;
  uint8_t *keys, *values;         // the cache: [rows, kv_heads, columns, head_dim], position p in column p % columns
  const float *cosines, *sines;  // [positions, head_dim], or null
  int64_t heads, kv_heads, head_dim, window, columns, cache_is_bfloat16, activation;
  double scale, cap;  // cap: 0 for none
};

inline Floats exponential(Floats x) {
  x = x < -87.0f ? Floats{} - 87.0f : x, x = x > 88.0f ? Floats{} + 88.0f : x;  // NaN stays NaN
  const Floats n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // rounded to a whole number
  const Floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;  // Cephes' polynomial
  p = p * r + 8.3334519073e-3f, p = p * r + 4.1665795894e-2f, p = p * r + 1.6666665459e-1f, p = p * r + 0.5f;
  const Ints power = (__builtin_convertvector(n, Ints) + 127) << 23;
  return (p * r * r + r + 1.0f) * Floats(power);
}

// values[i] = exp(values[i] - largest); returns their sum.
float exponentials(float* values, int64_t count, float largest) {
  for (int64_t i = 0; i < count; i += LANES) {
    Floats part = Floats{} - 1e9f;
    const int64_t rest = std::min<int64_t>(LANES, count - i);
    std::memcpy(&part, values + i, 4 * rest);
    part = exponential(part - largest);
    std::memcpy(values + i, &part, 4 * rest);
  }
  float total = 0;
  for (int64_t i = 0; i < count; i++) total += values[i];
  return total;
}

// The sum of `of(x)` over x [count].
template <class Function>
float total(const float* x, int64_t count, Function&& of) {
  Floats sums = {};
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) sums += of(load<Floats>(x + i));
  float rest = 0;
  for (; i < count; i++) rest += of(Floats{} + x[i])[0];
  return sum(sums) + rest;
}

// One of several equal parts of `size` values whose norm is taken over all of them; `of`: where the whole begins.
void normalize(const Norm& norm, const float* of, int64_t from, int64_t count, float* to) {
  if (norm.kind == NO_NORM) {
    if (to != of + from) std::memcpy(to, of + from, 4 * count);
    return;
  }
  const float mean = norm.kind == LAYER ? total(of, norm.size, [](Floats x) { return x; }) / norm.size : 0;
  const float square = total(of, norm.size, [&](Floats x) { return (x - mean) * (x - mean); });
  const float inverse = 1 / std::sqrt(square / norm.size + float(norm.eps)), offset = norm.offset;
  const auto scaled = [&](auto is_bfloat16) {
    for (int64_t i = 0; i < count; i++) {
      const float weight = number(norm.weight, from + i, is_bfloat16) + offset;
      to[i] = (of[from + i] - mean) * inverse * weight + (norm.bias ? number(norm.bias, from + i, is_bfloat16) : 0.0f);
    }
  };
  norm.is_bfloat16 ? scaled(std::true_type()) : scaled(std::false_type());
}

// A head of a query or key [head_dim]: normalised alone or with all heads, then rotated.
void prepare_head(const Block& b, const Norm& norm, const float* all, int64_t head, int64_t position, float* to) {
  const int64_t dim = b.head_dim, half = dim / 2, start = head * dim;
  if (norm.size == dim) normalize(norm, all + start, 0, dim, to);
  else normalize(norm, all, start, dim, to);
  if (!b.cosines) return;
  const float *cosines = b.cosines + position * dim, *sines = b.sines + position * dim;
  for (int64_t i = 0; i < half; i++) {
    const float first = to[i], second = to[i + half];
    to[i] = first * cosines[i] - second * sines[i];
    to[i + half] = second * cosines[i + half] + first * sines[i + half];
  }
}

void activate(int64_t activation, float* x, const float* up, int64_t count) {
  for (int64_t i = 0; i < count; i += LANES) {
    float part[LANES] = {};
    const int64_t rest = std::min<int64_t>(LANES, count - i);
    std::memcpy(part, x + i, 4 * rest);
    if (activation == SILU) {
      const Floats value = load<Floats>(part);
      store(part, value / (1.0f + exponential(-value)));
    }
    for (int64_t j = 0; j < rest; j++) {
      const float v = part[j];
      if (activation == GELU) part[j] = 0.5f * v * (1 + std::erf(v * 0.70710678f));
      if (activation == GELU_TANH) part[j] = 0.5f * v * (1 + std::tanh(0.79788456f * (v + 0.044715f * v * v * v)));
      if (activation == RELU) part[j] = v < 0 ? 0 : v;
      if (activation == RELU_SQUARED) part[j] = v < 0 ? 0 : v * v;
      x[i + j] = up ? part[j] * up[i + j] : part[j];
    }
  }
}

template <bool IS_BFLOAT16>
inline Floats cached(const uint8_t* row, int64_t i) {
  if constexpr (IS_BFLOAT16) return Floats(widen<Halves>(row + 2 * i) << 16);
  return load<Floats>(row + 4 * i);
}

inline float cached_one(const uint8_t* row, int64_t i, bool is_bfloat16) {
  return is_bfloat16 ? unpack_tail<BFLOAT16>(row + 2 * i, 1)[0] : unpack_tail<FLOAT32>(row + 4 * i, 1)[0];
}

void write_cached(uint8_t* to, const float* from, int64_t count, bool is_bfloat16) {
  if (!is_bfloat16) return void(std::memcpy(to, from, 4 * count));
  for (int64_t i = 0; i < count; i++) {
    uint32_t bits;
    std::memcpy(&bits, from + i, 4);
    const bool is_nan = from[i] != from[i];
    const uint16_t rounded = is_nan ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // to nearest, ties to even
    std::memcpy(to + 2 * i, &rounded, 2);
  }
}

// softmax(scale q·k) v of some heads of one token, which share keys and values.  q, y [heads, head_dim]
template <bool IS_BFLOAT16>
void attend(const Block& b, const uint8_t* keys, const uint8_t* values, int64_t position, const float* q, int64_t heads,
            float* y, std::vector<float>& scores) {
  const int64_t dim = b.head_dim, whole = dim / LANES * LANES, row_bytes = dim * (IS_BFLOAT16 ? 2 : 4);
  const int64_t start = b.window ? std::max<int64_t>(0, position + 1 - b.window) : 0, count = position + 1 - start;
  const int64_t first = start % b.columns;
  scores.resize(std::max<size_t>(scores.size(), heads * count));
  for (int64_t p = 0, column = first; p < count; p++, column = column + 1 == b.columns ? 0 : column + 1) {
    const uint8_t* key = keys + column * row_bytes;
    for (int64_t h = 0; h < heads; h++) {
      Floats sums = {};
      for (int64_t i = 0; i < whole; i += LANES)
        sums = fused(load<Floats>(q + h * dim + i), cached<IS_BFLOAT16>(key, i), sums);
      float score = sum(sums);
      for (int64_t i = whole; i < dim; i++) score += q[h * dim + i] * cached_one(key, i, IS_BFLOAT16);
      score *= float(b.scale);
      scores[h * count + p] = b.cap ? float(b.cap) * std::tanh(score / float(b.cap)) : score;
    }
  }
  for (int64_t h = 0; h < heads; h++) {
    float *weights = &scores[h * count], largest = weights[0];
    for (int64_t p = 1; p < count; p++) largest = std::max(largest, weights[p]);
    const float inverse = 1 / exponentials(weights, count, largest);
    for (int64_t p = 0; p < count; p++) weights[p] *= inverse;
  }
  for (int64_t h = 0; h < heads; h++) {
    const float* weights = &scores[h * count];
    for (int64_t i = 0; i < whole; i += 4 * LANES) {
      Floats sums[4];
      clear(sums);
      const int64_t parts = std::min<int64_t>(4, (whole - i) / LANES);
      for (int64_t p = 0, column = first; p < count; p++, column = column + 1 == b.columns ? 0 : column + 1)
        for (int64_t j = 0; j < parts; j++)
          sums[j] =
              fused(Floats{} + weights[p], cached<IS_BFLOAT16>(values + column * row_bytes, i + j * LANES), sums[j]);
      for (int64_t j = 0; j < parts; j++) store(y + h * dim + i + j * LANES, sums[j]);
    }
    for (int64_t i = whole; i < dim; i++) {
      float sum = 0;
      for (int64_t p = 0, column = first; p < count; p++, column = column + 1 == b.columns ? 0 : column + 1)
        sum += weights[p] * cached_one(values + column * row_bytes, i, IS_BFLOAT16);
      y[h * dim + i] = sum;
    }
  }
}

// What the threads of a decoding step share.  [tokens, …]
struct Shared {
  std::vector<float> q, k, v, y, out, inner, up, down;
};

// Keys and values of new tokens into the cache, then attention of each token.  q, k, v → y
void attention(const Block& b, Shared& s, const int64_t* lengths, int64_t rows, int64_t fresh, int64_t thread,
               int64_t threads) {
  const int64_t dim = b.head_dim, shared_by = b.heads / b.kv_heads, bytes = b.cache_is_bfloat16 ? 2 : 4;
  const int64_t row_bytes = dim * bytes, head_bytes = b.columns * row_bytes;
  std::vector<float> head(b.heads * dim), scores;
  for (int64_t task = thread; task < rows * fresh * b.kv_heads; task += threads) {
    const int64_t token = task / b.kv_heads, h = task % b.kv_heads, row = token / fresh;
    const int64_t position = lengths[row] + token % fresh;
    const int64_t place = (row * b.kv_heads + h) * head_bytes + position % b.columns * row_bytes;
    prepare_head(b, b.key_norm, &s.k[token * b.kv_heads * dim], h, position, head.data());
    write_cached(b.keys + place, head.data(), dim, b.cache_is_bfloat16);
    write_cached(b.values + place, &s.v[(token * b.kv_heads + h) * dim], dim, b.cache_is_bfloat16);
  }
  wait_for_all();
  const int64_t at_once = rows * fresh * b.kv_heads >= threads ? shared_by : 1;  // heads of a task
  for (int64_t task = thread; task < rows * fresh * b.heads / at_once; task += threads) {
    const int64_t token = task * at_once / b.heads, first = task * at_once % b.heads, row = token / fresh;
    const int64_t position = lengths[row] + token % fresh, place = (row * b.kv_heads + first / shared_by) * head_bytes;
    for (int64_t h = 0; h < at_once; h++)
      prepare_head(b, b.query_norm, &s.q[token * b.heads * dim], first + h, position, &head[h * dim]);
    float* y = &s.y[(token * b.heads + first) * dim];
    (b.cache_is_bfloat16 ? attend<true> : attend<false>)(b, b.keys + place, b.values + place, position, head.data(),
                                                         at_once, y, scores);
  }
}

// x += norm(part), which every thread computes for itself.
void add(const Norm& norm, const float* part, int64_t tokens, int64_t width, std::vector<float>& x,
         std::vector<float>& h) {
  for (int64_t t = 0; t < tokens; t++) {
    normalize(norm, part + t * width, 0, width, h.data());
    for (int64_t i = 0; i < width; i++) x[t * width + i] += h[i];
  }
}

// New tokens through all blocks and the last norm. x [rows, fresh, width], replaced by hidden states; lengths [rows]:
// the positions that the cache holds.
extern "C" void slmkit_decode(const Block* blocks, int64_t count, const Norm* last, float* whole, int64_t width,
                              const int64_t* lengths, int64_t rows, int64_t fresh, int64_t threads) {
  const int64_t tokens = rows * fresh;
  Shared s;
  int64_t weights = 0;  // of a layer, the most
  for (const Block* b = blocks; b < blocks + count; b++) {
    s.q.resize(std::max<size_t>(s.q.size(), tokens * b->query.out)), s.y.resize(s.q.size());
    s.k.resize(std::max<size_t>(s.k.size(), tokens * b->key.out)), s.v.resize(s.k.size());
    s.inner.resize(std::max<size_t>(s.inner.size(), tokens * b->up.out)), s.up.resize(s.inner.size());
    const int64_t of_layer = (b->query.out + b->key.out + b->value.out) * width + b->out.out * b->out.in +
                             (b->gate.out + b->up.out) * width + b->down.out * b->down.in;
    weights = std::max(weights, of_layer);
  }
  s.out.resize(tokens * width), s.down.resize(tokens * width);
  on_threads(useful_threads(weights, tokens, threads), [&](int64_t thread, int64_t of) {
    std::vector<float> x(whole, whole + tokens * width), h(tokens * width);  // every thread's own
    const auto norm_all = [&](const Norm& norm) {
      for (int64_t t = 0; t < tokens; t++) normalize(norm, &x[t * width], 0, width, &h[t * width]);
    };
    wait_for_all();
    for (const Block* b = blocks; b < blocks + count; b++) {
      norm_all(b->attention_in);
      multiply(b->query, h.data(), tokens, s.q.data(), thread, of);
      multiply(b->key, h.data(), tokens, s.k.data(), thread, of);
      multiply(b->value, h.data(), tokens, s.v.data(), thread, of);
      wait_for_all();
      attention(*b, s, lengths, rows, fresh, thread, of);
      wait_for_all();
      multiply(b->out, s.y.data(), tokens, s.out.data(), thread, of);
      wait_for_all();
      add(b->attention_out, s.out.data(), tokens, width, x, h);
      norm_all(b->mlp_in);
      const bool is_gated = b->gate.weight;
      if (is_gated) multiply(b->up, h.data(), tokens, s.up.data(), thread, of);
      multiply(is_gated ? b->gate : b->up, h.data(), tokens, s.inner.data(), thread, of);
      const Share share(b->up.out, thread, of);
      for (int64_t t = 0; t < tokens; t++) {
        const int64_t from = t * b->up.out + share.first;
        activate(b->activation, &s.inner[from], is_gated ? &s.up[from] : nullptr, share.last - share.first);
      }
      wait_for_all();
      multiply(b->down, s.inner.data(), tokens, s.down.data(), thread, of);
      wait_for_all();
      add(b->mlp_out, s.down.data(), tokens, width, x, h);
    }
    if (thread == 0)
      for (int64_t t = 0; t < tokens; t++) normalize(*last, &x[t * width], 0, width, whole + t * width);
  });
}
