// The parts of a training step on a CPU that take torch longest: causal attention from its
// projections on, RMSNorm and the MLP's activation, each with its gradients, in bf16 or float32.
//
// Attention goes over blocks of 64 queries and 64 keys and keeps no score but what the gradient
// needs to make it again (FlashAttention-2, arXiv 2307.08691). Scores need no maximum taken off:
// norms bound them (library.py says how far). Every result is a sum in a fixed order,
// whatever the number of threads.
//
// Axes: B sequences, N slots, H query heads, G key heads, R = H / G, E channels of a head,
// F = (H + 2 G) E, D width.

#include "products.h"

// Pointers to contiguous tensors; attention.py fills it in the same order.
template <typename Number>
struct Attention {
  int64_t batch, slots, heads, kv_heads, channels;
  const Number* qkv;                      // [B, N, F]
  const float *q_gain, *k_gain;           // [E]
  const float *cos, *sin;                 // [N, E / 2]
  Number* mixed;                          // [B, N, H E]
  float* weights;                         // [B, H, N padded to 64]: log2 of the sum of weights
  const Number* mixed_grad;               // [B, N, H E]
  Number* qkv_grad;                       // [B, N, F]
  float *q_gain_grad, *k_gain_grad;       // [B H, E], [B G, E]
};

namespace {

constexpr int kBlock = 64;

// The gradient of a row x before RMSNorm, from that of what it gave; the gain's is added up.
template <typename Given, typename Grad>
void norm_row_grad(const float* x, int width, const float* gain, const Given* given, Grad* x_grad,
                   float* gain_grad) {
  const float scale = scale_of(x, width);
  Floats product{};
  for (int i = 0; i < width; i += kFloats) {
    const Floats normal = load(x + i) * scale, g = load(given + i);
    store(gain_grad + i, load(gain_grad + i) + g * normal);
    product += g * load(gain + i) * normal;
  }
  const float mean = total(product) / width;
  for (int i = 0; i < width; i += kFloats)
    store(x_grad + i, (load(given + i) * load(gain + i) - load(x + i) * scale * mean) * scale);
}

// A head's slots in the layouts that products ask for, N padded to 64 with zeros.
template <typename Number>
class Head {
 public:
  static constexpr int kI = kInterleaved<Number>;

  Head(int slots, int channels) : room(padded(slots, kBlock)), channels(channels) {}

  size_t size() const { return size_t(room) * channels; }

  // [N, E]: a left-hand side with a row for each slot.
  void row(Number* rows, int slot, const float* from) const {
    for (int i = 0; i < channels; i += kFloats)
      store(rows + size_t(slot) * channels + i, load(from + i));
  }

  // [N / 16][E / I][16][I]: a right-hand side with a column for each slot.
  void columns(Number* to, const Number* rows) const {
    for (int slot = 0; slot < room; ++slot) {
      Number* column = to + size_t(slot) / kLanes * kLanes * channels + slot % kLanes * kI;
      for (int i = 0; i < channels; i += kI)
        std::memcpy(column + i * kLanes, rows + size_t(slot) * channels + i, 4);
    }
  }

  // [E / 16][N / I][16][I]: a right-hand side with a row for each slot.
  void pairs(Number* to, const Number* rows) const {
    for (int slot = 0; slot < room; slot += kI)
      for (int i = 0; i < channels; i += kLanes) {
        const Number* from = rows + size_t(slot) * channels + i;
        Number* pair = to + size_t(i) * room + slot * kLanes;
        for (int lane = 0; lane < kLanes; ++lane)
          for (int of = 0; of < kI; ++of) pair[kI * lane + of] = from[of * channels + lane];
      }
  }

  // [E, N]: a left-hand side with a column for each slot.
  void transposed(Number* to, const Number* rows) const {
    for (int slot = 0; slot < room; ++slot)
      for (int i = 0; i < channels; ++i)
        to[size_t(i) * room + slot] = rows[size_t(slot) * channels + i];
  }

  const int room, channels;
};

template <typename Number>
class AttentionRun {
 public:
  explicit AttentionRun(const Attention<Number>& given)
      : a(given),
        head(given.slots, given.channels),
        slots(given.slots),
        channels(given.channels),
        room(head.room),
        group(given.heads / given.kv_heads),
        features((given.heads + 2 * given.kv_heads) * given.channels),
        width(given.heads * given.channels),
        queries(given.batch * given.heads),
        keys(given.batch * given.kv_heads),
        query_scale(kLog2E / std::sqrt(float(given.channels))) {}

  void forward() {
    const Lines q_(queries * head.size() * sizeof(Number)), k_(keys * head.size() * sizeof(Number));
    const Lines v_(keys * head.size() * sizeof(Number));
    Number *const q = q_.as<Number>(), *const k = k_.as<Number>(), *const v = v_.as<Number>();
#pragma omp parallel
    {
      Tiles tiles;
      const Lines rows_(head.size() * sizeof(Number));
      const Lines weights_(size_t(kBlock) * kBlock * sizeof(Number));
      const Lines sums_(size_t(kBlock) * channels * 4);
      Number *const rows = rows_.as<Number>(), *const weights = weights_.as<Number>();
#pragma omp for
      for (int each = 0; each < queries; ++each) normed_queries(q + each * head.size(), each);
#pragma omp for
      for (int each = 0; each < keys; ++each) {
        normed_keys(rows, each);
        head.columns(k + each * head.size(), rows);
        values(rows, each);
        head.pairs(v + each * head.size(), rows);
      }
#pragma omp for collapse(2) schedule(dynamic)
      for (int each = 0; each < queries; ++each)
        for (int block = 0; block < room / kBlock; ++block) {
          const size_t of_keys = key_head_of(each) * head.size();
          attend(each, block * kBlock, q + each * head.size(), k + of_keys, v + of_keys, weights,
                 sums_.as<float>());
        }
    }
  }

  void backward() {
    const size_t one = head.size();
    const size_t bytes = keys * one * sizeof(Number);
    const Lines k_(bytes), k_transposed_(bytes), v_(bytes);
    const Lines k_grads_(queries * one * 4), v_grads_(queries * one * 4);
    Number *const k = k_.as<Number>(), *const k_transposed = k_transposed_.as<Number>();
    Number* const v = v_.as<Number>();
    float *const k_grads = k_grads_.as<float>(), *const v_grads = v_grads_.as<float>();
#pragma omp parallel
    {
      Tiles tiles;
      const Own own(*this);
#pragma omp for
      for (int each = 0; each < keys; ++each) {
        normed_keys(k + each * one, each);
        head.transposed(k_transposed + each * one, k + each * one);
        values(v + each * one, each);
      }
#pragma omp for schedule(dynamic)
      for (int each = 0; each < queries; ++each) {
        const size_t of_keys = key_head_of(each) * one;
        own.take(*this, each);
        std::memset(own.q_grad, 0, one * 4);
        for (int block = 0; block < room; block += kBlock)
          block_grads(each, block, own, k + of_keys, k_transposed + of_keys, v + of_keys,
                      k_grads + each * one, v_grads + each * one);
        query_grads(each, own.q_grad);
      }
#pragma omp for
      for (int each = 0; each < keys; ++each) key_grads(each, k_grads, v_grads);
    }
  }

 private:
  // What a thread keeps of one query head for its gradients, and of one pair of blocks.
  struct Own {
    explicit Own(const AttentionRun& run)
        : rows_(run.head.size() * sizeof(Number)),
          q_columns_(run.head.size() * sizeof(Number)),
          q_pairs_(run.head.size() * sizeof(Number)),
          out_columns_(run.head.size() * sizeof(Number)),
          out_pairs_(run.head.size() * sizeof(Number)),
          q_grad_(run.head.size() * 4),
          means_(size_t(run.room) * 4),
          weights_(size_t(kBlock) * kBlock * sizeof(Number)),
          score_grads_(size_t(kBlock) * kBlock * sizeof(Number)),
          score_pairs_(size_t(kBlock) * kBlock * sizeof(Number)),
          rows(rows_.as<Number>()),
          q_columns(q_columns_.as<Number>()),
          q_pairs(q_pairs_.as<Number>()),
          out_columns(out_columns_.as<Number>()),
          out_pairs(out_pairs_.as<Number>()),
          weights(weights_.as<Number>()),
          score_grads(score_grads_.as<Number>()),
          score_pairs(score_pairs_.as<Number>()),
          q_grad(q_grad_.as<float>()),
          means(means_.as<float>()) {}

    // Lay out the head's queries and its output's gradients.
    void take(const AttentionRun& run, int each) const {
      run.normed_queries(rows, each);
      run.head.columns(q_columns, rows);
      run.head.pairs(q_pairs, rows);
      std::memset(rows, 0, run.head.size() * sizeof(Number));
      for (int slot = 0; slot < run.room; ++slot) means[slot] = 0;
      for (int slot = 0; slot < run.slots; ++slot) {
        const size_t at = run.mixed_at(each, slot);
        std::memcpy(rows + size_t(slot) * run.channels, run.a.mixed_grad + at,
                    run.channels * sizeof(Number));
        Floats sum{};
        for (int i = 0; i < run.channels; i += kFloats)
          sum += load(run.a.mixed_grad + at + i) * load(run.a.mixed + at + i);
        means[slot] = total(sum);
      }
      run.head.columns(out_columns, rows);
      run.head.pairs(out_pairs, rows);
    }

    const Lines rows_, q_columns_, q_pairs_, out_columns_, out_pairs_, q_grad_, means_, weights_,
        score_grads_, score_pairs_;
    Number *const rows, *const q_columns, *const q_pairs;
    Number *const out_columns, *const out_pairs;  // of the gradient of the head's output
    Number *const weights, *const score_grads;    // [64 keys, 64 queries]
    Number* const score_pairs;                    // the latter as [64 / 16][64 / I][16][I]
    float* const q_grad;                        // [E, N]
    float* const means;                         // [N]: of the weights' gradients, by the weights
  };

  size_t mixed_at(int each, int slot) const {
    return (size_t(each / a.heads) * slots + slot) * width + each % a.heads * channels;
  }
  size_t qkv_at(int sequence, int slot, int of_all_heads) const {
    return (size_t(sequence) * slots + slot) * features + size_t(of_all_heads) * channels;
  }
  size_t query_at(int each, int slot) const {
    return qkv_at(each / a.heads, slot, each % a.heads);
  }
  size_t key_at(int each, int slot) const {
    return qkv_at(each / a.kv_heads, slot, a.heads + each % a.kv_heads);
  }
  size_t value_at(int each, int slot) const {
    return key_at(each, slot) + size_t(a.kv_heads) * channels;
  }
  int key_head_of(int each) const {
    return each / a.heads * a.kv_heads + each % a.heads / group;
  }

  void normed(Number* rows, int slot, size_t at, const float* gain, float scale) const {
    alignas(64) float row[1024];
    for (int i = 0; i < channels; i += kFloats) store(row + i, load(a.qkv + at + i));
    const float norm = scale_of(row, channels) * scale;
    for (int i = 0; i < channels; i += kFloats)
      store(row + i, load(row + i) * norm * load(gain + i));
    rotate(row, channels, cos_of(slot), sin_of(slot), 1);
    head.row(rows, slot, row);
  }
  const float* cos_of(int slot) const { return a.cos + size_t(slot) * channels / 2; }
  const float* sin_of(int slot) const { return a.sin + size_t(slot) * channels / 2; }

  void clear_padding(Number* rows) const {
    std::memset(rows + size_t(slots) * channels, 0,
                size_t(room - slots) * channels * sizeof(Number));
  }
  void normed_queries(Number* rows, int each) const {
    for (int slot = 0; slot < slots; ++slot)
      normed(rows, slot, query_at(each, slot), a.q_gain, query_scale);
    clear_padding(rows);
  }
  void normed_keys(Number* rows, int each) const {
    for (int slot = 0; slot < slots; ++slot)
      normed(rows, slot, key_at(each, slot), a.k_gain, 1);
    clear_padding(rows);
  }
  void values(Number* rows, int each) const {
    for (int slot = 0; slot < slots; ++slot)
      std::memcpy(rows + size_t(slot) * channels, a.qkv + value_at(each, slot),
                  channels * sizeof(Number));
    clear_padding(rows);
  }

  // What 64 queries see.
  void attend(int each, int first, const Number* q, const Number* k, const Number* v,
              Number* weights, float* sums) const {
    alignas(64) float scores[kBlock * kTogether];
    Floats seen[kBlock] = {};
    std::memset(sums, 0, size_t(kBlock) * channels * 4);
    const Number* queries_of = q + size_t(first) * channels;
    for (int key = 0; key <= first; key += kBlock) {
      for (int column = 0; column < kBlock; column += kTogether) {
        product<false>(queries_of, channels, k + size_t(key + column) * channels,
                       size_t(kLanes) * channels, kTogether, channels, scores, kTogether, kBlock);
        for (int row = 0; row < kBlock; ++row)
          for (int i = 0; i < kTogether; i += kFloats) {
            Floats weight = power_of_two<Number>(load(scores + row * kTogether + i));
            if (key == first) weight = kept(weight, column + i - row, false);
            seen[row] += weight;
            store(weights + row * kBlock + column + i, weight);
          }
      }
      product<true>(weights, kBlock, v + key * kLanes, size_t(room) * kLanes, channels, kBlock,
                    sums, channels, kBlock);
    }
    for (int row = 0; row < kBlock; ++row) {
      const float weight = total(seen[row]);
      a.weights[size_t(each) * room + first + row] = std::log2(weight);
      if (first + row >= slots) continue;
      Number* to = a.mixed + mixed_at(each, first + row);
      for (int i = 0; i < channels; i += kFloats)
        store(to + i, load(sums + row * channels + i) / weight);
    }
  }

  // Weights of lanes at `offset` + lane that are at most 0, or else at least 0; 0 for the others.
  static Floats kept(Floats weight, int offset, bool above) {
    Ints lanes;
    for (int lane = 0; lane < kFloats; ++lane) lanes[lane] = lane;
    const Ints mask = above ? lanes + offset >= 0 : lanes + offset <= 0;
    return (Floats)((Ints)weight & mask);
  }

  // Gradients of 64 keys and values [64, E] of a query head, and what they add to its queries'.
  void block_grads(int each, int key, const Own& own, const Number* k, const Number* k_transposed,
                   const Number* v, float* k_grads, float* v_grads) const {
    float *const k_grad = k_grads + size_t(key) * channels;
    float *const v_grad = v_grads + size_t(key) * channels;
    std::memset(k_grad, 0, size_t(kBlock) * channels * 4);
    std::memset(v_grad, 0, size_t(kBlock) * channels * 4);
    for (int query = key; query < room; query += kBlock) {
      for (int column = 0; column < kBlock; column += kTogether)
        score_grads(each, key, query + column, own, k, v);
      const size_t step = size_t(room) * kLanes, at = size_t(query) * kLanes;
      product<true>(own.weights, kBlock, own.out_pairs + at, step, channels, kBlock, v_grad,
                    channels, kBlock);
      product<true>(own.score_grads, kBlock, own.q_pairs + at, step, channels, kBlock, k_grad,
                    channels, kBlock);
      product<true>(k_transposed + key, room, own.score_pairs, kLanes * kBlock, kBlock, kBlock,
                    own.q_grad + query, room, channels);
    }
  }

  // Weights of 64 keys for kTogether queries, and the gradients of their scores.
  void score_grads(int each, int key, int query, const Own& own, const Number* k,
                   const Number* v) const {
    alignas(64) float scores[kBlock * kTogether], grads[kBlock * kTogether];
    const size_t at_query = size_t(query) * channels, step = size_t(kLanes) * channels;
    product<false>(k + size_t(key) * channels, channels, own.q_columns + at_query, step, kTogether,
                   channels, scores, kTogether, kBlock);
    product<false>(v + size_t(key) * channels, channels, own.out_columns + at_query, step,
                   kTogether, channels, grads, kTogether, kBlock);
    const int column = query % kBlock;
    const bool diagonal = query - column == key;
    for (int i = 0; i < kTogether; i += kFloats) {
      const Floats seen = load(a.weights + size_t(each) * room + query + i);
      const Floats mean = load(own.means + query + i);
      Number* const pairs = own.score_pairs + (column + i) / kLanes * kLanes * kBlock +
                            (column + i) % kLanes * Head<Number>::kI;
      for (int row = 0; row < kBlock; row += 2) {
        Floats grad[2];
        for (int of = 0; of < 2; ++of) {
          const int at = (row + of) * kTogether + i, to = (row + of) * kBlock + column + i;
          Floats power = load(scores + at) - seen;
          power = power < -126.0f ? Floats{} - 126.0f : power;
          Floats weight = power_of_two<Number>(power);
          if (diagonal) weight = kept(weight, column + i - row - of, true);
          grad[of] = weight * (load(grads + at) - mean);
          store(own.weights + to, weight);
          store(own.score_grads + to, grad[of]);
        }
        store_pair(pairs + row * kLanes, grad[0], grad[1]);
      }
    }
  }

  // From gradients of what was normed and rotated to those of the projections, and of the gain.
  void unnormed(float* grad, int slot, size_t at, const float* gain, float* gain_grad) const {
    rotate(grad, channels, cos_of(slot), sin_of(slot), -1);
    alignas(64) float row[1024];
    for (int i = 0; i < channels; i += kFloats) store(row + i, load(a.qkv + at + i));
    norm_row_grad(row, channels, gain, grad, a.qkv_grad + at, gain_grad);
  }

  void query_grads(int each, const float* q_grad) const {
    float* gain_grad = a.q_gain_grad + size_t(each) * channels;
    std::memset(gain_grad, 0, channels * 4);
    const float scale = query_scale / kLog2E;
    alignas(64) float row[1024];
    for (int slot = 0; slot < slots; ++slot) {
      for (int i = 0; i < channels; ++i) row[i] = q_grad[size_t(i) * room + slot] * scale;
      unnormed(row, slot, query_at(each, slot), a.q_gain, gain_grad);
    }
  }

  void key_grads(int each, const float* k_grads, const float* v_grads) const {
    float* gain_grad = a.k_gain_grad + size_t(each) * channels;
    std::memset(gain_grad, 0, channels * 4);
    const size_t first =
        size_t(each / a.kv_heads * a.heads + each % a.kv_heads * group) * head.size();
    alignas(64) float row[1024];
    for (int slot = 0; slot < slots; ++slot) {
      for (int i = 0; i < channels; i += kFloats) {
        Floats k_sum{}, v_sum{};
        for (int query = 0; query < group; ++query) {
          const size_t at = first + query * head.size() + size_t(slot) * channels + i;
          k_sum += load(k_grads + at);
          v_sum += load(v_grads + at);
        }
        store(row + i, k_sum * 0.69314718f);  // queries carry 1 / ln 2
        store(a.qkv_grad + value_at(each, slot) + i, v_sum);
      }
      unnormed(row, slot, key_at(each, slot), a.k_gain, gain_grad);
    }
  }

  const Attention<Number>& a;
  const Head<Number> head;
  const int slots, channels, room, group, features, width, queries, keys;
  const float query_scale;
};

constexpr int kNormParts = 64;  // of the rows, whose sums are added in this order

template <typename Number>
void norm(int64_t rows, int64_t width, const float* x, const float* gain, Number* normed) {
#pragma omp parallel for
  for (int64_t row = 0; row < rows; ++row)
    norm_row(x + row * width, width, gain, normed + row * width);
}

template <typename Number>
void norm_grad(int64_t rows, int64_t width, const float* x, const float* gain, const Number* grad,
               float* x_grad, float* gain_grads) {
  const int64_t of_part = (rows + kNormParts - 1) / kNormParts;
#pragma omp parallel for
  for (int part = 0; part < kNormParts; ++part) {
    float* gain_grad = gain_grads + part * width;
    std::memset(gain_grad, 0, width * 4);
    for (int64_t row = part * of_part; row < std::min(rows, (part + 1) * of_part); ++row)
      norm_row_grad(x + row * width, width, gain, grad + row * width, x_grad + row * width,
                    gain_grad);
  }
}

template <typename Number>
void activation(int64_t count, const Number* x, Number* activated) {
#pragma omp parallel for
  for (int64_t i = 0; i < count; i += kFloats) store(activated + i, squared_relu(load(x + i)));
}

template <typename Number>
void activation_grad(int64_t count, const Number* x, const Number* grad, Number* x_grad) {
#pragma omp parallel for
  for (int64_t i = 0; i < count; i += kFloats) {
    Floats value = load(x + i);
    value = value < 0.0f ? Floats{} : value;
    store(x_grad + i, 2.0f * value * load(grad + i));
  }
}

}  // namespace

// RMSNorm is of x [rows, D]; its gradients are of x, and of the gain in 64 parts [64, D]. The
// activation, squared ReLU, is of `count` numbers, a multiple of 16.
#define FOR_NUMBER(name, Number)                                                                  \
  extern "C" void drivesim_attention_##name(const Attention<Number>* given) {                     \
    AttentionRun(*given).forward();                                                               \
  }                                                                                               \
  extern "C" void drivesim_attention_grad_##name(const Attention<Number>* given) {                \
    AttentionRun(*given).backward();                                                              \
  }                                                                                               \
  extern "C" void drivesim_norm_##name(int64_t rows, int64_t width, const float* x,               \
                                       const float* gain, Number* normed) {                       \
    norm(rows, width, x, gain, normed);                                                           \
  }                                                                                               \
  extern "C" void drivesim_norm_grad_##name(int64_t rows, int64_t width, const float* x,          \
                                            const float* gain, const Number* grad, float* x_grad, \
                                            float* gain_grads) {                                  \
    norm_grad(rows, width, x, gain, grad, x_grad, gain_grads);                                    \
  }                                                                                               \
  extern "C" void drivesim_activation_##name(int64_t count, const Number* x, Number* activated) { \
    activation(count, x, activated);                                                              \
  }                                                                                               \
  extern "C" void drivesim_activation_grad_##name(int64_t count, const Number* x,                 \
                                                  const Number* grad, Number* x_grad) {           \
    activation_grad(count, x, grad, x_grad);                                                      \
  }

FOR_NUMBER(bf16, bf16)
FOR_NUMBER(fp32, float)
