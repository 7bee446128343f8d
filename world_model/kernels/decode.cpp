// Two functions for a CPU, in bf16 or float32: `pass` runs the world model's transformer on a few
// slots in each of B sequences, and `frame` draws all tokens of a frame.
//
// In torch, a pass consists of some 400 small operations, which take longer to launch than to run.
// Here it is one parallel region. It computes the same as Transformer.hidden and RingCache.attend.
// Matrices, keys and values have the number format `Number`, and the left-hand sides of products
// have `Factor`. Sums and the residual stream are in float32.
//
// Axes: L layers, B sequences, n slots per sequence in the pass, M = B * n rows, D width, H query
// heads, G key heads, R = H / G, E channels of a head, S slots of a frame, C codes, N places of the
// ring (padded to a multiple of 32). A place holds the key and the value of one slot.

#include "products.h"

#include <omp.h>

STRUCTURE(Model,
  int64_t layers, width, heads, kv_heads, hidden, codes;
  int64_t slots, frames;          // slots in a frame, frames in the ring
  const float* input_gain;        // [D]
  const float* const* gains;      // for each layer: attention [D], q [E], k [E], mlp [D]
  const Number* const* matrices;  // for each layer: qkv, out, up, down
  const float* output_gain;       // [D]
  const Number* output;           // [D, C padded to 16]
)

// The rings of U sequences that B branches continue and share.
STRUCTURE(Trunk,
  int64_t sequences;            // U
  const Number *keys, *values;  // as in Ring, but for U sequences
  const int64_t* rows;          // [B]: which of the U sequences each branch continues
  const bool* own;              // [N / 32]: whether branches read these places from their own rings
)

// The keys and values of B sequences, while a frame is being written.
STRUCTURE(Ring,
  const Model<Number>* model;
  const Trunk<Number>* trunk;  // null if the sequences share no ring
  int64_t sequences, frame;    // B, and the number of the frame being written
  Number* keys;                // [L, B, G][N / 16][E / I][16][I]
  Number* values;              // [L, B, G][E / 16][N / I][16][I]
)

STRUCTURE(Pass,
  const Ring<Number>* ring;
  int64_t start, stop, first;  // first slot, end, and the first slot whose logits are needed
  const float* x;              // [B, n, D]
  const float *cos, *sin;      // [n, E / 2]
  float* logits;               // [B, stop - first, C]
)

// A frame that is drawn wave by wave: P tokens in each of F futures. With guidance, there are two
// streams of F sequences, and the actions of the second stream are unknown. Otherwise there is one
// stream. B = streams * F.
STRUCTURE(Frame,
  const Ring<Number>* ring;
  int64_t waves, tokens, streams;
  const int64_t* spans;            // [waves][3]: start, stop and first, as in Pass
  // Indices of the token that each slot takes and of the token that it predicts. P means no token.
  const int64_t *source, *target;  // [S]
  const float* base;               // [B, S, D]: slots' inputs without the frame's own tokens
  const float *cos, *sin;          // [S, E / 2]
  const float* embedding;          // [C + 1, D]: the embedding of each code; row C: no token
  const float* uniform;            // [F, P], in [0, 1)
  double temperature, min_p, guidance;  // as in sampling.py
  int64_t* drawn;                  // [B, P + 1]: the drawn tokens; contains only C before the call
  float* scores;                   // [3, F, P]: see draw_frame in decode.py
)

namespace {

// Attention sums over this many parts of the keys separately, so that threads can share the work.
// The number is fixed so that results do not depend on the number of threads.
constexpr int kParts = 4;
// Scores are computed for kQueries queries and kBlock keys at once, and the sums of weighted values
// for up to kChunk keys at once. The buffers for this fit into the L1 cache.
constexpr int kQueries = 32, kBlock = 64, kChunk = 128;
// The places of a ring form groups of kStep. A block consists of 1 or 2 groups. Trunk::own has one
// entry for each group.
constexpr int kStep = 32;

// Prefetch the keys or values of the next block, because `product` does not. When `product` uses
// tiles, it prefetches nothing. When it uses vectors, it prefetches what follows in memory, but the
// values that follow may belong to another head.
template <typename Number>
void fetch(const Number* from, const Number* to) {
  for (; from < to; from += 64 / sizeof(Number)) __builtin_prefetch(from);
}

template <typename Number>
class Run {
  typedef Left<Number> Factor;  // number format of left-hand sides

 public:
  explicit Run(const Pass<Number>& pass) : p(pass) {
    // Collect the blocks of places that the queries see, for each part of the keys. Extend the
    // part's last block if it ends here and is not full. Otherwise begin a new block.
    for (int64_t place = 0; place < ring; place += kStep) {
      if (!sees_some(place, place + kStep)) continue;
      const bool owned = !r.trunk || r.trunk->own[place / kStep];
      std::vector<Block>& seen = blocks[place / part_places + (owned ? 0 : kParts)];
      if (seen.empty() || seen.back().to < place || place - seen.back().from == kBlock)
        seen.push_back({place, place});
      seen.back().to += kStep;
    }
  }

  void run() {
    std::memcpy(x, p.x, size_t(rows) * width * 4);
#pragma omp parallel
    {
      Tiles tiles;
      const Own own{size_t(room) * channels};
#pragma omp for
      for (int row = 0; row < rows; ++row)
        norm_row(x + size_t(row) * width, width, m.input_gain, x + size_t(row) * width);
      for (int layer = 0; layer < m.layers; ++layer) {
        attention(layer, own);
        mlp(layer, own);
      }
      logits(own);
    }
  }

 private:
  // The buffers of one thread. `columns` is used for a head's projections and for matrix columns.
  struct Own {
    const size_t size;
    const Buffer<float> columns{size}, scores{kQueries * kBlock};
    const Buffer<Factor> weights{kQueries * kChunk};
  };

  // A range of places that queries attend to at once.
  struct Block {
    int64_t from, to;
  };

  void attention(int layer, const Own& own) {
    const float* const* gains = m.gains + 4 * layer;
    const Number* const* matrices = m.matrices + 4 * layer;
    norm_rows(gains[0]);
#pragma omp for schedule(dynamic)
    for (int head = 0; head < m.heads + 2 * m.kv_heads; ++head) project(layer, head, own);
    // The loop over branches is the innermost, so that a trunk's keys are read from memory once for
    // all branches.
#pragma omp for collapse(2) schedule(dynamic) nowait
    for (int each = 0; each < trunks * m.kv_heads; ++each)
      for (int part = kParts; part < parts; ++part)
        for (int sequence = 0; sequence < batch; ++sequence)
          if (r.trunk->rows[sequence] == each / m.kv_heads)
            attend(layer, sequence * m.kv_heads + each % m.kv_heads, part, own);
    // The parts of a head are adjacent in memory. If the heads of all sequences can be divided
    // evenly among the threads, let one thread read all parts of a head.
    const int rings = batch * m.kv_heads;
    const int parts_at_once = rings % omp_get_num_threads() ? 1 : kParts;
#pragma omp for collapse(2) schedule(dynamic, parts_at_once)
    for (int each = 0; each < rings; ++each)
      for (int part = 0; part < kParts; ++part) attend(layer, each, part, own);
#pragma omp for
    for (int each = 0; each < rings; ++each) combine(each);
#pragma omp for
    for (int column = 0; column < width; column += kTogether)
      multiply<true>(+mixed, width, matrices[1], column, width, x + column, width);
  }

  void mlp(int layer, const Own& own) {
    const Number* const* matrices = m.matrices + 4 * layer;
    float* const columns = own.columns;
    norm_rows(m.gains[4 * layer + 3]);
#pragma omp for
    for (int column = 0; column < m.hidden; column += kTogether) {
      multiply<false>(normed, width, matrices[2], column, m.hidden, columns, kTogether);
      for (int row = 0; row < rows; ++row)
        for (int i = 0; i < kTogether; i += kFloats)
          store(hidden + size_t(row) * m.hidden + column + i,
                squared_relu(load(columns + row * kTogether + i)));
    }
#pragma omp for
    for (int column = 0; column < width; column += kTogether)
      multiply<true>(hidden, m.hidden, matrices[3], column, width, x + column, width);
  }

  void logits(const Own& own) {
    const int wanted = p.stop - p.first;
    if (wanted == 0) return;
    norm_rows(m.output_gain);
    float* const columns = own.columns;
#pragma omp for
    for (int column = 0; column < m.codes; column += kTogether) {
      const int count = std::min<int>(kTogether, m.codes - column);
      multiply<false>(normed, width, m.output, column, m.codes, columns, kTogether);
      for (int row = 0; row < rows; ++row) {
        const int slot = p.start + row % n - p.first;
        if (slot >= 0)
          std::memcpy(p.logits + (size_t(row / n) * wanted + slot) * m.codes + column,
                      columns + row * kTogether, count * 4);
      }
    }
  }

  // Multiply all rows by up to kTogether columns of a matrix, from `column` on. The matrix has k
  // rows and `columns` columns.
  template <bool kAdd>
  void multiply(const Factor* left, int k, const Number* matrix, int column, int columns, float* to,
                int ldc) const {
    product<kAdd>(left, k, matrix + size_t(column) * k, size_t(kLanes) * k,
                  std::min(kTogether, columns - column), k, to, ldc, rows);
  }

  void norm_rows(const float* gain) {
#pragma omp for
    for (int row = 0; row < rows; ++row)
      norm_row(x + size_t(row) * width, width, gain, normed + size_t(row) * width);
  }

  // Compute the projections of a head. Normalise and rotate queries and keys. Write keys and values
  // into the ring.
  void project(int layer, int head, const Own& own) {
    float* const projected = own.columns;
    const Number* matrix = m.matrices[4 * layer] + size_t(head) * channels * width;
    product<false>(+normed, width, matrix, size_t(kLanes) * width, channels, width, projected,
                   channels, rows);
    const bool is_query = head < m.heads, is_key = !is_query && head < m.heads + m.kv_heads;
    const float* const gain = m.gains[4 * layer + (is_query ? 1 : 2)];
    for (int row = 0; row < rows; ++row) {
      const int sequence = row / n, slot = row % n;
      const int64_t place = begin + slot;
      float* own_row = projected + size_t(row) * channels;
      if (is_query || is_key) {
        norm_row(own_row, channels, gain, own_row);
        const int half = channels / 2;
        rotate(own_row, channels, p.cos + slot * half, p.sin + slot * half, 1);
      }
      if (is_query) {
        Factor* to = q + ((size_t(sequence) * m.kv_heads + head / group) * queries +
                          head % group * n + slot) * channels;
        const float scale = kLog2E / std::sqrt(float(channels));
        for (int i = 0; i < channels; i += kFloats) store(to + i, load(own_row + i) * scale);
      } else if (is_key) {
        Number* to = r.keys + ring_at(layer, sequence, head - m.heads) +
                     place / kLanes * kLanes * channels + place % kLanes * kI;
        for (int i = 0; i < channels; ++i) put(to + i / kI * kI * kLanes + i % kI, own_row[i]);
      } else {
        Number* to = r.values + ring_at(layer, sequence, head - m.heads - m.kv_heads) +
                     place / kI * kI * kLanes + place % kI;
        for (int i = 0; i < channels; ++i)
          put(to + i / kLanes * ring * kLanes + i % kLanes * kI, own_row[i]);
      }
    }
  }

  size_t ring_at(int layer, int sequence, int key_head) const {
    return ((size_t(layer) * batch + sequence) * m.kv_heads + key_head) * ring * channels;
  }

  // A slot sees all places up to its own. If the ring is full, it also sees the places after the
  // current frame, which contain older frames.
  bool sees_all(int64_t from, int64_t to) const {
    return to <= begin + 1 || (full && from >= frame_end && to <= places);
  }
  bool sees_some(int64_t from, int64_t to) const {
    return from < begin + n || (full && to > frame_end && from < places);
  }
  Ints sees(int slot, int place) const {  // for kFloats places
    Ints lanes;
    for (int i = 0; i < kFloats; ++i) lanes[i] = place + i;
    const Ints before = lanes <= begin + slot;
    return full ? before | ((lanes >= frame_end) & (lanes < places)) : before;
  }

  // Compute each query's sum of weighted values and its sum of weights, over one part of the keys.
  // Parts below kParts are in the sequences' own rings, and parts from kParts on are in the trunk.
  // The maximum score need not be subtracted, because RMSNorm bounds the scores (see is_bounded in
  // operators.py).
  void attend(int layer, int each, int part, const Own& own) {
    const std::vector<Block>& seen = blocks[part];
    const bool shared = part >= kParts;
    const int sequence = each / m.kv_heads, key_head = each % m.kv_heads;
    const size_t of_trunk = ((size_t(layer) * trunks + (shared ? r.trunk->rows[sequence] : 0)) *
                             m.kv_heads + key_head) * ring * channels;
    const size_t of_ring = ring_at(layer, sequence, key_head);
    const Number* keys = shared ? r.trunk->keys + of_trunk : r.keys + of_ring;
    const Number* values = shared ? r.trunk->values + of_trunk : r.values + of_ring;
    const size_t step = size_t(ring) * kLanes;
    float* const scores = own.scores;
    Factor* const weights = own.weights;
    float* to_sums = sums + (size_t(each) * parts + part) * queries * (channels + 1);
    for (int first = 0; first < group * n; first += kQueries) {
      const int count = std::min(kQueries, group * n - first);
      const int fetched = padded((kBlock + count - 1) / count, 2);  // keys to prefetch per row
      const Factor* left = q + (size_t(each) * queries + first) * channels;
      float* weighted = to_sums + size_t(first) * channels;
      float* totals = to_sums + size_t(queries) * channels + first;
      Floats sum[kQueries] = {};
      std::memset(weighted, 0, size_t(count) * channels * 4);
      // the first place whose weighted value has not been added yet
      int64_t pending = seen.empty() ? 0 : seen[0].from;
      for (size_t i = 0; i < seen.size(); ++i) {
        const Block now = seen[i], next = i + 1 < seen.size() ? seen[i + 1] : Block{};
        product<false>(left, channels, keys + now.from * channels, size_t(kLanes) * channels,
                       now.to - now.from, channels, scores, kBlock, count);
        for (int row = 0; row < count; ++row) {
          if (first == 0 && !shared) {  // most of a trunk is already in the processor's cache
            const int64_t ahead = next.from + row * fetched;
            const int64_t end = std::min(next.to, ahead + fetched);
            fetch(keys + ahead * channels, keys + end * channels);
            for (int i = 0; i < channels / kLanes; ++i)
              fetch(values + i * step + ahead * kLanes, values + i * step + end * kLanes);
          }
          weigh(scores + row * kBlock, now, first + row,
                weights + row * kChunk + (now.from - pending), sum[row]);
        }
        if (next.from == now.to && next.to - pending <= kChunk) continue;
        product<true>(weights, kChunk, values + pending * kLanes, step, channels, now.to - pending,
                      weighted, channels, count);
        pending = next.from;
      }
      for (int row = 0; row < count; ++row) totals[row] = total(sum[row]);
    }
  }

  // Compute a query's weights for a block of keys, and add them to `sum`.
  void weigh(const float* scores, Block block, int query, Factor* weights, Floats& sum) const {
    const bool all = sees_all(block.from, block.to);  // true for most blocks; they need no mask
#pragma GCC unroll 4
    for (int i = 0; i < block.to - block.from; i += kFloats) {
      Floats weight = power_of_two<Factor>(load(scores + i));
      if (!all) weight = sees(query % n, block.from + i) ? weight : Floats{};
      sum += weight;
      store(weights + i, weight);
    }
  }

  // Add up the sums of all parts, and write the attention's output for the queries of a key head.
  void combine(int each) {
    const size_t size = size_t(queries) * (channels + 1);
    const float* own = sums + size_t(each) * parts * size;
    const int sequence = each / m.kv_heads, key_head = each % m.kv_heads;
    for (int query = 0; query < group * n; ++query) {
      float weight = 0;
      for (int part = 0; part < parts; ++part)
        weight += own[part * size + size_t(queries) * channels + query];
      Factor* to = mixed + (size_t(sequence) * n + query % n) * width +
                 (key_head * group + query / n) * channels;
      for (int i = 0; i < channels; i += kFloats) {
        Floats sum{};
        for (int part = 0; part < parts; ++part)
          sum += load(own + part * size + size_t(query) * channels + i);
        store(to + i, sum / weight);
      }
    }
  }

  static constexpr int kI = kInterleaved<Number>;
  const Pass<Number>& p;
  const Ring<Number>& r = *p.ring;
  const Model<Number>& m = *r.model;
  const int batch = r.sequences;
  const int width = m.width, channels = m.width / m.heads, group = m.heads / m.kv_heads;
  const int n = p.stop - p.start, places = m.frames * m.slots, ring = padded(places, kStep);
  const int frame_begin = r.frame % m.frames * m.slots, frame_end = frame_begin + m.slots;
  const int begin = frame_begin + p.start;    // first place of the pass in the ring
  const bool full = r.frame >= m.frames;      // whether all places of the ring have been written
  const int trunks = r.trunk ? r.trunk->sequences : 0;
  const int rows = batch * n, room = padded(rows, 16), queries = padded(group * n, 16);
  const int part_places = padded((ring + kParts - 1) / kParts, kStep);
  const int parts = trunks ? 2 * kParts : kParts;  // first the parts of own rings, then the trunk's
  std::vector<Block> blocks[2 * kParts];
  const Buffer<float> x{size_t(room) * width};
  const Buffer<Factor> normed{size_t(room) * width}, hidden{size_t(room) * m.hidden};
  const Buffer<Factor> mixed{size_t(room) * width};
  const Buffer<Factor> q{size_t(batch) * m.kv_heads * queries * channels};
  const Buffer<float> sums{size_t(batch) * m.kv_heads * parts * queries * (channels + 1)};
};

// Draws tokens from logits. Computes the same as truncated_log_probs and draw in sampling.py, but
// without top-k and top-p.
template <typename Number>
class Draws {
 public:
  Draws(const Frame<Number>& frame, int codes) : f(frame), codes(codes) {}

  // Evaluate the inverse CDF at `uniform`; return the token. Set its log-probabilities under the
  // plain and the sampling distribution, and the entropy of the plain one.
  // `null` points to the logits of the second stream, or is a null pointer if there is one stream.
  int draw(const float* plain, const float* null, float uniform, float* log_prob,
           float* drawn_log_prob, float* entropy) const {
    std::copy(plain, plain + codes, +values);
    double total, log_total = weigh(&total), plain_log_total = log_total;
    *entropy = std::max(0.0, log_total - mean(total));
    if (null || f.temperature != 1) {
      for (int i = 0; i < codes; ++i) {
        if (null) values[i] = null[i] + float(f.guidance) * (plain[i] - null[i]);
        if (f.temperature > 0) values[i] /= float(f.temperature);
      }
      log_total = weigh(&total);
    }
    if (f.min_p > 0) {
      const double largest = log_total - std::log(total);
      total = 0;
      for (int i = 0; i < codes; ++i) {
        if (weights[i] < f.min_p) weights[i] = 0;  // the largest weight is 1
        total += weights[i];
      }
      log_total = largest + std::log(total);
    }
    int found = 0;
    if (f.temperature == 0) {
      found = std::max_element(+values, values + codes) - values;
    } else {
      const double at = uniform * total;
      for (double below = weights[0]; !(below > at) && found < codes - 1; below += weights[found])
        ++found;
    }
    *log_prob = plain[found] - plain_log_total;
    *drawn_log_prob = f.temperature == 0 ? 0 : values[found] - log_total;
    return found;
  }

 private:
  // Set the weights to exp(value - largest) and `total` to their sum; return log(sum(exp(value))).
  double weigh(double* total) const {
    std::fill(values + codes, values + room, -INFINITY);
    const float largest = *std::max_element(+values, values + codes);
    for (int i = 0; i < room; i += kFloats) {
      const Floats power = (load(values + i) - largest) * kLog2E;
      const Floats within = power < -126.0f ? Floats{} - 126.0f : power;
      store(weights + i, power < -126.0f ? Floats{} : power_of_two(within));
    }
    *total = 0;
    for (int i = 0; i < codes; ++i) *total += weights[i];
    return largest + std::log(*total);
  }

  // Return the mean of the values under the distribution whose weights add up to `all`.
  double mean(double all) const {
    Floats sums{};
    int i = 0;
    for (; i + kFloats <= codes; i += kFloats) sums += load(weights + i) * load(values + i);
    double sum = total(sums);
    for (; i < codes; ++i) sum += weights[i] * values[i];
    return sum / all;
  }

  const Frame<Number>& f;
  const int codes, room = padded(codes, kLanes);
  const Buffer<float> values{size_t(room)}, weights{size_t(room)};
};

template <typename Number>
void draw_frame(const Frame<Number>& frame) {
  const Model<Number>& model = *frame.ring->model;
  const int64_t batch = frame.ring->sequences, futures = batch / frame.streams;
  const int64_t slots = model.slots, width = model.width, half = width / model.heads / 2;
  int64_t most = 0;
  for (int64_t wave = 0; wave < frame.waves; ++wave)
    most = std::max(most, frame.spans[3 * wave + 1] - frame.spans[3 * wave]);
  const Buffer<float> x(size_t(batch) * most * width), logits(size_t(batch) * most * model.codes);
  for (int64_t wave = 0; wave < frame.waves; ++wave) {
    const int64_t* span = frame.spans + 3 * wave;
    const Pass<Number> pass{frame.ring, span[0], span[1], span[2], x, frame.cos + span[0] * half,
                            frame.sin + span[0] * half, logits};
    const int64_t n = pass.stop - pass.start, wanted = pass.stop - pass.first;
    for (int64_t row = 0; row < batch * n; ++row) {
      const int64_t sequence = row / n, slot = pass.start + row % n;
      const int64_t token = frame.drawn[sequence * (frame.tokens + 1) + frame.source[slot]];
      const float* known = frame.base + (sequence * slots + slot) * width;
      for (int64_t i = 0; i < width; i += kFloats)
        store(x + row * width + i, load(known + i) + load(frame.embedding + token * width + i));
    }
    Run(pass).run();
#pragma omp parallel
    {
      const Draws draws(frame, model.codes);
#pragma omp for
      for (int64_t row = 0; row < futures * wanted; ++row) {
        const int64_t future = row / wanted, token = frame.target[pass.first + row % wanted];
        const int64_t at = future * frame.tokens + token;
        const float* plain = pass.logits + row * model.codes;
        const float* null = frame.streams == 1 ? nullptr : plain + futures * wanted * model.codes;
        float* const scores = frame.scores + at;
        const int64_t step = futures * frame.tokens;
        const int found = draws.draw(plain, null, frame.uniform[at], scores, scores + step,
                                     scores + 2 * step);
        for (int64_t sequence = future; sequence < batch; sequence += futures)
          frame.drawn[sequence * (frame.tokens + 1) + token] = found;
      }
    }
  }
}

}  // namespace

// Ask the system for permission to use AMX tiles, if the library uses them; return whether the
// library can run.
extern "C" int drivesim_ready() {
#if defined(HAS_TILES)
  return syscall(SYS_arch_prctl, 0x1023, 18) == 0;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
#else
  return 1;
#endif
}

OPERATOR(pass, Pass, Run(*given).run())
OPERATOR(frame, Frame, draw_frame(*given))
