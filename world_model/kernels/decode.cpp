// Passes of the world model's transformer over a few slots of B sequences, and frames drawn by such
// passes, on a CPU, in bf16 or float32.
//
// What torch does in some 400 small operations a pass, whose start takes longer than their work, is
// one parallel region here. It computes what Transformer.hidden and RingCache.attend do: matrices,
// keys and values in `Number`, what they are multiplied by in `Factor`, sums and the residual
// stream in float32.
//
// Axes: B sequences, n slots of each in the pass, M = B * n rows, D width, H query heads, G key
// heads, R = H / G, E channels of a head, N keys in the ring, S slots of a frame, C codes.

#include "products.h"

#include <omp.h>

// Pointers to tensors of the layouts above; decode.py fills it in the same order.
template <typename Number>
struct Model {
  int64_t layers, width, heads, kv_heads, hidden, codes;
  int64_t places, keys;           // of the ring; and N: the next multiple of 32
  const float* input_gain;        // [D]
  const float* const* gains;      // of each layer: attention [D], q [E], k [E], mlp [D]
  const Number* const* matrices;  // of each layer: qkv, out, up, down
  const float* output_gain;       // [D]
  const Number* output;           // [D, C padded to 16]
};

template <typename Number>
struct Pass {
  int64_t batch, n;
  int64_t begin;           // place of the pass's first slot in the ring
  int64_t frame_end;       // where the ring's frame that is being written ends
  int64_t full;            // whether what follows that frame was ever written
  int64_t first;           // logits are wanted of the slots of the pass from this one on
  const float* x;          // [B, n, D]
  const float *cos, *sin;  // [n, E / 2]
  Number* ring_keys;       // [L, B, G][N / 16][E / I][16][I]
  Number* ring_values;     // [L, B, G][E / 16][N / I][16][I]
  // Where the B sequences branched off U others: the rings of those, of which sequence i goes on
  // from trunk[i]. Places from own_from on, round the ring's end, to own_to are the branches' own.
  int64_t trunks;                            // U, or 0
  const Number *trunk_keys, *trunk_values;   // as the rings above, [L, U, G]...
  const int64_t* trunk;                      // [B]
  int64_t own_from, own_to;                  // multiples of 32
  float* logits;                             // [B, n - first, C]
};

// A frame that is drawn wave by wave, with a Pass that begins where the frame does and has the
// cosines and sines of all its slots [S, E / 2]. P tokens; F futures, in 1 or 2 streams of
// sequences: under guidance a second one, which knows no actions, follows; B = streams * F.
struct Frame {
  int64_t waves, slots, tokens, streams;
  const int64_t* spans;            // [waves][3]: a pass's first slot, its end, whence it predicts
  const int64_t *source, *target;  // [S]: the tokens that slots take and predict; P: none
  const float* base;               // [B, S, D]: what slots know before the frame's own tokens
  const float* embedding;          // [C + 1, D]: what a token adds to that; C: none
  const float* uniform;            // [F, P], in [0, 1)
  double temperature, guidance;    // as in sampler.py
  int64_t* drawn;                  // [B, P + 1]: to begin with, C
  float* log_probs;                // [2, F, P]: under the plain model, and as drawn from
};

namespace {

constexpr int kParts = 4;  // of the keys: a fixed number, so that results do not depend on threads
// Queries and keys that scores are computed of at once, and keys whose values are: what all of it
// takes stays in the nearest cache.
constexpr int kQueries = 32, kBlock = 64, kChunk = 128;

// Ask for what is read next: tiles wait for each line, and products ask for no more than their own
// next columns, which of values are another head's.
template <typename Number>
void fetch(const Number* from, const Number* to) {
  for (; from < to; from += 64 / sizeof(Number)) __builtin_prefetch(from);
}

template <typename Number>
class Run {
  typedef Left<Number> Factor;  // of weights, keys and values

 public:
  Run(const Model<Number>& model, const Pass<Number>& pass)
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
        normed_(size_t(room) * width * sizeof(Factor)),
        hidden_(size_t(room) * m.hidden * sizeof(Factor)),
        mixed_(size_t(room) * width * sizeof(Factor)),
        queries_(size_t(p.batch) * m.kv_heads * queries * channels * sizeof(Factor)),
        parts(p.trunks ? 2 * kParts : kParts),
        sums_(size_t(p.batch) * m.kv_heads * parts * queries * (channels + 1) * 4),
        x(x_.as<float>()),
        normed(normed_.as<Factor>()),
        hidden(hidden_.as<Factor>()),
        mixed(mixed_.as<Factor>()),
        q(queries_.as<Factor>()),
        sums(sums_.as<float>()) {}

  void run() {
    std::memcpy(x, p.x, size_t(rows) * width * 4);
#pragma omp parallel
    {
      Tiles tiles;
      const Lines own(std::max(size_t(kQueries) * (kBlock * 4 + kChunk * sizeof(Factor)),
                               size_t(room) * channels * 4));
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
  static constexpr int kI = kInterleaved<Number>;

  void attention(int layer, const Lines& own) {
    const float* const* gains = m.gains + 4 * layer;
    const Number* const* matrices = m.matrices + 4 * layer;
    norm_rows(gains[0]);
#pragma omp for schedule(dynamic)
    for (int head = 0; head < m.heads + 2 * m.kv_heads; ++head) project(layer, head, own);
    // A trunk's keys are read once for all of its branches.
#pragma omp for collapse(2) schedule(dynamic) nowait
    for (int each = 0; each < p.trunks * m.kv_heads; ++each)
      for (int number = 0; number < kParts; ++number)
        for (int sequence = 0; sequence < p.batch; ++sequence)
          if (p.trunk[sequence] == each / m.kv_heads)
            attend(layer, sequence * m.kv_heads + each % m.kv_heads, number, true, own);
    // A head's parts lie one after the other: one thread reads them where there are heads enough.
    const int rings = p.batch * m.kv_heads;
    const int parts_at_once = rings % omp_get_num_threads() ? 1 : kParts;
#pragma omp for collapse(2) schedule(dynamic, parts_at_once)
    for (int each = 0; each < rings; ++each)
      for (int number = 0; number < kParts; ++number) attend(layer, each, number, false, own);
#pragma omp for
    for (int each = 0; each < rings; ++each) combine(each);
#pragma omp for
    for (int column = 0; column < width; column += kTogether)
      multiply<true>(mixed, width, matrices[1], column, width, x + column, width);
  }

  void mlp(int layer, const Lines& own) {
    const Number* const* matrices = m.matrices + 4 * layer;
    float* columns = own.as<float>();
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

  void logits(const Lines& own) {
    const int wanted = p.n - p.first;
    if (wanted == 0) return;
    norm_rows(m.output_gain);
    float* columns = own.as<float>();
#pragma omp for
    for (int column = 0; column < m.codes; column += kTogether) {
      const int count = std::min<int>(kTogether, m.codes - column);
      multiply<false>(normed, width, m.output, column, m.codes, columns, kTogether);
      for (int row = 0; row < rows; ++row) {
        const int slot = row % p.n - p.first;
        if (slot >= 0)
          std::memcpy(p.logits + (size_t(row / p.n) * wanted + slot) * m.codes + column,
                      columns + row * kTogether, count * 4);
      }
    }
  }

  // Up to kTogether columns, from one on, of all rows times a matrix of k rows and so many columns.
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

  // A head's queries, rotated; or its keys, rotated, or values, into the ring.
  void project(int layer, int head, const Lines& own) {
    float* projected = own.as<float>();
    const Number* matrix = m.matrices[4 * layer] + size_t(head) * channels * width;
    product<false>(normed, width, matrix, size_t(kLanes) * width, channels, width, projected,
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
      norm_row(own_row, channels, gains[key_head < 0 ? 1 : 2], own_row);
      const int half = channels / 2;
      rotate(own_row, channels, p.cos + slot * half, p.sin + slot * half, 1);
      if (key_head >= 0)
        keep_key(layer, sequence * m.kv_heads + key_head, slot, own_row);
      else
        keep_query(sequence, head, slot, own_row);
    }
  }

  void keep_query(int sequence, int head, int slot, const float* row) {
    const int of_group = head % group;
    Factor* to = q + ((size_t(sequence) * m.kv_heads + head / group) * queries + of_group * p.n +
                    slot) * channels;
    const float scale = kLog2E / std::sqrt(float(channels));
    for (int i = 0; i < channels; i += kFloats) store(to + i, load(row + i) * scale);
  }

  void keep_key(int layer, int each, int slot, const float* row) {
    const int64_t place = p.begin + slot;
    Number* to = keys_of(layer, each) + place / kLanes * kLanes * channels + place % kLanes * kI;
    for (int i = 0; i < channels; ++i) put(to + i / kI * kI * kLanes + i % kI, row[i]);
  }

  void keep_value(int layer, int each, int slot, const float* row) {
    const int64_t place = p.begin + slot;
    Number* to = values_of(layer, each) + place / kI * kI * kLanes + place % kI;
    for (int i = 0; i < channels; ++i)
      put(to + i / kLanes * m.keys * kLanes + i % kLanes * kI, row[i]);
  }

  Number* keys_of(int layer, int each) const {
    return p.ring_keys + (size_t(layer) * p.batch * m.kv_heads + each) * m.keys * channels;
  }

  Number* values_of(int layer, int each) const {
    return p.ring_values + (size_t(layer) * p.batch * m.kv_heads + each) * m.keys * channels;
  }

  const Number* trunk_of(const Number* rings, int layer, int each) const {
    const int64_t head = p.trunk[each / m.kv_heads] * m.kv_heads + each % m.kv_heads;
    return rings + (size_t(layer) * p.trunks * m.kv_heads + head) * m.keys * channels;
  }

  // Slot i of the pass sees what was written up to itself, and the frames after the one written.
  bool sees_all(int64_t from, int64_t to) const {
    return to <= p.begin + 1 || (p.full && from >= p.frame_end && to <= m.places);
  }
  bool sees_some(int64_t from, int64_t to) const {
    return from < p.begin + p.n || (p.full && to > p.frame_end && from < m.places);
  }
  Ints sees(int slot, int place) const {  // of kFloats places
    Ints places;
    for (int i = 0; i < kFloats; ++i) places[i] = place + i;
    const Ints before = places <= int(p.begin) + slot;
    return p.full ? before | ((places >= int(p.frame_end)) & (places < int(m.places))) : before;
  }

  // Whether a place of the rings is the branches' own.
  bool owns(int64_t place) const {
    if (!p.trunks) return true;
    if (p.own_from < p.own_to) return place >= p.own_from && place < p.own_to;
    return place >= p.own_from || place < p.own_to;
  }

  // Where the places end that are with `place` the branches' own, or their trunks'.
  int64_t run_end(int64_t place, int64_t to) const {
    if (!p.trunks) return to;
    if (p.own_from > place) to = std::min(to, p.own_from);
    if (p.own_to > place) to = std::min(to, p.own_to);
    return to;
  }

  // Places that are attended to at once.
  struct Block {
    int64_t from, to;
  };

  // The first block from `place` on, up to `to`, of places that are the branches' own, or their
  // trunks', and that a slot of the pass sees; an empty one if there is none.
  Block block(int64_t place, int64_t to, bool shared) const {
    while (place < to) {
      const int64_t end = std::min(run_end(place, to), place + kBlock);
      if (owns(place) != shared && sees_some(place, end)) return {place, end};
      place = end;
    }
    return {to, to};
  }

  // Of one part of the keys, of those that are the branches' own or of those of their trunks: the
  // sums of weighted values and of the weights, of each query. The scores need no maximum taken
  // off: norms bound them (library.py says how far).
  void attend(int layer, int each, int number, bool shared, const Lines& own) {
    const int64_t from = std::min<int64_t>(m.keys, int64_t(number) * part);
    const int64_t to = std::min<int64_t>(m.keys, from + part);
    const int in_sums = shared ? kParts + number : number;
    float* to_sums = sums + (size_t(each) * parts + in_sums) * queries * (channels + 1);
    const Number* keys = shared ? trunk_of(p.trunk_keys, layer, each) : keys_of(layer, each);
    const Number* values = shared ? trunk_of(p.trunk_values, layer, each) : values_of(layer, each);
    const size_t step = size_t(m.keys) * kLanes;
    float* const scores = own.as<float>();
    auto* const weights = reinterpret_cast<Factor*>(scores + kQueries * kBlock);
    const Block start = block(from, to, shared);
    for (int first = 0; first < group * p.n; first += kQueries) {
      const int count = std::min(kQueries, group * int(p.n) - first);
      const int places = padded((kBlock + count - 1) / count, 2);  // to be fetched with a row
      const Factor* left = q + (size_t(each) * queries + first) * channels;
      float* weighted = to_sums + size_t(first) * channels;
      float* totals = to_sums + size_t(queries) * channels + first;
      Floats sum[kQueries] = {};
      bool begun = false;
      int64_t begin = start.from;  // of the values whose weights are there
      for (Block now = start, next; now.from < now.to; now = next) {
        next = block(now.to, to, shared);
        product<false>(left, channels, keys + now.from * channels, size_t(kLanes) * channels,
                       now.to - now.from, channels, scores, kBlock, count);
        for (int row = 0; row < count; ++row) {
          if (first == 0 && !shared) {  // a trunk's are near already, for all but its first branch
            const int64_t ahead = next.from + row * places, end = std::min(next.to, ahead + places);
            fetch(keys + ahead * channels, keys + end * channels);
            for (int i = 0; i < channels / kLanes; ++i)
              fetch(values + i * step + ahead * kLanes, values + i * step + end * kLanes);
          }
          weigh(scores + row * kBlock, now, first + row,
                weights + row * kChunk + (now.from - begin), sum[row]);
        }
        if (next.from == now.to && next.from < next.to && next.to - begin <= kChunk) continue;
        const Number* right = values + begin * kLanes;
        if (begun)
          product<true>(weights, kChunk, right, step, channels, now.to - begin, weighted, channels,
                        count);
        else
          product<false>(weights, kChunk, right, step, channels, now.to - begin, weighted,
                         channels, count);
        begun = true;
        begin = next.from;
      }
      if (!begun) std::memset(weighted, 0, size_t(count) * channels * 4);
      for (int row = 0; row < count; ++row) totals[row] = total(sum[row]);
    }
  }

  // A query's weights of a block of keys, added up in `sum`.
  void weigh(const float* scores, Block block, int query, Factor* weights, Floats& sum) const {
    const int count = block.to - block.from;
    if (sees_all(block.from, block.to)) {  // nearly all are: a loop without the choice below
#pragma GCC unroll 4
      for (int i = 0; i < count; i += kFloats) {
        const Floats weight = power_of_two<Factor>(load(scores + i));
        sum += weight;
        store(weights + i, weight);
      }
      return;
    }
    const int slot = query % int(p.n);
    for (int i = 0; i < count; i += kFloats) {
      Floats weight = power_of_two<Factor>(load(scores + i));
      weight = sees(slot, block.from + i) ? weight : Floats{};
      sum += weight;
      store(weights + i, weight);
    }
  }

  // The attention's output of a key head's queries, from all parts.
  void combine(int each) {
    const size_t size = size_t(queries) * (channels + 1);
    const float* own = sums + size_t(each) * parts * size;
    const int sequence = each / m.kv_heads, key_head = each % m.kv_heads;
    for (int query = 0; query < group * p.n; ++query) {
      float weight = 0;
      for (int number = 0; number < parts; ++number)
        weight += own[number * size + size_t(queries) * channels + query];
      Factor* to = mixed + (size_t(sequence) * p.n + query % p.n) * width +
                 (key_head * group + query / p.n) * channels;
      for (int i = 0; i < channels; i += kFloats) {
        Floats sum{};
        for (int number = 0; number < parts; ++number)
          sum += load(own + number * size + size_t(query) * channels + i);
        store(to + i, sum / weight);
      }
    }
  }

  const Model<Number>& m;
  const Pass<Number>& p;
  const int width, channels, group, rows, room, queries, part;
  Lines x_, normed_, hidden_, mixed_, queries_;
  const int parts;  // of the keys: those of the branches, then those of the trunks
  Lines sums_;
  float* const x;
  Factor *const normed, *const hidden, *const mixed, *const q;
  float* const sums;
};

// Draws tokens from logits, as truncated_log_probs and draw of sampler.py do where nothing is cut.
class Draws {
 public:
  Draws(const Frame& frame, int codes)
      : f(frame),
        codes(codes),
        room(padded(codes, kLanes)),
        memory_(size_t(room) * 8),
        values(memory_.as<float>()),
        weights(values + room) {}

  // The number of the token that `uniform` falls to, and its two log-probabilities. `null` are the
  // logits of the second stream, if there is one.
  int draw(const float* plain, const float* null, float uniform, float* log_prob,
           float* drawn_log_prob) {
    std::copy(plain, plain + codes, values);
    double total, log_total = weigh(&total), plain_log_total = log_total;
    if (null || f.temperature != 1) {
      for (int i = 0; i < codes; ++i) {
        if (null) values[i] = null[i] + float(f.guidance) * (plain[i] - null[i]);
        if (f.temperature > 0) values[i] /= float(f.temperature);
      }
      log_total = weigh(&total);
    }
    int found = 0;
    if (f.temperature == 0) {
      found = std::max_element(values, values + codes) - values;
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
  // e to each value less the largest, and what they sum to; the logarithm of the values' own sum.
  double weigh(double* total) {
    std::fill(values + codes, values + room, -INFINITY);
    const float largest = *std::max_element(values, values + codes);
    for (int i = 0; i < room; i += kFloats) {
      const Floats power = (load(values + i) - largest) * kLog2E;
      const Floats within = power < -126.0f ? Floats{} - 126.0f : power;
      store(weights + i, power < -126.0f ? Floats{} : power_of_two(within));
    }
    *total = 0;
    for (int i = 0; i < codes; ++i) *total += weights[i];
    return largest + std::log(*total);
  }

  const Frame& f;
  const int codes, room;
  const Lines memory_;
  float *const values, *const weights;
};

template <typename Number>
void draw_frame(const Model<Number>& model, Pass<Number> pass, const Frame& frame) {
  const int64_t slots = frame.slots, width = model.width;
  const int64_t futures = pass.batch / frame.streams, half = width / model.heads / 2;
  const int64_t begin = pass.begin;
  const float *const cos = pass.cos, *const sin = pass.sin;
  int64_t most = 0;
  for (int64_t wave = 0; wave < frame.waves; ++wave)
    most = std::max(most, frame.spans[3 * wave + 1] - frame.spans[3 * wave]);
  const Lines x_(size_t(pass.batch) * most * width * 4);
  const Lines logits_(size_t(pass.batch) * most * model.codes * 4);
  float* const x = x_.as<float>();
  pass.x = x;
  pass.logits = logits_.as<float>();
  for (int64_t wave = 0; wave < frame.waves; ++wave) {
    const int64_t* span = frame.spans + 3 * wave;
    const int64_t start = span[0], wanted = span[1] - span[2];
    pass.n = span[1] - start;
    pass.begin = begin + start;
    pass.first = span[2] - start;
    pass.cos = cos + start * half;
    pass.sin = sin + start * half;
    for (int64_t row = 0; row < pass.batch * pass.n; ++row) {
      const int64_t sequence = row / pass.n, slot = start + row % pass.n;
      const int64_t token = frame.drawn[sequence * (frame.tokens + 1) + frame.source[slot]];
      const float* known = frame.base + (sequence * slots + slot) * width;
      for (int64_t i = 0; i < width; i += kFloats)
        store(x + row * width + i, load(known + i) + load(frame.embedding + token * width + i));
    }
    Run(model, pass).run();
#pragma omp parallel
    {
      Draws draws(frame, model.codes);
#pragma omp for
      for (int64_t row = 0; row < futures * wanted; ++row) {
        const int64_t future = row / wanted, token = frame.target[span[2] + row % wanted];
        const int64_t at = future * frame.tokens + token;
        const float* plain = pass.logits + row * model.codes;
        const float* null = frame.streams == 1 ? nullptr : plain + futures * wanted * model.codes;
        const int found = draws.draw(plain, null, frame.uniform[at], frame.log_probs + at,
                                     frame.log_probs + futures * frame.tokens + at);
        for (int64_t sequence = future; sequence < pass.batch; sequence += futures)
          frame.drawn[sequence * (frame.tokens + 1) + token] = found;
      }
    }
  }
}

}  // namespace

// Whether the processor lets this process use what it was compiled for.
extern "C" int drivesim_ready() {
#if defined(HAS_TILES)
  return syscall(SYS_arch_prctl, 0x1023, 18) == 0;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
#else
  return 1;
#endif
}

extern "C" void drivesim_pass_bf16(const Model<bf16>* model, const Pass<bf16>* pass) {
  Run(*model, *pass).run();
}

extern "C" void drivesim_pass_fp32(const Model<float>* model, const Pass<float>* pass) {
  Run(*model, *pass).run();
}

extern "C" void drivesim_frame_bf16(const Model<bf16>* model, const Pass<bf16>* pass,
                                    const Frame* frame) {
  draw_frame(*model, *pass, *frame);
}

extern "C" void drivesim_frame_fp32(const Model<float>* model, const Pass<float>* pass,
                                    const Frame* frame) {
  draw_frame(*model, *pass, *frame);
}
