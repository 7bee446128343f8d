// What the compiled parts of the world model share: vectors of 16 floats, and products in bf16.
//
// Every matrix product is `product` below, on matrices that are laid out for it: a right-hand side
// of k rows and 16 columns as [k / 2][16][2], which AMX and AVX512-BF16 read as it is.

#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <utility>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

typedef uint16_t bf16;
typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));

namespace {

constexpr int kLanes = 16;
constexpr float kLog2E = 1.44269504f;

class Lines {  // memory that begins with a cache line, with whatever in it
 public:
  explicit Lines(size_t bytes) : bytes_(new char[bytes + 64]) {}
  template <typename T>
  T* as() const {
    return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(bytes_.get()) + 63) & ~uintptr_t(63));
  }

 private:
  std::unique_ptr<char[]> bytes_;
};

int padded(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

bf16 rounded(float value) {  // to nearest, ties to even; there are no NaNs
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

Floats load(const float* from) {
  Floats value;
  std::memcpy(&value, from, 64);
  return value;
}

void store(float* to, Floats value) { std::memcpy(to, &value, 64); }

float total(Floats value) {
  float sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += value[lane];
  return sum;
}

Floats load(const bf16* from) {
  Ints bits;
  for (int lane = 0; lane < kLanes; ++lane) bits[lane] = int32_t(uint32_t(from[lane]) << 16);
  return (Floats)bits;
}

void store_rounded(bf16* to, Floats value) {
#if defined(__AVX512BF16__)
  __m256bh narrow = _mm512_cvtneps_pbh((__m512)value);
  std::memcpy(to, &narrow, 32);
#else
  for (int lane = 0; lane < kLanes; ++lane) to[lane] = rounded(value[lane]);
#endif
}

// Two rows of a right-hand side: [16][2].
void store_pair(bf16* to, Floats even, Floats odd) {
#if defined(__AVX512BF16__)
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512bh both = _mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
  const __m512i paired = _mm512_permutexvar_epi16(order, (__m512i)both);
  std::memcpy(to, &paired, 64);
#else
  for (int lane = 0; lane < kLanes; ++lane) {
    to[2 * lane] = rounded(even[lane]);
    to[2 * lane + 1] = rounded(odd[lane]);
  }
#endif
}

// 2^x for x of at least -126, to 3e-6 of it.
Floats power_of_two(Floats x) {
  const Floats magic = Floats{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to whole numbers
  const Floats shifted = x + magic;
  const Floats part = x - (shifted - magic);
  Floats p = 9.5700877e-3f * part + 5.5917859e-2f;
  p = p * part + 2.4024745e-1f;
  p = p * part + 6.9312181e-1f;
  p = p * part + 9.9999926e-1f;
  return (Floats)((Ints)p + ((Ints)shifted << 23));
}

// What brings `count` numbers to a root mean square of 1.
float scale_of(const float* from, int count) {
  Floats squares{};
  for (int i = 0; i < count; i += kLanes) squares += load(from + i) * load(from + i);
  return 1.0f / std::sqrt(total(squares) / count + 1e-6f);
}

// RMSNorm of a row into bf16.
void norm_row(const float* from, int width, const float* gain, bf16* to) {
  const float scale = scale_of(from, width);
  for (int i = 0; i < width; i += kLanes)
    store_rounded(to + i, load(from + i) * scale * load(gain + i));
}

Floats squared_relu(Floats value) {
  value = value < 0.0f ? Floats{} : value;  // what is not a number stays it
  return value * value;
}

// Turn the pairs (i, i + channels / 2) of a row by angles, from their cosines and sines.
void rotate(float* row, int channels, const float* cos, const float* sin, float direction) {
  const int half = channels / 2;
  for (int i = 0; i < half; i += kLanes) {
    const Floats a = load(row + i), b = load(row + half + i);
    const Floats c = load(cos + i), s = load(sin + i) * direction;
    store(row + i, a * c - b * s);
    store(row + half + i, a * s + b * c);
  }
}

// `product`: c [rows, columns] (+)= a [rows, k] b [k, columns], where each 16 columns of b begin
// `step` after those before, and k is a multiple of 32. Rows of a and c are there, with whatever in
// them, up to the next multiple of 16.
#if defined(__AMX_BF16__)

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

// Of 16 to 64 rows and 16 columns: tiles 0 to 3 are of c, 4 is of a, 5 of b. A tile's number has
// to be a literal.
template <bool kAdd, int kBlocks>
void product_of(const bf16* a, int lda, const bf16* b, int k, float* c, int ldc) {
  const size_t a_bytes = size_t(lda) * 2, c_bytes = size_t(ldc) * 4;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  if constexpr (kAdd) {
    _tile_loadd(0, c, c_bytes);
    if constexpr (kBlocks > 1) _tile_loadd(1, c + 16 * ldc, c_bytes);
    if constexpr (kBlocks > 2) _tile_loadd(2, c + 32 * ldc, c_bytes);
    if constexpr (kBlocks > 3) _tile_loadd(3, c + 48 * ldc, c_bytes);
  }
  for (int begin = 0; begin < k; begin += 32, a += 32, b += 32 * kLanes) {
    _tile_loadd(5, b, 64);
    _tile_loadd(4, a, a_bytes);
    _tile_dpbf16ps(0, 4, 5);
    if constexpr (kBlocks > 1) {
      _tile_loadd(4, a + 16 * lda, a_bytes);
      _tile_dpbf16ps(1, 4, 5);
    }
    if constexpr (kBlocks > 2) {
      _tile_loadd(4, a + 32 * lda, a_bytes);
      _tile_dpbf16ps(2, 4, 5);
    }
    if constexpr (kBlocks > 3) {
      _tile_loadd(4, a + 48 * lda, a_bytes);
      _tile_dpbf16ps(3, 4, 5);
    }
  }
  _tile_stored(0, c, c_bytes);
  if constexpr (kBlocks > 1) _tile_stored(1, c + 16 * ldc, c_bytes);
  if constexpr (kBlocks > 2) _tile_stored(2, c + 32 * ldc, c_bytes);
  if constexpr (kBlocks > 3) _tile_stored(3, c + 48 * ldc, c_bytes);
}

template <bool kAdd>
void product_rows(const bf16* a, int lda, const bf16* b, int k, float* c, int ldc, int rows) {
  for (; rows > 0; rows -= 64, a += size_t(64) * lda, c += size_t(64) * ldc) {
    if (rows <= 16)
      product_of<kAdd, 1>(a, lda, b, k, c, ldc);
    else if (rows <= 32)
      product_of<kAdd, 2>(a, lda, b, k, c, ldc);
    else if (rows <= 48)
      product_of<kAdd, 3>(a, lda, b, k, c, ldc);
    else
      product_of<kAdd, 4>(a, lda, b, k, c, ldc);
  }
}

// Of at most 16 rows and 16 to 64 columns, of which each 16 have a right-hand side of their own.
template <bool kAdd, int kColumns>
void columns_of(const bf16* a, int lda, const bf16* b, size_t step, int k, float* c, int ldc) {
  const size_t a_bytes = size_t(lda) * 2, c_bytes = size_t(ldc) * 4;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  if constexpr (kAdd) {
    _tile_loadd(0, c, c_bytes);
    if constexpr (kColumns > 1) _tile_loadd(1, c + 16, c_bytes);
    if constexpr (kColumns > 2) _tile_loadd(2, c + 32, c_bytes);
    if constexpr (kColumns > 3) _tile_loadd(3, c + 48, c_bytes);
  }
  for (int begin = 0; begin < k; begin += 32, a += 32, b += 32 * kLanes) {
    _tile_loadd(4, a, a_bytes);
    _tile_loadd(5, b, 64);
    _tile_dpbf16ps(0, 4, 5);
    if constexpr (kColumns > 1) {
      _tile_loadd(6, b + step, 64);
      _tile_dpbf16ps(1, 4, 6);
    }
    if constexpr (kColumns > 2) {
      _tile_loadd(5, b + 2 * step, 64);
      _tile_dpbf16ps(2, 4, 5);
    }
    if constexpr (kColumns > 3) {
      _tile_loadd(6, b + 3 * step, 64);
      _tile_dpbf16ps(3, 4, 6);
    }
  }
  _tile_stored(0, c, c_bytes);
  if constexpr (kColumns > 1) _tile_stored(1, c + 16, c_bytes);
  if constexpr (kColumns > 2) _tile_stored(2, c + 32, c_bytes);
  if constexpr (kColumns > 3) _tile_stored(3, c + 48, c_bytes);
}

template <bool kAdd>
void product(const bf16* a, int lda, const bf16* b, size_t step, int columns, int k, float* c,
             int ldc, int rows) {
  if (rows > 16) {
    for (int column = 0; column < columns; column += kLanes, b += step)
      product_rows<kAdd>(a, lda, b, k, c + column, ldc, rows);
    return;
  }
  for (; columns > 0; columns -= 64, b += 4 * step, c += 64) {
    if (columns <= 16)
      columns_of<kAdd, 1>(a, lda, b, step, k, c, ldc);
    else if (columns <= 32)
      columns_of<kAdd, 2>(a, lda, b, step, k, c, ldc);
    else if (columns <= 48)
      columns_of<kAdd, 3>(a, lda, b, step, k, c, ldc);
    else
      columns_of<kAdd, 4>(a, lda, b, step, k, c, ldc);
  }
}

#else

struct Tiles {
  Tiles() {}
  ~Tiles() {}
};

#if defined(__AVX512BF16__)
constexpr int kMostRows = 8, kMostColumns = 2;  // 10 loads for 16 products, in 16 registers
Floats multiplied(Floats sum, Ints pairs, int32_t a) {
  return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)pairs, (__m512bh)_mm512_set1_epi32(a));
}
#else
constexpr int kMostRows = 4, kMostColumns = 1;
float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
Floats multiplied(Floats sum, Ints pairs, int32_t a) {
  const uint32_t both = a;
  sum += (Floats)(pairs << 16) * as_float(both << 16);
  return sum + (Floats)(pairs & int32_t(0xffff0000)) * as_float(both & 0xffff0000);
}
#endif

// A page ahead: the processor's own prefetching ends with one, and what follows b is mostly next.
constexpr int kAhead = 4096 / sizeof(bf16);

// Of kRows rows and kColumns times 16 columns.
template <bool kAdd, int kColumns, int kRows>
void product_of(const bf16* a, int lda, const bf16* b, size_t step, int k, float* c, int ldc) {
  Floats sums[kRows][kColumns];
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 16
    for (int i = 0; i < kColumns; ++i)
      sums[row][i] = kAdd ? load(c + row * ldc + i * kLanes) : Floats{};
  for (int pair = 0; pair < k / 2; ++pair) {
    Ints right[kColumns];
#pragma GCC unroll 16
    for (int i = 0; i < kColumns; ++i) {
      const bf16* from = b + i * step + pair * 2 * kLanes;
      std::memcpy(&right[i], from, 64);
      __builtin_prefetch(from + kAhead, 0, 2);
    }
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
      int32_t left;
      std::memcpy(&left, a + row * lda + 2 * pair, 4);
#pragma GCC unroll 16
      for (int i = 0; i < kColumns; ++i) sums[row][i] = multiplied(sums[row][i], right[i], left);
    }
  }
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 16
    for (int i = 0; i < kColumns; ++i) store(c + row * ldc + i * kLanes, sums[row][i]);
}

// product_of by its number of rows, less one: a number that the compiler knows stays in registers.
template <bool kAdd, int kColumns, int... kLess>
constexpr auto by_rows(std::integer_sequence<int, kLess...>) {
  return std::array{product_of<kAdd, kColumns, kLess + 1>...};
}

template <bool kAdd>
void product(const bf16* a, int lda, const bf16* b, size_t step, int columns, int k, float* c,
             int ldc, int rows) {
  constexpr auto any = std::make_integer_sequence<int, kMostRows>();
  constexpr auto wide = by_rows<kAdd, kMostColumns>(any), narrow = by_rows<kAdd, 1>(any);
  for (int column = 0, width; column < columns; column += width, b += width / kLanes * step) {
    width = columns - column < kMostColumns * kLanes ? kLanes : kMostColumns * kLanes;
    const auto& kernels = width == kLanes ? narrow : wide;
    for (int row = 0; row < rows; row += kMostRows)
      kernels[std::min(rows - row, kMostRows) - 1](a + size_t(row) * lda, lda, b, step, k,
                                                   c + size_t(row) * ldc + column, ldc);
  }
}

#endif

}  // namespace
