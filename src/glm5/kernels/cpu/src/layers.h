// Whole layers in one call each: a linear layer, an expert layer with its router.
//
// Work is cut into items of weight rows, whatever the number of threads; an item's result depends
// on nothing but its inputs, so threads and neighbours in the batch never change an answer.
#pragma once

#include <atomic>

#include "products.h"
#include "plan.h"
#include "threads.h"

namespace glm5 {
namespace GLM5_ISA {

constexpr int kItemRows = 64;     // weight rows in an item: whole blocks of the next activations
constexpr int kShortRows = 16;
constexpr int kLongRows = 128;    // the same for few activation rows: long stretches of memory
constexpr int kItemsAThread = 6;  // enough to share out evenly, few enough to read long runs
constexpr int kItemTokens = 240;  // activation rows in an item: their sums stay in the second cache
constexpr int kDownTokens = 4096;  // tokens whose outputs an item of the second half adds up
constexpr int kFewTokens = kItemRows * kItemTokens / kLongRows;

// Weight rows in an item, of `rows` in all, when that many activation rows pass.
inline int item_rows(int rows, int count) {
  if (count > kFewTokens) return kItemRows;
  return std::clamp(rows / (threads() * kItemsAThread) / kItemRows * kItemRows, kItemRows, kLongRows);
}

inline const int* counting(int count) {
  static thread_local std::vector<int> numbers;
  while (static_cast<int>(numbers.size()) < count) numbers.push_back(static_cast<int>(numbers.size()));
  return numbers.data();
}

// Each thread takes the items of its own stretch in order, so that it reads long runs of weights;
// one that is done helps with what is left of the others'.
template <class F>
void parallel_runs(int items, F&& body) {
  struct alignas(64) Next { std::atomic<int> item{0}; };
  constexpr int kMost = 64;
  const int stretches = std::min({threads(), items, kMost});
  if (stretches <= 1) {
    for (int i = 0; i < items; i++) body(i);
    return;
  }
  Next next[kMost];
  const auto begin = [&](int s) { return static_cast<int>(static_cast<int64_t>(items) * s / stretches); };
  for (int s = 0; s < stretches; s++) next[s].item.store(begin(s), std::memory_order_relaxed);
  parallel(stretches, [&](int mine) {
    for (int step = 0; step < stretches; step++) {
      const int s = (mine + step) % stretches, end = begin(s + 1);
      for (int i; (i = next[s].item.fetch_add(1, std::memory_order_relaxed)) < end;) body(i);
    }
  });
}

// Activations in the forms that a layer's matrices read; made once, in parallel.
struct Inputs {
  std::vector<float> floats;  // [count, cols]
  QuantizedRows integers[4];  // int4 and int8, blocks of 64 and of 32
  bool wants_floats = false, wanted[4] = {};
  int cols = 0;

  static int kind(const Matrix& m) { return (m.codes == Codes::int4 ? 0 : 2) + (m.block() == 64 ? 0 : 1); }
  void want_nothing() {
    wants_floats = false;
    for (bool& each : wanted) each = false;
  }
  void want(const Matrix& m, bool exact) { (exact || !m.block() ? wants_floats : wanted[kind(m)]) = true; }
};

inline bool by_integers(const Matrix& m, bool exact) { return !exact && m.block() != 0; }

// x: [count, cols] floats or bf16, through the norm if there is one, into every form that is wanted.
inline void take_inputs(Inputs& in, const void* x, bool is_bf16, int count, int cols, const float* norm, float eps) {
  in.cols = cols;
  if (in.wants_floats) scratch(in.floats, static_cast<size_t>(count) * cols);
  for (int kind = 0; kind < 4; kind++)
    if (in.wanted[kind]) in.integers[kind].shape(count, cols, kind % 2 ? 32 : 64, kind < 2 ? Codes::int4 : Codes::int8);
  const int together = std::max(1, 16384 / std::max(1, cols));
  parallel((count + together - 1) / together, [&](int item) {
    static thread_local std::vector<float> buffer;
    float* row = scratch(buffer, static_cast<size_t>(cols));
    for (int t = item * together; t < std::min(count, (item + 1) * together); t++) {
      widen(static_cast<const char*>(x) + static_cast<size_t>(t) * cols * (is_bf16 ? 2 : 4), is_bf16, row, cols);
      if (norm) rms_norm(row, norm, eps, row, cols);
      if (in.wants_floats) std::memcpy(in.floats.data() + static_cast<size_t>(t) * cols, row, 4 * static_cast<size_t>(cols));
      for (int kind = 0; kind < 4; kind++) if (in.wanted[kind]) quantize_row(row, in.integers[kind], t);
    }
  });
}

inline const uint8_t* row_of(const Matrix& m, int row) { return m.data + static_cast<size_t>(row) * m.row_bytes(); }

inline void product(const Matrix& m, bool exact, int r0, int r1, const Inputs& in, const int* picks, int count, float* out, size_t ldo, const uint8_t* after) {
  if (by_integers(m, exact)) integer_product(m, r0, r1, in.integers[Inputs::kind(m)], picks, count, out, ldo, after);
  else float_product(m, r0, r1, in.floats.data(), static_cast<size_t>(in.cols), picks, count, out, ldo);
}

// RMSNorm of rows. In bf16 the normalized value is rounded before the weight is applied, and after.
inline void norm_rows(const NormCall& call) {
  const size_t bytes = static_cast<size_t>(call.cols) * (call.bf16 ? 2 : 4);
  const int together = std::max(1, 32768 / std::max(1, call.cols));
  parallel((call.count + together - 1) / together, [&](int item) {
    static thread_local std::vector<float> buffer;
    float* row = scratch(buffer, static_cast<size_t>(call.cols));
    for (int t = item * together; t < std::min(call.count, (item + 1) * together); t++) {
      const char* from = static_cast<const char*>(call.x) + static_cast<size_t>(t) * bytes;
      char* to = static_cast<char*>(call.out) + static_cast<size_t>(t) * bytes;
      widen(from, call.bf16, row, call.cols);
      if (call.bf16) {
        const float factor = rms_factor(row, call.eps, call.cols);
        for (int i = 0; i < call.cols; i++) row[i] *= factor;
        narrow(row, to, true, call.cols);
        widen(to, true, row, call.cols);
        for (int i = 0; i < call.cols; i++) row[i] *= call.weight[i];
      } else {
        rms_norm(row, call.weight, call.eps, row, call.cols);
      }
      narrow(row, to, call.bf16, call.cols);
    }
  });
}

// out[t] = W x[t] (+ bias) (+ add[t]), all matrices reading the same x.
inline void linear(const LinearCall& call) {
  static thread_local Inputs in;
  Inputs& shared = in;
  shared.want_nothing();
  // Few activation rows: short items end together, and the stretch of a thread is one stream all the same.
  const int each_rows = call.count < kManyRows ? kShortRows : kItemRows;
  const auto bands_of = [&](int i) { return (call.output[i].matrix->rows + each_rows - 1) / each_rows; };
  int items = 0;
  for (int i = 0; i < call.outputs; i++) {
    shared.want(*call.output[i].matrix, call.exact);
    items += bands_of(i);
  }
  take_inputs(shared, call.x, call.x_bf16, call.count, call.output[0].matrix->cols, call.norm, call.eps);
  const int token_items = (call.count + kItemTokens - 1) / kItemTokens;
  parallel_runs(items * token_items, [&](int item) {
    int band = item / token_items;
    const int t0 = item % token_items * kItemTokens, t1 = std::min(call.count, t0 + kItemTokens);
    int which = 0;
    while (band >= bands_of(which)) band -= bands_of(which++);
    const LinearOutput& to = call.output[which];
    const Matrix& m = *to.matrix;
    const int r0 = band * each_rows, r1 = std::min(m.rows, r0 + each_rows), rows = r1 - r0;
    float sums[kItemRows * kItemTokens];
    product(m, call.exact, r0, r1, shared, counting(call.count) + t0, t1 - t0, sums, kItemRows, row_of(m, r1));
    for (int t = t0; t < t1; t++) {
      float* row = sums + static_cast<size_t>(t - t0) * kItemRows;
      if (to.bias) for (int r = 0; r < rows; r++) row[r] += to.bias[r0 + r];
      const size_t at = static_cast<size_t>(t) * to.stride + static_cast<size_t>(r0);
      if (to.add) {
        float other[kItemRows];
        widen(static_cast<const char*>(to.add) + at * (to.bf16 ? 2 : 4), to.bf16, other, rows);
        for (int r = 0; r < rows; r++) row[r] += other[r];
      }
      narrow(row, static_cast<char*>(to.out) + at * (to.bf16 ? 2 : 4), to.bf16, rows);
    }
  });
}

// Sigmoid scores choose with a bias and weigh without it; equal scores: the lower expert first.
inline void choose_experts(const Router& router, const float* logits, int* ids, float* weights) {
  const int experts = router.experts;
  static thread_local std::vector<float> buffer;
  float* scores = scratch(buffer, static_cast<size_t>(experts) * 2);
  float* choice = scores + experts;
  for (int e = 0; e < experts; e++) {
    scores[e] = 1.0f / (1.0f + std::exp(-logits[e]));
    choice[e] = scores[e] + router.bias[e];
  }
  if (router.groups > 1) {
    const int size = experts / router.groups;
    std::vector<float> best(static_cast<size_t>(router.groups));
    for (int g = 0; g < router.groups; g++) {
      float first = -INFINITY, second = -INFINITY;
      for (int e = g * size; e < (g + 1) * size; e++) {
        if (choice[e] > first) second = first, first = choice[e];
        else if (choice[e] > second) second = choice[e];
      }
      best[static_cast<size_t>(g)] = first + second;
    }
    std::vector<char> kept(static_cast<size_t>(router.groups), 0);
    for (int n = 0; n < router.topk_groups; n++) {
      int top = -1;
      for (int g = 0; g < router.groups; g++)
        if (!kept[static_cast<size_t>(g)] && (top < 0 || best[static_cast<size_t>(g)] > best[static_cast<size_t>(top)])) top = g;
      kept[static_cast<size_t>(top)] = 1;
    }
    for (int e = 0; e < experts; e++) if (!kept[static_cast<size_t>(e / size)]) choice[e] = -INFINITY;
  }
  float total = 0;
  for (int k = 0; k < router.topk; k++) {
    int top = 0;
    for (int e = 1; e < experts; e++) if (choice[e] > choice[top]) top = e;
    ids[k] = top;
    weights[k] = scores[top];
    total += scores[top];
    choice[top] = -INFINITY;
  }
  const float factor = router.normalize ? router.factor / (total + 1e-20f) : router.factor;
  for (int k = 0; k < router.topk; k++) weights[k] *= factor;
}

// One feed-forward network and the rows it works on; the shared expert and dense layers are such.
struct Feed {
  const Expert* expert;
  std::vector<int> tokens;
  std::vector<float> weights;
  int first = 0;  // its first row among the rows of its kind
};

// out = add + sum_k weight_k * down(silu(gate x) * up x) + shared(x), in the order of rising experts.
inline void moe(const MoeCall& call) {
  const MoeLayer& layer = *call.layer;
  static thread_local Inputs inputs;
  static thread_local std::vector<Feed> feed_store;
  static thread_local QuantizedRows acts4_store[2], acts8_store[2];
  static thread_local std::vector<float> acts_store[2];
  Inputs& in = inputs;
  std::vector<Feed>& feeds = feed_store;
  QuantizedRows(&acts4)[2] = acts4_store;
  QuantizedRows(&acts8)[2] = acts8_store;
  std::vector<float>(&acts)[2] = acts_store;

  in.want_nothing();
  in.wants_floats = layer.router.experts > 0 && !call.ids;
  auto want = [&](const Expert& e) { in.want(e.gate, call.exact), in.want(e.up, call.exact); };
  if (!layer.experts.empty()) want(layer.experts[0]);
  if (layer.has_shared) want(layer.shared);
  take_inputs(in, call.x, call.x_bf16, call.count, layer.hidden, call.norm, call.eps);

  // Route, then list each chosen expert's tokens.
  const int topk = layer.router.topk, count = call.count, experts = static_cast<int>(layer.experts.size());
  static thread_local std::vector<int> id_store;
  static thread_local std::vector<float> weight_store, logit_store;
  const int* ids = call.ids;
  const float* weights = call.weights;
  if (experts && !ids) {
    int* chosen = scratch(id_store, static_cast<size_t>(count) * topk);
    float* weighed = scratch(weight_store, static_cast<size_t>(count) * topk);
    float* logits = scratch(logit_store, static_cast<size_t>(count) * experts);
    const int bands = (experts + 31) / 32, token_items = (count + 63) / 64;
    parallel(bands * token_items, [&](int item) {
      const int r0 = item / token_items * 32, t0 = item % token_items * 64;
      float_product(layer.router.weight, r0, std::min(experts, r0 + 32), in.floats.data(), static_cast<size_t>(layer.hidden),
                    counting(count) + t0, std::min(64, count - t0), logits + static_cast<size_t>(t0) * experts + r0, static_cast<size_t>(experts));
    });
    parallel_runs(count, [&](int t) {
      choose_experts(layer.router, logits + static_cast<size_t>(t) * experts, chosen + static_cast<size_t>(t) * topk, weighed + static_cast<size_t>(t) * topk);
    });
    ids = chosen, weights = weighed;
  }
  std::vector<int> load(static_cast<size_t>(experts) + 1, 0), place(static_cast<size_t>(experts), -1);
  if (experts) for (int i = 0; i < count * topk; i++) load[static_cast<size_t>(ids[i])]++;
  size_t used = 0;
  auto next_feed = [&](const Expert* expert) -> Feed& {
    if (feeds.size() <= used) feeds.emplace_back();
    Feed& feed = feeds[used++];
    feed.expert = expert, feed.tokens.clear(), feed.weights.clear();
    return feed;
  };
  for (int e = 0; e < experts; e++)
    if (load[static_cast<size_t>(e)]) place[static_cast<size_t>(e)] = static_cast<int>(used), next_feed(&layer.experts[static_cast<size_t>(e)]);
  if (experts)
    for (int t = 0; t < count; t++)
      for (int k = 0; k < topk; k++) {
        Feed& feed = feeds[static_cast<size_t>(place[static_cast<size_t>(ids[t * topk + k])])];
        feed.tokens.push_back(t), feed.weights.push_back(weights[t * topk + k]);
      }
  const size_t routed = used;
  if (layer.has_shared) {
    Feed& feed = next_feed(&layer.shared);
    for (int t = 0; t < count; t++) feed.tokens.push_back(t), feed.weights.push_back(1.0f);
  }
  // Activations between the two halves: routed experts and the shared one may differ in width and kind.
  int rows_of[2] = {0, 0};
  for (size_t f = 0; f < used; f++) {
    const int kind = f < routed ? 0 : 1;
    feeds[f].first = rows_of[kind];
    rows_of[kind] += static_cast<int>(feeds[f].tokens.size());
  }
  for (int kind = 0; kind < 2; kind++) {
    if (!rows_of[kind]) continue;
    const Matrix& down = kind == 0 ? layer.experts[0].down : layer.shared.down;
    if (!by_integers(down, call.exact)) scratch(acts[kind], static_cast<size_t>(rows_of[kind]) * down.cols);
    else if (down.codes == Codes::int4) acts4[kind].shape(rows_of[kind], down.cols, down.block(), Codes::int4);
    else acts8[kind].shape(rows_of[kind], down.cols, down.block(), Codes::int8);
  }

  struct Item { int feed, t0, t1, r0, r1; };
  static thread_local std::vector<Item> item_store;
  std::vector<Item>& items = item_store;
  items.clear();
  int all_rows = 0;
  for (size_t f = 0; f < used; f++) all_rows += feeds[f].expert->gate.rows;
  const int down_rows = item_rows(layer.hidden, count);
  for (size_t f = 0; f < used; f++) {
    const int tokens = static_cast<int>(feeds[f].tokens.size()), width = feeds[f].expert->gate.rows;
    const int up_rows = item_rows(all_rows, tokens);
    for (int t0 = 0; t0 < tokens; t0 += kItemTokens)
      for (int r0 = 0; r0 < width; r0 += up_rows)
        items.push_back({static_cast<int>(f), t0, std::min(tokens, t0 + kItemTokens), r0, std::min(width, r0 + up_rows)});
  }
  parallel_runs(static_cast<int>(items.size()), [&](int i) {
    const Item& item = items[static_cast<size_t>(i)];
    const Feed& feed = feeds[static_cast<size_t>(item.feed)];
    const int kind = static_cast<size_t>(item.feed) < routed ? 0 : 1, rows = item.r1 - item.r0;
    const size_t line = static_cast<size_t>(rows + 15) / 16 * 16;
    float gate[kItemRows * kItemTokens], up[kItemRows * kItemTokens];
    product(feed.expert->gate, call.exact, item.r0, item.r1, in, feed.tokens.data() + item.t0, item.t1 - item.t0, gate, line,
            row_of(feed.expert->up, item.r0));
    product(feed.expert->up, call.exact, item.r0, item.r1, in, feed.tokens.data() + item.t0, item.t1 - item.t0, up, line,
            row_of(feed.expert->gate, item.r1));
    const Matrix& down = feed.expert->down;
    const bool integers = by_integers(down, call.exact);
    QuantizedRows& to = down.codes == Codes::int4 ? acts4[kind] : acts8[kind];
    for (int t = item.t0; t < item.t1; t++) {
      float* row = gate + static_cast<size_t>(t - item.t0) * line;
      silu_times(row, up + static_cast<size_t>(t - item.t0) * line, rows);
      const int at = feed.first + t;
      if (!integers) {
        std::memcpy(acts[kind].data() + static_cast<size_t>(at) * down.cols + item.r0, row, 4 * static_cast<size_t>(rows));
        continue;
      }
      for (int r = 0; r < rows; r += to.block) quantize_block(row + r, to, at, (item.r0 + r) / to.block);
      if (item.r1 == down.cols) clear_tail(to, at);
    }
  });

  // Down, a band of output columns at a time over all experts, so that nothing is added twice at once.
  // An expert's tokens stay together: each run of them reads its weights again.
  const int bands = (layer.hidden + down_rows - 1) / down_rows, token_items = (count + kDownTokens - 1) / kDownTokens;
  const size_t line = static_cast<size_t>(down_rows);
  parallel_runs(bands * token_items, [&](int i) {
    const int r0 = i / token_items * down_rows, r1 = std::min(layer.hidden, r0 + down_rows), rows = r1 - r0;
    const int t0 = i % token_items * kDownTokens, t1 = std::min(count, t0 + kDownTokens);
    static thread_local std::vector<float> buffer;
    float* total = scratch(buffer, static_cast<size_t>(t1 - t0) * line);
    float sums[kItemRows * kItemTokens];
    std::memset(total, 0, sizeof(float) * static_cast<size_t>(t1 - t0) * line);
    for (size_t f = 0; f < used; f++) {
      const Feed& feed = feeds[f];
      const int kind = f < routed ? 0 : 1;
      const auto begin = std::lower_bound(feed.tokens.begin(), feed.tokens.end(), t0);
      const auto end = std::lower_bound(begin, feed.tokens.end(), t1);
      const int from = static_cast<int>(begin - feed.tokens.begin()), to = static_cast<int>(end - feed.tokens.begin());
      const Matrix& down = feed.expert->down;
      const uint8_t* next = f + 1 < used ? row_of(feeds[f + 1].expert->down, r0) : row_of(down, r1);
      for (int done = from, n; done < to; done += n) {
        n = std::min(kItemTokens, to - done);
        const int* picks = counting(feed.first + done + n) + feed.first + done;
        if (!by_integers(down, call.exact)) float_product(down, r0, r1, acts[kind].data(), static_cast<size_t>(down.cols), picks, n, sums, line);
        else integer_product(down, r0, r1, down.codes == Codes::int4 ? acts4[kind] : acts8[kind], picks, n, sums, line, next);
        for (int t = 0; t < n; t++)
          add_scaled(total + static_cast<size_t>(feed.tokens[static_cast<size_t>(done + t)] - t0) * line, sums + static_cast<size_t>(t) * line,
                     feed.weights[static_cast<size_t>(done + t)], rows);
      }
    }
    for (int t = t0; t < t1; t++) {
      float* row = total + static_cast<size_t>(t - t0) * line;
      const size_t at = static_cast<size_t>(t) * layer.hidden + r0;
      if (call.add) {
        float other[kLongRows];
        widen(static_cast<const char*>(call.add) + at * (call.x_bf16 ? 2 : 4), call.x_bf16, other, rows);
        for (int r = 0; r < rows; r++) row[r] += other[r];
      }
      narrow(row, static_cast<char*>(call.out) + at * (call.x_bf16 ? 2 : 4), call.x_bf16, rows);
    }
  });
  if (call.chosen_ids && experts) std::memcpy(call.chosen_ids, ids, sizeof(int) * static_cast<size_t>(count) * topk);
}

}  // namespace GLM5_ISA
}  // namespace glm5
