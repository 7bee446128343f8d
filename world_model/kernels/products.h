// Shared code of the compiled kernels: vectors of floats, and matrix products in bf16 or float32.
// On processors that cannot multiply bf16, the right-hand side of a product can still be bf16, but
// the left-hand side is float32.
//
// `product` below computes all matrix products. Its right-hand side has a special layout: k rows
// and 16 columns are stored as [k][16] in float32, and as [k / 2][16][2] in bf16, because AMX and
// AVX512-BF16 read bf16 this way. Comments write [k / I][16][I] for both formats.

#pragma once

#include "interface.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__) && defined(__AVX512BF16__)
#define HAS_TILES
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#else
#define VECTOR_BYTES 32
#endif

typedef float Floats __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t Ints __attribute__((vector_size(VECTOR_BYTES)));
typedef uint16_t Halves __attribute__((vector_size(VECTOR_BYTES / 2)));

namespace {

constexpr int kLanes = 16;  // columns that are interleaved in the layout of a right-hand side
// Number of columns to compute in one call of `product`, as many as the widest kernel computes at
// once. The number of channels of a head is a multiple of this, and so are all widths.
constexpr int kTogether = 2 * kLanes;
constexpr int kFloats = VECTOR_BYTES / sizeof(float);
constexpr float kLog2E = 1.44269504f;

template <typename T>
class Buffer {  // uninitialised memory, aligned to a cache line; +buffer is a pointer to it
 public:
  explicit Buffer(size_t count) : bytes_(new char[count * sizeof(T) + 64]) {
    const auto address = reinterpret_cast<uintptr_t>(bytes_.get());
    first_ = reinterpret_cast<T*>((address + 63) & ~uintptr_t(63));
  }
  operator T*() const { return first_; }

 private:
  std::unique_ptr<char[]> bytes_;
  T* first_;
};

// I, the number of rows that are interleaved in the layout of a right-hand side.
template <typename Number>
constexpr int kInterleaved = sizeof(float) / sizeof(Number);

int padded(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

Floats load(const float* from) {
  Floats value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

Floats load(const bf16* from) {
  Halves value;
  std::memcpy(&value, from, sizeof(value));
  return (Floats)(__builtin_convertvector(value, Ints) << 16);
}

void store(float* to, Floats value) { std::memcpy(to, &value, sizeof(value)); }

// Round the bits of a float to bf16, to nearest with ties to even. NaNs that result from arithmetic
// stay NaN. NaNs with other payloads may become another value.
template <typename Bits>
Bits rounded(Bits bits) {
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

Halves narrow(Floats value) {
#if defined(__AVX512BF16__)
  return (Halves)_mm512_cvtneps_pbh((__m512)value);
#else
  return __builtin_convertvector(rounded((Ints)value), Halves);
#endif
}

void store(bf16* to, Floats value) {
  const Halves halves = narrow(value);
  std::memcpy(to, &halves, sizeof(halves));
}

void put(float* to, float value) { *to = value; }

void put(bf16* to, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  *to = rounded(bits);
}

float total(Floats value) {
  float sum = 0;
  for (int lane = 0; lane < kFloats; ++lane) sum += value[lane];
  return sum;
}

// Store kFloats columns of two consecutive rows in the layout of a right-hand side: [2][16] in
// float32, and [16][2] in bf16.
void store_pair(float* to, Floats even, Floats odd) {
  store(to, even);
  store(to + kLanes, odd);
}

void store_pair(bf16* to, Floats even, Floats odd) {
  const Ints first = __builtin_convertvector(narrow(even), Ints);
  const Ints pairs = first | __builtin_convertvector(narrow(odd), Ints) << 16;
  std::memcpy(to, &pairs, sizeof(pairs));
}

// Return 2^x for x >= -126. The relative error is 3e-7 in float32. In bf16 it is 8e-5, which is a
// fiftieth of the error of rounding to bf16.
template <typename Number = float>
Floats power_of_two(Floats x) {
  const Floats magic = Floats{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to whole numbers
  const Floats shifted = x + magic, part = x - (shifted - magic);
  Floats p;
  if constexpr (std::is_same_v<Number, bf16>) {
    p = 5.5171673e-2f * part + 2.4261112e-1f;
    p = p * part + 6.9326099e-1f;
    p = p * part + 9.9992807e-1f;
  } else {
    p = 1.3276473e-3f * part + 9.6755406e-3f;
    p = p * part + 5.5507132e-2f;
    p = p * part + 2.4022120e-1f;
    p = p * part + 6.9314697e-1f;
    p = p * part + 1.0000001f;
  }
  return (Floats)((Ints)p + ((Ints)shifted << 23));
}

// Return the factor that scales `count` numbers to a root mean square of 1.
float scale_of(const float* from, int count) {
  Floats squares{};
  for (int i = 0; i < count; i += kFloats) squares += load(from + i) * load(from + i);
  return 1.0f / std::sqrt(total(squares) / count + 1e-6f);
}

// Compute the RMSNorm of a row.
template <typename Number>
void norm_row(const float* from, int width, const float* gain, Number* to) {
  const float scale = scale_of(from, width);
  for (int i = 0; i < width; i += kFloats)
    store(to + i, load(from + i) * scale * load(gain + i));
}

Floats squared_relu(Floats value) {
  value = value < 0.0f ? Floats{} : value;  // NaN stays NaN
  return value * value;
}

// Rotate the pairs (i, i + channels / 2) of a row by angles with these cosines and sines. With a
// `direction` of -1, rotate backwards.
void rotate(float* row, int channels, const float* cos, const float* sin, float direction) {
  const int half = channels / 2;
  for (int i = 0; i < half; i += kFloats) {
    const Floats a = load(row + i), b = load(row + half + i);
    const Floats c = load(cos + i), s = load(sin + i) * direction;
    store(row + i, a * c - b * s);
    store(row + half + i, a * s + b * c);
  }
}

// `product` computes c [rows, columns] = a [rows, k] b [k, columns]. If kAdd, it adds the product
// to c. k is a multiple of 32. b is stored in groups of 16 columns, each of which begins `step`
// numbers after the previous group. a and c need memory for a multiple of 16 rows; the padding rows
// may contain anything.

// Products with vectors: a kernel computes at most `rows` rows and `columns` * 16 columns, whose
// sums fit into registers. It loops over the rows of the right-hand side, which are single rows in
// float32 and pairs of rows in bf16. For each of them it takes `steps` steps. A step multiplies the
// row (or pair) by the matching number (or pair) of every left-hand row and adds the results to the
// sums. `Left` is the number format of the left-hand side.
template <typename Number>
struct Kernel;

template <>
struct Kernel<float> {
  static constexpr int rows = kFloats == 16 ? 8 : 6, columns = kFloats == 16 ? 2 : 1, steps = 1;
  typedef float Left;
  static Floats right(const float* from, int) { return load(from); }
  static float left(const float* from, int step) { return from[step]; }
  static Floats added(Floats sum, Floats right, float left) { return sum + right * left; }
};

Ints load_pairs(const bf16* from) {
  Ints value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

#if defined(__AVX512BF16__)
template <>
struct Kernel<bf16> {
  static constexpr int rows = 8, columns = 2, steps = 1;  // 10 loads for 16 multiplications
  typedef bf16 Left;
  static Ints right(const bf16* from, int) { return load_pairs(from); }
  static int32_t left(const bf16* from, int) {
    int32_t pair;
    std::memcpy(&pair, from, sizeof(pair));
    return pair;
  }
  static Floats added(Floats sum, Ints right, int32_t left) {
    const __m512i pair = _mm512_set1_epi32(left);
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)right, (__m512bh)pair);
  }
};
#else
// On other processors, multiply in float32. The right-hand side is read as bf16, which is half as
// many bytes, and converted in registers: step 0 takes the even row of a pair, step 1 the odd row.
// On AVX2, this kernel is as fast as the float32 kernel.
template <>
struct Kernel<bf16> : Kernel<float> {
  static constexpr int steps = 2;
  static Floats right(const bf16* from, int step) {
    const Ints pairs = load_pairs(from);
    return (Floats)(step == 0 ? pairs << 16 : pairs & int32_t(0xffff0000));
  }
};
#endif

template <typename Number>
using Left = typename Kernel<Number>::Left;

// Compute a product of kRows rows and kColumns * 16 columns. In every iteration, prefetch memory at
// `ahead` and advance `ahead` by `ahead_step`.
template <bool kAdd, int kColumns, int kRows, typename Number>
void product_of(const Left<Number>* a, int lda, const Number* b, size_t step, int k, float* c,
                int ldc, const Number* ahead, int ahead_step) {
  constexpr int kSplit = kLanes / kFloats, kVectors = kColumns * kSplit;
  Floats sums[kRows][kVectors] = {};
  if constexpr (kAdd)
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 16
      for (int i = 0; i < kVectors; ++i)
        sums[row][i] = load(c + row * ldc + i * kFloats);
  for (int begin = 0; begin < k; begin += kInterleaved<Number>, ahead += ahead_step) {
#pragma GCC unroll 16
    for (int i = 0; i < kColumns; ++i) __builtin_prefetch(ahead + i * step, 0, 2);
#pragma GCC unroll 2
    for (int part = 0; part < Kernel<Number>::steps; ++part) {
      decltype(Kernel<Number>::right(b, part)) right[kVectors];
#pragma GCC unroll 16
      for (int i = 0; i < kVectors; ++i) {
        const Number* from = b + i / kSplit * step + begin * kLanes;
        right[i] = Kernel<Number>::right(from + i % kSplit * kFloats * kInterleaved<Number>, part);
#if defined(__AVX2__)
        // Keep the value in a register: otherwise g++ reads it from memory again for each row if
        // there are fewer than 5 rows.
        asm("" : "+v"(right[i]));
#endif
      }
#pragma GCC unroll 16
      for (int row = 0; row < kRows; ++row) {
        const auto left = Kernel<Number>::left(a + row * lda + begin, part);
#pragma GCC unroll 16
        for (int i = 0; i < kVectors; ++i)
          sums[row][i] = Kernel<Number>::added(sums[row][i], right[i], left);
      }
    }
  }
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; ++i) store(c + row * ldc + i * kFloats, sums[row][i]);
}

// Return an array of product_of functions for 1, 2, ... rows. The number of rows is a template
// parameter, because only then does the compiler keep the sums in registers.
template <typename Number, bool kAdd, int kColumns, int... kLess>
constexpr auto by_rows(std::integer_sequence<int, kLess...>) {
  return std::array{product_of<kAdd, kColumns, kLess + 1, Number>...};
}

template <bool kAdd, typename Number>
void product_by_vectors(const Left<Number>* a, int lda, const Number* b, size_t step, int columns,
                        int k, float* c, int ldc, int rows) {
  constexpr int kRows = Kernel<Number>::rows, kColumns = Kernel<Number>::columns;
  constexpr int kLine = 64 / sizeof(Number), kPage = 4096 / sizeof(Number);
  constexpr auto any = std::make_integer_sequence<int, kRows>();
  constexpr auto wide = by_rows<Number, kAdd, kColumns>(any);
  constexpr auto narrow = by_rows<Number, kAdd, 1>(any);
  const int groups = (rows + kRows - 1) / kRows;
  for (int column = 0, width; column < columns; column += width, b += width / kLanes * step) {
    width = columns - column < kColumns * kLanes ? kLanes : kColumns * kLanes;
    const auto& kernels = width == kLanes ? narrow : wide;
    const Number* const next = b + width / kLanes * step;
    for (int group = 0, row = 0, count; group < groups; ++group, row += count) {
      const int left = rows - row;
      // With fewer than 4 rows, there are too few sums to keep the processor busy. If the last
      // group would be that small, split the rows of the last two groups evenly.
      count = left > kRows && left < kRows + 4 ? (left + 1) / 2 : std::min(left, kRows);
      // The processor's own prefetching stops at the end of a page, so prefetch here. If there is a
      // single group of rows, prefetch b one page ahead. If there are several groups, the first one
      // brings b into the cache for all groups. To keep the memory busy, each group then prefetches
      // its share of the next columns.
      const size_t part = size_t(group) * k * kLanes / groups / kLine * kLine;
      kernels[count - 1](
          a + size_t(row) * lda, lda, b, step, k, c + size_t(row) * ldc + column, ldc,
          groups == 1 ? b + kPage : next + part, kLine / groups);
    }
  }
}

#if defined(HAS_TILES)

struct alignas(64) TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

struct Tiles {
  Tiles() {
    TileConfig config;
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
};

// Products with tiles: compute up to 4 tiles of c, each with 16 rows and 16 columns. They are below
// one another if kBelow, and otherwise side by side. Tile registers 0 to 3 contain the tiles of c.
// Register 4 contains the operand that all of them share: a tile of b if kBelow, and otherwise of
// a. Registers 5 and 6 take turns with tiles of the other operand. The macros exist because the
// numbers of tile registers have to be literals.
template <bool kAdd, bool kBelow, int kTiles>
void tiles_of(const bf16* a, int lda, const bf16* b, size_t step, int k, float* c, int ldc) {
  const size_t a_bytes = size_t(lda) * 2, c_bytes = size_t(ldc) * 4;
  const size_t next = kBelow ? size_t(16) * ldc : 16;
#define EACH_TILE(act)                 \
  act(0, 5)                            \
  if constexpr (kTiles > 1) act(1, 6)  \
  if constexpr (kTiles > 2) act(2, 5)  \
  if constexpr (kTiles > 3) act(3, 6)
#define BEGIN(tile, own)                                               \
  {                                                                    \
    if constexpr (kAdd) _tile_loadd(tile, c + tile * next, c_bytes);   \
    if constexpr (!kAdd) _tile_zero(tile);                             \
  }
#define MULTIPLY(tile, own)                               \
  {                                                       \
    if constexpr (kBelow) {                               \
      _tile_loadd(own, a + tile * 16 * lda, a_bytes);     \
      _tile_dpbf16ps(tile, own, 4);                       \
    } else {                                              \
      _tile_loadd(own, b + tile * step, 64);              \
      _tile_dpbf16ps(tile, 4, own);                       \
    }                                                     \
  }
#define END(tile, own) _tile_stored(tile, c + tile * next, c_bytes);
  EACH_TILE(BEGIN)
  for (int begin = 0; begin < k; begin += 32, a += 32, b += 32 * kLanes) {
    if constexpr (kBelow) _tile_loadd(4, b, 64);
    if constexpr (!kBelow) _tile_loadd(4, a, a_bytes);
    EACH_TILE(MULTIPLY)
  }
  EACH_TILE(END)
#undef EACH_TILE
#undef BEGIN
#undef MULTIPLY
#undef END
}

template <bool kAdd>
void product_by_tiles(const bf16* a, int lda, const bf16* b, size_t step, int columns, int k,
                      float* c, int ldc, int rows) {
  constexpr std::array below{tiles_of<kAdd, true, 1>, tiles_of<kAdd, true, 2>,
                             tiles_of<kAdd, true, 3>, tiles_of<kAdd, true, 4>};
  constexpr std::array beside{tiles_of<kAdd, false, 1>, tiles_of<kAdd, false, 2>,
                              tiles_of<kAdd, false, 3>, tiles_of<kAdd, false, 4>};
  if (rows <= 16) {
    for (int column = 0; column < columns; column += 64, b += 4 * step)
      beside[(std::min(columns - column, 64) - 1) / 16](a, lda, b, step, k, c + column, ldc);
    return;
  }
  for (int column = 0; column < columns; column += kLanes, b += step)
    for (int row = 0; row < rows; row += 64)
      below[(std::min(rows - row, 64) - 1) / 16](a + size_t(row) * lda, lda, b, step, k,
                                                 c + size_t(row) * ldc + column, ldc);
}

#else

struct Tiles {};

#endif

template <bool kAdd, typename Given, typename Number>
void product(const Given* a, int lda, const Number* b, size_t step, int columns, int k, float* c,
             int ldc, int rows) {
#if defined(HAS_TILES)
  if constexpr (std::is_same_v<Number, bf16>)
    product_by_tiles<kAdd>(a, lda, b, step, columns, k, c, ldc, rows);
  else
#endif
  if constexpr (std::is_same_v<Given, Left<Number>>) {
    product_by_vectors<kAdd>(a, lda, b, step, columns, k, c, ldc, rows);
  } else {  // in bf16 training, left-hand sides are bf16, so convert them to float32
    static thread_local std::vector<float> wide;
    wide.resize(size_t(rows) * k);
    for (int row = 0; row < rows; ++row)
      for (int i = 0; i < k; i += kFloats)
        store(wide.data() + size_t(row) * k + i, load(a + size_t(row) * lda + i));
    product_by_vectors<kAdd>(wide.data(), k, b, step, columns, k, c, ldc, rows);
  }
}

}  // namespace
