// One pass of the world model's transformer over a few slots of B sequences, on a CPU, in bf16.
//
// What torch does in some 400 small operations a pass, whose start takes longer than their work, is
// one parallel region here. It computes what Transformer.hidden and RingCache.attend do: matrices,
// keys and values in bf16, sums and the residual stream in float32.
//
// Every matrix product is `product` below, on matrices that are laid out for it: a right-hand side
// of k rows and 16 columns as [k / 2][16][2], which AMX and AVX512-BF16 read as it is.
//
// Axes: B sequences, n slots of each in the pass, M = B * n rows, D width, H query heads, G key
// heads, R = H / G, E channels of a head, N keys in the ring, S slots of a frame, C codes.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>

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
constexpr int kParts = 4;  // of the keys: a fixed number, so that results do not depend on threads

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

void store_rounded(bf16* to, Floats value) {
#if defined(__AVX512BF16__)
  __m256bh narrow = _mm512_cvtneps_pbh((__m512)value);
  std::memcpy(to, &narrow, 32);
#else
  for (int lane = 0; lane < kLanes; ++lane) to[lane] = rounded(value[lane]);
#endif
}

// e^x for |x| below 87, to a few units in the last place (Cephes' expf).
Floats exponential(Floats x) {
  const Floats magic = Floats{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to whole numbers
  Floats whole = x * 1.44269504f + magic;
  Ints exponent = (Ints)whole << 23;
  whole -= magic;
  x = x - whole * 0.693359375f + whole * 2.12194440e-4f;
  Floats p = 1.9875691500e-4f * x + 1.3981999507e-3f;
  p = p * x + 8.3334519073e-3f;
  p = p * x + 4.1665795894e-2f;
  p = p * x + 1.6666665459e-1f;
  p = p * x + 5.0000001201e-1f;
  p = p * x * x + x + 1.0f;
  return (Floats)((Ints)p + exponent);
}

// c [rows, 16] (+)= a [rows, k] b [k, 16], where b is [k / 2][16][2], and k a multiple of 32. Rows
// of a and c are there, with whatever in them, up to the next multiple of 16.
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

// Of 16 to 64 rows: tiles 0 to 3 are of c, 4 is of a, 5 of b. A tile's number has to be a literal.
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
void product(const bf16* a, int lda, const bf16* b, int k, float* c, int ldc, int rows) {
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

#else

struct Tiles {
  Tiles() {}
  ~Tiles() {}
};

#if defined(__AVX512BF16__)
constexpr int kMostRows = 16;
Floats multiplied(Floats sum, Ints pairs, int32_t a) {
  return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)pairs, (__m512bh)_mm512_set1_epi32(a));
}
#else
constexpr int kMostRows = 4;
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

template <bool kAdd, int kRows>
void product_of(const bf16* a, int lda, const bf16* b, int k, float* c, int ldc) {
  Floats sums[kRows];
  for (int row = 0; row < kRows; ++row) sums[row] = kAdd ? load(c + row * ldc) : Floats{};
  for (int pair = 0; pair < k / 2; ++pair) {
    Ints right;
    std::memcpy(&right, b + pair * 2 * kLanes, 64);
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
      int32_t left;
      std::memcpy(&left, a + row * lda + 2 * pair, 4);
      sums[row] = multiplied(sums[row], right, left);
    }
  }
  for (int row = 0; row < kRows; ++row) store(c + row * ldc, sums[row]);
}

template <bool kAdd>
void product(const bf16* a, int lda, const bf16* b, int k, float* c, int ldc, int rows) {
  for (; rows > 0; rows -= kMostRows, a += kMostRows * lda, c += kMostRows * ldc) {
    if (rows == 1)
      product_of<kAdd, 1>(a, lda, b, k, c, ldc);
    else if (rows == 2)
      product_of<kAdd, 2>(a, lda, b, k, c, ldc);
    else if (rows <= 4 || kMostRows == 4)
      product_of<kAdd, 4>(a, lda, b, k, c, ldc);
    else if (rows <= 8)
      product_of<kAdd, std::min(8, kMostRows)>(a, lda, b, k, c, ldc);
    else
      product_of<kAdd, kMostRows>(a, lda, b, k, c, ldc);
  }
}

#endif

}  // namespace

// Pointers to tensors of the layouts above; world_model/native.py fills it in the same order.
extern "C" struct Model {
  int64_t layers, width, heads, kv_heads, hidden, codes;
  int64_t places, keys;         // of the ring; and N: the next multiple of 32
  const float* input_gain;      // [D]
  const float* const* gains;    // of each layer: attention [D], q [E], k [E], mlp [D]
  const bf16* const* matrices;  // of each layer: qkv, out, up, down
  const float* output_gain;     // [D]
  const bf16* output;           // [D, C padded to 16]
};

extern "C" struct Pass {
  int64_t batch, n;
  int64_t begin;           // place of the pass's first slot in the ring
  int64_t frame_end;       // where the ring's frame that is being written ends
  int64_t full;            // whether what follows that frame was ever written
  int64_t first;           // logits are wanted of the slots of the pass from this one on
  const float* x;          // [B, n, D]
  const float *cos, *sin;  // [n, E / 2]
  bf16* ring_keys;         // [L, B, G][N / 16][E / 2][16][2]
  bf16* ring_values;       // [L, B, G][E / 16][N / 2][16][2]
  float* logits;           // [B, n - first, C]
};

namespace {

class Run {
 public:
  Run(const Model& model, const Pass& pass)
      : m(model),
        p(pass),
        width(m.width),
        channels(m.width / m.heads),
        group(m.heads / m.kv_heads),
        rows(p.batch * p.n),
        room(padded(rows, 16)),
        queries(padded(group * p.n, 16)),
        part(padded((m.keys + kParts - 1) / kParts, 32)),
        x_(size_t(room) * width * 4),
        normed_(size_t(room) * width * 2),
        hidden_(size_t(room) * m.hidden * 2),
        mixed_(size_t(room) * width * 2),
        queries_(size_t(p.batch) * m.kv_heads * queries * channels * 2),
        sums_(size_t(p.batch) * m.kv_heads * kParts * queries * (channels + 1) * 4),
        x(x_.as<float>()),
        normed(normed_.as<bf16>()),
        hidden(hidden_.as<bf16>()),
        mixed(mixed_.as<bf16>()),
        q(queries_.as<bf16>()),
        sums(sums_.as<float>()) {}

  void run() {
    std::memcpy(x, p.x, size_t(rows) * width * 4);
#pragma omp parallel
    {
      Tiles tiles;
      const Lines own(std::max(size_t(16) * part * 2, size_t(room) * channels * 4));
#pragma omp for
      for (int row = 0; row < rows; ++row)
        normalise(x + size_t(row) * width, width, m.input_gain);
      for (int layer = 0; layer < m.layers; ++layer) {
        attention(layer, own);
        mlp(layer, own);
      }
      logits(own);
    }
  }

 private:
  void attention(int layer, const Lines& own) {
    const float* const* gains = m.gains + 4 * layer;
    const bf16* const* matrices = m.matrices + 4 * layer;
    norm_rows(gains[0]);
#pragma omp for schedule(dynamic)
    for (int head = 0; head < m.heads + 2 * m.kv_heads; ++head) project(layer, head, own);
#pragma omp for collapse(2) schedule(dynamic)
    for (int each = 0; each < p.batch * m.kv_heads; ++each)
      for (int number = 0; number < kParts; ++number) attend(layer, each, number, own);
#pragma omp for
    for (int each = 0; each < p.batch * m.kv_heads; ++each) combine(each);
#pragma omp for
    for (int column = 0; column < width; column += kLanes)
      product<true>(mixed, width, matrices[1] + size_t(column) * width, width, x + column, width,
                    rows);
  }

  void mlp(int layer, const Lines& own) {
    const bf16* const* matrices = m.matrices + 4 * layer;
    float* columns = own.as<float>();
    norm_rows(m.gains[4 * layer + 3]);
#pragma omp for
    for (int column = 0; column < m.hidden; column += kLanes) {
      product<false>(normed, width, matrices[2] + size_t(column) * width, width, columns, kLanes,
                     rows);
      for (int row = 0; row < rows; ++row) {
        Floats value = load(columns + row * kLanes);
        value = value > 0.0f ? value : Floats{};
        store_rounded(hidden + size_t(row) * m.hidden + column, value * value);
      }
    }
#pragma omp for
    for (int column = 0; column < width; column += kLanes)
      product<true>(hidden, m.hidden, matrices[3] + size_t(column) * m.hidden, m.hidden,
                    x + column, width, rows);
  }

  void logits(const Lines& own) {
    const int wanted = p.n - p.first;
    if (wanted == 0) return;
    norm_rows(m.output_gain);
    float* columns = own.as<float>();
#pragma omp for
    for (int column = 0; column < m.codes; column += kLanes) {
      const int count = std::min<int>(kLanes, m.codes - column);
      product<false>(normed, width, m.output + size_t(column) * width, width, columns, kLanes,
                     rows);
      for (int row = 0; row < rows; ++row) {
        const int slot = row % p.n - p.first;
        if (slot >= 0)
          std::memcpy(p.logits + (size_t(row / p.n) * wanted + slot) * m.codes + column,
                      columns + row * kLanes, count * 4);
      }
    }
  }

  // What brings `count` numbers to a root mean square of 1.
  static float scale_of(const float* from, int count) {
    Floats squares{};
    for (int i = 0; i < count; i += kLanes) squares += load(from + i) * load(from + i);
    float sum = 0;
    for (int lane = 0; lane < kLanes; ++lane) sum += squares[lane];
    return 1.0f / std::sqrt(sum / count + 1e-6f);
  }

  static void normalise(float* row, int count, const float* gain) {
    const float scale = scale_of(row, count);
    for (int i = 0; i < count; i += kLanes) store(row + i, load(row + i) * scale * load(gain + i));
  }

  void norm_rows(const float* gain) {
#pragma omp for
    for (int row = 0; row < rows; ++row) {
      const float* from = x + size_t(row) * width;
      const float scale = scale_of(from, width);
      for (int i = 0; i < width; i += kLanes)
        store_rounded(normed + size_t(row) * width + i, load(from + i) * scale * load(gain + i));
    }
  }

  // A head's queries, rotated; or its keys, rotated, or values, into the ring.
  void project(int layer, int head, const Lines& own) {
    float* projected = own.as<float>();
    const bf16* matrix = m.matrices[4 * layer] + size_t(head) * channels * width;
    for (int column = 0; column < channels; column += kLanes)
      product<false>(normed, width, matrix + size_t(column) * width, width, projected + column,
                     channels, rows);
    const float* const* gains = m.gains + 4 * layer;
    const int key_head = head - m.heads, value_head = key_head - m.kv_heads;
    for (int row = 0; row < rows; ++row) {
      const int sequence = row / p.n, slot = row % p.n;
      float* own_row = projected + size_t(row) * channels;
      if (value_head >= 0) {
        keep_value(layer, sequence * m.kv_heads + value_head, slot, own_row);
        continue;
      }
      normalise(own_row, channels, gains[key_head < 0 ? 1 : 2]);
      rotate(own_row, slot);
      if (key_head >= 0)
        keep_key(layer, sequence * m.kv_heads + key_head, slot, own_row);
      else
        keep_query(sequence, head, slot, own_row);
    }
  }

  void rotate(float* row, int slot) const {
    const int half = channels / 2;
    const float *cos = p.cos + slot * half, *sin = p.sin + slot * half;
    for (int i = 0; i < half; i += kLanes) {
      const Floats a = load(row + i), b = load(row + half + i);
      store(row + i, a * load(cos + i) - b * load(sin + i));
      store(row + half + i, a * load(sin + i) + b * load(cos + i));
    }
  }

  void keep_query(int sequence, int head, int slot, const float* row) {
    const int of_group = head % group;
    bf16* to = q + ((size_t(sequence) * m.kv_heads + head / group) * queries + of_group * p.n +
                    slot) * channels;
    for (int i = 0; i < channels; i += kLanes) store_rounded(to + i, load(row + i));
  }

  void keep_key(int layer, int each, int slot, const float* row) {
    const int64_t place = p.begin + slot;
    bf16* to = keys_of(layer, each) + place / kLanes * kLanes * channels + place % kLanes * 2;
    for (int i = 0; i < channels; ++i) to[i / 2 * 2 * kLanes + i % 2] = rounded(row[i]);
  }

  void keep_value(int layer, int each, int slot, const float* row) {
    const int64_t place = p.begin + slot;
    bf16* to = values_of(layer, each) + place / 2 * 2 * kLanes + place % 2;
    for (int i = 0; i < channels; ++i)
      to[i / kLanes * m.keys * kLanes + i % kLanes * 2] = rounded(row[i]);
  }

  bf16* keys_of(int layer, int each) const {
    return p.ring_keys + (size_t(layer) * p.batch * m.kv_heads + each) * m.keys * channels;
  }

  bf16* values_of(int layer, int each) const {
    return p.ring_values + (size_t(layer) * p.batch * m.kv_heads + each) * m.keys * channels;
  }

  // Slot i of the pass sees what was written up to itself, and the frames after the one written.
  bool sees_all(int64_t from, int64_t to) const {
    return to <= p.begin + 1 || (p.full && from >= p.frame_end && to <= m.places);
  }
  bool sees_some(int64_t from, int64_t to) const {
    return from < p.begin + p.n || (p.full && to > p.frame_end && from < m.places);
  }
  bool sees(int slot, int64_t place) const {
    return place <= p.begin + slot || (p.full && place >= p.frame_end && place < m.places);
  }

  // Of one part of the keys: the sums of weighted values and of the weights, of each query. The
  // scores need no maximum taken off: norms bound them (native.py checks how far).
  void attend(int layer, int each, int number, const Lines& own) {
    const int64_t from = std::min<int64_t>(m.keys, int64_t(number) * part);
    const int64_t to = std::min<int64_t>(m.keys, from + part);
    bf16* weights = own.as<bf16>();
    float* to_sums = sums + (size_t(each) * kParts + number) * queries * (channels + 1);
    const float scale = 1.0f / std::sqrt(float(channels));
    for (int first = 0; first < group * p.n; first += 16) {
      const int count = std::min<int>(16, group * p.n - first);
      const bf16* left = q + (size_t(each) * queries + first) * channels;
      float* weighted = to_sums + size_t(first) * channels;
      float* totals = to_sums + size_t(queries) * channels + first;
      Floats total[16] = {};
      alignas(64) float scores[16 * kLanes];
      for (int64_t place = from; place < to; place += kLanes) {
        bf16* block = weights + (place - from);
        if (!sees_some(place, place + kLanes)) {
          for (int row = 0; row < 16; ++row) std::memset(block + row * part, 0, 2 * kLanes);
          continue;
        }
        product<false>(left, channels, keys_of(layer, each) + place * channels, channels, scores,
                       kLanes, count);
        const bool all = sees_all(place, place + kLanes);
        for (int row = 0; row < count; ++row) {
          Floats weight = exponential(load(scores + row * kLanes) * scale);
          if (!all)
            for (int lane = 0; lane < kLanes; ++lane)
              if (!sees((first + row) % p.n, place + lane)) weight[lane] = 0;
          total[row] += weight;
          store_rounded(block + row * part, weight);
        }
      }
      for (int row = 0; row < count; ++row) {
        totals[row] = 0;
        for (int lane = 0; lane < kLanes; ++lane) totals[row] += total[row][lane];
      }
      for (int column = 0; column < channels; column += kLanes)
        product<false>(weights, part, values_of(layer, each) + (column * m.keys + from * kLanes),
                       to - from, weighted + column, channels, count);
    }
  }

  // The attention's output of a key head's queries, from all parts.
  void combine(int each) {
    const size_t size = size_t(queries) * (channels + 1);
    const float* own = sums + size_t(each) * kParts * size;
    const int sequence = each / m.kv_heads, key_head = each % m.kv_heads;
    for (int query = 0; query < group * p.n; ++query) {
      float total = 0;
      for (int number = 0; number < kParts; ++number)
        total += own[number * size + size_t(queries) * channels + query];
      bf16* to = mixed + (size_t(sequence) * p.n + query % p.n) * width +
                 (key_head * group + query / p.n) * channels;
      for (int i = 0; i < channels; i += kLanes) {
        Floats sum{};
        for (int number = 0; number < kParts; ++number)
          sum += load(own + number * size + size_t(query) * channels + i);
        store_rounded(to + i, sum / total);
      }
    }
  }

  const Model& m;
  const Pass& p;
  const int width, channels, group, rows, room, queries, part;
  Lines x_, normed_, hidden_, mixed_, queries_, sums_;
  float* const x;
  bf16 *const normed, *const hidden, *const mixed, *const q;
  float* const sums;
};

}  // namespace

// Whether the processor lets this process use what it was compiled for.
extern "C" int drivesim_ready() {
#if defined(__AMX_BF16__)
  return syscall(SYS_arch_prctl, 0x1023, 18) == 0;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
#else
  return 1;
#endif
}

extern "C" void drivesim_pass(const Model* model, const Pass* pass) { Run(*model, *pass).run(); }
