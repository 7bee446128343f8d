// The operations of a training step that take the most time in torch on a CPU: causal attention
// (after the projections), RMSNorm and the MLP's activation. Each has one function for its result
// and one for its gradients, in bf16 and in float32.
//
// Attention works on blocks of 64 queries and 64 keys. It does not store the scores; the gradient
// function recomputes them (FlashAttention-2, arXiv 2307.08691). The maximum score need not be
// subtracted, because RMSNorm bounds the scores (see is_bounded in operators.py). Sums are in a
// fixed order, so results do not depend on the number of threads.
//
// Axes: B sequences, N slots, H query heads, G key heads, R = H / G, E channels of a head,
// F = (H + 2 G) E, D width.

#include "products.h"

STRUCTURE(Attention,
  int64_t batch, slots, heads, kv_heads, channels;
  const Number* qkv;             // [B, N, F]
  const float *q_gain, *k_gain;  // [E]
  const float *cos, *sin;        // [N, E / 2]
  Number* mixed;                 // [B, N, H E]
  float* weights;                // [B, H, N padded to 64]: log2 of each query's sum of weights
)

STRUCTURE(AttentionGrad,
  const Attention<Number>* forward;
  const Number* mixed_grad;          // [B, N, H E]
  Number* qkv_grad;                  // [B, N, F]
  float *q_gain_grad, *k_gain_grad;  // [B H, E], [B G, E]: Python sums the rows
)

STRUCTURE(Norm,
  int64_t rows, width;
  const float *x, *gain;  // [rows, D], [D]
  Number* normed;         // [rows, D]
)

STRUCTURE(NormGrad,
  int64_t rows, width, parts;
  const float *x, *gain;  // [rows, D], [D]
  const Number* grad;     // [rows, D]
  float* x_grad;          // [rows, D]
  float* gain_grads;      // [parts, D]: one gradient per part of the rows; Python sums the parts
)

STRUCTURE(Activation,
  int64_t count;      // number of elements, a multiple of 16
  const Number* x;
  Number* activated;
)

STRUCTURE(ActivationGrad,
  int64_t count;
  const Number *x, *grad;
  Number* x_grad;
)

namespace {

constexpr int kBlock = 64;
constexpr int kMostChannels = 1024;  // upper bound of a head's channels

// Backpropagate through the RMSNorm of a row x. `given` is the gradient of the normalised row.
// Write the gradient of x to `x_grad`, and add the gradient of the gain to `gain_grad`.
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

// Describes the queries, keys or values in the projections: their number of heads, the index of
// their first head, the gain of their RMSNorm (null for values, which have none), and a factor that
// multiplies them.
struct Part {
  int64_t heads, first;
  const float* gain;
  float scale;
};

template <typename Number>
class AttentionRun {
 public:
  explicit AttentionRun(const Attention<Number>& given) : a(given) {}
  explicit AttentionRun(const AttentionGrad<Number>& given) : a(*given.forward), g(&given) {}

  void forward() const {
    const Buffer<Number> q(a.batch * a.heads * size);
    const Buffer<Number> k(a.batch * a.kv_heads * size), v(a.batch * a.kv_heads * size);
#pragma omp parallel
    {
      Tiles tiles;
      const Buffer<Number> rows(size), weights(kBlock * kBlock);
      const Buffer<float> sums(size_t(kBlock) * channels);
#pragma omp for
      for (int each = 0; each < a.batch * a.heads; ++each) take(queries, each, q + each * size);
#pragma omp for
      for (int each = 0; each < a.batch * a.kv_heads; ++each) {
        take(keys, each, rows);
        columns(k + each * size, rows);
        take(values, each, rows);
        pairs(v + each * size, rows);
      }
#pragma omp for collapse(2) schedule(dynamic)
      for (int each = 0; each < a.batch * a.heads; ++each)
        for (int block = 0; block < room / kBlock; ++block) {
          const size_t of_keys = key_head_of(each) * size;
          attend(each, block * kBlock, q + each * size, k + of_keys, v + of_keys, weights, sums);
        }
    }
  }

  void backward() const {
    const size_t all_queries = a.batch * a.heads * size, all_keys = a.batch * a.kv_heads * size;
    const Buffer<Number> k(all_keys), k_transposed(all_keys), v(all_keys);
    const Buffer<float> k_grads(all_queries), v_grads(all_queries);
#pragma omp parallel
    {
      Tiles tiles;
      const Own own{size, room};
#pragma omp for
      for (int each = 0; each < a.batch * a.kv_heads; ++each) {
        take(keys, each, k + each * size);
        transposed(k_transposed + each * size, k + each * size);
        take(values, each, v + each * size);
      }
#pragma omp for schedule(dynamic)
      for (int each = 0; each < a.batch * a.heads; ++each) {
        const size_t of_keys = key_head_of(each) * size;
        lay_out(each, own);
        std::memset(own.q_grad, 0, size * 4);
        for (int block = 0; block < room; block += kBlock)
          block_grads(each, block, own, k + of_keys, k_transposed + of_keys, v + of_keys,
                      k_grads + each * size, v_grads + each * size);
        query_grads(each, own.q_grad);
      }
#pragma omp for
      for (int each = 0; each < a.batch * a.kv_heads; ++each) key_grads(each, k_grads, v_grads);
    }
  }

 private:
  // The buffers of one thread, for the gradients of one query head. The last three buffers are for
  // one block of keys and one block of queries.
  struct Own {
    const size_t size;
    const int room;
    const Buffer<Number> rows{size}, q_columns{size}, q_pairs{size};
    const Buffer<Number> out_columns{size}, out_pairs{size};  // the output's gradient
    const Buffer<float> q_grad{size};                         // [E, N]
    // [N]: for each query, the mean of its weights' gradients, weighted by the weights themselves
    const Buffer<float> means{size_t(room)};
    const Buffer<Number> weights{kBlock * kBlock};      // [64 keys, 64 queries]
    const Buffer<Number> score_grads{kBlock * kBlock};  // [64 keys, 64 queries]
    const Buffer<Number> score_pairs{kBlock * kBlock};  // score_grads as [64 / 16][64 / I][16][I]
  };

  size_t mixed_at(int each, int slot) const {
    return ((each / a.heads * slots + slot) * a.heads + each % a.heads) * channels;
  }
  size_t at(const Part& part, int each, int slot) const {
    const int64_t features = a.heads + 2 * a.kv_heads;
    return ((each / part.heads * slots + slot) * features + part.first + each % part.heads) *
           channels;
  }
  int key_head_of(int each) const {
    return each / a.heads * a.kv_heads + each % a.heads / group;
  }
  const float* cos_of(int slot) const { return a.cos + size_t(slot) * channels / 2; }
  const float* sin_of(int slot) const { return a.sin + size_t(slot) * channels / 2; }

  // Write a head's queries, keys or values as a left-hand side [N, E], where N is padded with zeros
  // to a multiple of 64. Queries and keys are normalised and rotated.
  void take(const Part& part, int each, Number* rows) const {
    alignas(64) float row[kMostChannels];
    for (int slot = 0; slot < slots; ++slot) {
      const Number* from = a.qkv + at(part, each, slot);
      Number* to = rows + size_t(slot) * channels;
      if (!part.gain) {
        std::memcpy(to, from, channels * sizeof(Number));
        continue;
      }
      for (int i = 0; i < channels; i += kFloats) store(row + i, load(from + i));
      const float norm = scale_of(row, channels) * part.scale;
      for (int i = 0; i < channels; i += kFloats)
        store(row + i, load(row + i) * norm * load(part.gain + i));
      rotate(row, channels, cos_of(slot), sin_of(slot), 1);
      for (int i = 0; i < channels; i += kFloats) store(to + i, load(row + i));
    }
    std::memset(rows + size_t(slots) * channels, 0,
                size_t(room - slots) * channels * sizeof(Number));
  }

  // Copy rows [N, E] to the layout [N / 16][E / I][16][I], a right-hand side with one column per
  // slot.
  void columns(Number* to, const Number* rows) const {
    for (int slot = 0; slot < room; ++slot) {
      Number* column = to + size_t(slot) / kLanes * kLanes * channels + slot % kLanes * kI;
      for (int i = 0; i < channels; i += kI)
        std::memcpy(column + i * kLanes, rows + size_t(slot) * channels + i, 4);
    }
  }

  // Copy rows [N, E] to the layout [E / 16][N / I][16][I], a right-hand side with one row per slot.
  void pairs(Number* to, const Number* rows) const {
    for (int slot = 0; slot < room; slot += kI)
      for (int i = 0; i < channels; i += kLanes) {
        const Number* from = rows + size_t(slot) * channels + i;
        Number* pair = to + size_t(i) * room + slot * kLanes;
        for (int lane = 0; lane < kLanes; ++lane)
          for (int of = 0; of < kI; ++of) pair[kI * lane + of] = from[of * channels + lane];
      }
  }

  // Copy rows [N, E] to the layout [E, N], a left-hand side with one column per slot.
  void transposed(Number* to, const Number* rows) const {
    for (int slot = 0; slot < room; ++slot)
      for (int i = 0; i < channels; ++i)
        to[size_t(i) * room + slot] = rows[size_t(slot) * channels + i];
  }

  // Fill the buffers that block_grads reads: a head's queries, the gradients of its output, and the
  // means.
  void lay_out(int each, const Own& own) const {
    take(queries, each, own.rows);
    columns(own.q_columns, own.rows);
    pairs(own.q_pairs, own.rows);
    std::memset(own.rows, 0, size * sizeof(Number));
    std::memset(own.means, 0, room * 4);
    for (int slot = 0; slot < slots; ++slot) {
      const size_t from = mixed_at(each, slot);
      std::memcpy(own.rows + size_t(slot) * channels, g->mixed_grad + from,
                  channels * sizeof(Number));
      Floats sum{};
      for (int i = 0; i < channels; i += kFloats)
        sum += load(g->mixed_grad + from + i) * load(a.mixed + from + i);
      own.means[slot] = total(sum);
    }
    columns(own.out_columns, own.rows);
    pairs(own.out_pairs, own.rows);
  }

  // Compute the attention of 64 queries of a head.
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

  // Apply the causal mask: set weights to 0 where the key is after the query. If `above`, each lane
  // is a query, and `offset` is the first query minus the key. Otherwise each lane is a key, and
  // `offset` is the first key minus the query.
  static Floats kept(Floats weight, int offset, bool above) {
    Ints lanes;
    for (int lane = 0; lane < kFloats; ++lane) lanes[lane] = lane;
    const Ints mask = above ? lanes + offset >= 0 : lanes + offset <= 0;
    return (Floats)((Ints)weight & mask);
  }

  // Compute one query head's contribution to the gradients [64, E] of 64 keys and of their values.
  // These keys also contribute to the gradients of the queries: add that to own.q_grad.
  void block_grads(int each, int key, const Own& own, const Number* k, const Number* k_transposed,
                   const Number* v, float* k_grads, float* v_grads) const {
    float *const k_grad = k_grads + size_t(key) * channels;
    float *const v_grad = v_grads + size_t(key) * channels;
    const Number *const weights = own.weights, *const grads = own.score_grads;
    const Number* const grad_pairs = own.score_pairs;
    std::memset(k_grad, 0, size_t(kBlock) * channels * 4);
    std::memset(v_grad, 0, size_t(kBlock) * channels * 4);
    for (int query = key; query < room; query += kBlock) {
      for (int column = 0; column < kBlock; column += kTogether)
        score_grads(each, key, query + column, own, k, v);
      const size_t step = size_t(room) * kLanes, at = size_t(query) * kLanes;
      product<true>(weights, kBlock, own.out_pairs + at, step, channels, kBlock, v_grad,
                    channels, kBlock);
      product<true>(grads, kBlock, own.q_pairs + at, step, channels, kBlock, k_grad,
                    channels, kBlock);
      product<true>(k_transposed + key, room, grad_pairs, kLanes * kBlock, kBlock, kBlock,
                    own.q_grad + query, room, channels);
    }
  }

  // Compute the attention weights and the gradients of the scores, for 64 keys and kTogether
  // queries.
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
      Number* const to_pairs = own.score_pairs + (column + i) / kLanes * kLanes * kBlock +
                               (column + i) % kLanes * kI;
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
        store_pair(to_pairs + row * kLanes, grad[0], grad[1]);
      }
    }
  }

  // Backpropagate through the rotation and the norm of one slot in a head. `grad` is the gradient
  // of the rotated query or key. Write the gradient of the projection, and add the gradient of the
  // gain to `gain_grads`.
  void unnormed(const Part& part, int each, int slot, float* grad, float* gain_grads) const {
    rotate(grad, channels, cos_of(slot), sin_of(slot), -1);
    alignas(64) float row[kMostChannels];
    const size_t from = at(part, each, slot);
    for (int i = 0; i < channels; i += kFloats) store(row + i, load(a.qkv + from + i));
    norm_row_grad(row, channels, part.gain, grad, g->qkv_grad + from,
                  gain_grads + size_t(each) * channels);
  }

  void query_grads(int each, const float* q_grad) const {
    std::memset(g->q_gain_grad + size_t(each) * channels, 0, channels * 4);
    const float scale = queries.scale / kLog2E;
    alignas(64) float row[kMostChannels];
    for (int slot = 0; slot < slots; ++slot) {
      for (int i = 0; i < channels; ++i) row[i] = q_grad[size_t(i) * room + slot] * scale;
      unnormed(queries, each, slot, row, g->q_gain_grad);
    }
  }

  void key_grads(int each, const float* k_grads, const float* v_grads) const {
    std::memset(g->k_gain_grad + size_t(each) * channels, 0, channels * 4);
    const size_t first = (each / a.kv_heads * a.heads + each % a.kv_heads * group) * size;
    alignas(64) float row[kMostChannels];
    for (int slot = 0; slot < slots; ++slot) {
      for (int i = 0; i < channels; i += kFloats) {
        Floats k_sum{}, v_sum{};
        for (int query = 0; query < group; ++query) {
          const size_t from = first + query * size + size_t(slot) * channels + i;
          k_sum += load(k_grads + from);
          v_sum += load(v_grads + from);
        }
        store(row + i, k_sum * 0.69314718f);  // undo the factor 1 / ln 2 in the queries
        store(g->qkv_grad + at(values, each, slot) + i, v_sum);
      }
      unnormed(keys, each, slot, row, g->k_gain_grad);
    }
  }

  static constexpr int kI = kInterleaved<Number>;
  const Attention<Number>& a;
  const AttentionGrad<Number>* const g = nullptr;
  const int slots = a.slots, channels = a.channels, group = a.heads / a.kv_heads;
  const int room = padded(slots, kBlock);
  const size_t size = size_t(room) * channels;  // number of elements of a head
  const Part queries{a.heads, 0, a.q_gain, kLog2E / std::sqrt(float(channels))};
  const Part keys{a.kv_heads, a.heads, a.k_gain, 1};
  const Part values{a.kv_heads, a.heads + a.kv_heads, nullptr, 1};
};

template <typename Number>
void norm(const Norm<Number>& n) {
#pragma omp parallel for
  for (int64_t row = 0; row < n.rows; ++row)
    norm_row(n.x + row * n.width, n.width, n.gain, n.normed + row * n.width);
}

template <typename Number>
void norm_grad(const NormGrad<Number>& n) {
  const int64_t of_part = (n.rows + n.parts - 1) / n.parts;
#pragma omp parallel for
  for (int64_t part = 0; part < n.parts; ++part) {
    float* gain_grad = n.gain_grads + part * n.width;
    std::memset(gain_grad, 0, n.width * 4);
    for (int64_t row = part * of_part; row < std::min(n.rows, (part + 1) * of_part); ++row)
      norm_row_grad(n.x + row * n.width, n.width, n.gain, n.grad + row * n.width,
                    n.x_grad + row * n.width, gain_grad);
  }
}

template <typename Number>
void activation(const Activation<Number>& a) {
#pragma omp parallel for
  for (int64_t i = 0; i < a.count; i += kFloats)
    store(a.activated + i, squared_relu(load(a.x + i)));
}

template <typename Number>
void activation_grad(const ActivationGrad<Number>& a) {
#pragma omp parallel for
  for (int64_t i = 0; i < a.count; i += kFloats) {
    const Floats value = load(a.x + i);
    store(a.x_grad + i, 2.0f * (value < 0.0f ? Floats{} : value) * load(a.grad + i));
  }
}

}  // namespace

OPERATOR(attention, Attention, AttentionRun(*given).forward())
OPERATOR(attention_grad, AttentionGrad, AttentionRun(*given).backward())
OPERATOR(norm, Norm, norm(*given))
OPERATOR(norm_grad, NormGrad, norm_grad(*given))
OPERATOR(activation, Activation, activation(*given))
OPERATOR(activation_grad, ActivationGrad, activation_grad(*given))
