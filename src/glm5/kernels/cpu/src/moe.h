// An expert layer in one call: router, routed experts, shared expert. Dense layers have a shared expert only.
//
// Four stages: take the input in the forms that are wanted; route and list each expert's tokens; gate and up
// with the activation between; down, added up in the order of rising experts, the shared one last.
#pragma once

#include <stdexcept>
#include <string>

#include "layers.h"

namespace glm5 {
namespace GLM5_ISA {

constexpr int kDownTokens = 4096;  // tokens whose outputs an item of the second half adds up

// Only the groups with the largest sum of their two best scores compete.
inline void keep_best_groups(const Router& router, float* choice) {
  const int experts = router.experts;
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
      if (!kept[static_cast<size_t>(g)] &&
          (top < 0 || best[static_cast<size_t>(g)] > best[static_cast<size_t>(top)]))
        top = g;
    kept[static_cast<size_t>(top)] = 1;
  }
  for (int e = 0; e < experts; e++)
    if (!kept[static_cast<size_t>(e / size)]) choice[e] = -INFINITY;
}

// Sigmoid scores choose with a bias and weigh without it; equal scores: the lower expert first.
inline void choose_experts(const Router& router, const float* bias, const float* logits, int* ids,
                           float* weights, float* told_scores) {
  const int experts = router.experts;
  static thread_local std::vector<float> buffer;
  float* scores = scratch(buffer, static_cast<size_t>(experts) * 2);
  float* choice = scores + experts;
  for (int e = 0; e < experts; e++) {
    scores[e] = 1.0f / (1.0f + std::exp(-logits[e]));
    choice[e] = scores[e] + bias[e];
  }
  if (told_scores) std::memcpy(told_scores, scores, 4 * static_cast<size_t>(experts));
  if (router.groups > 1) keep_best_groups(router, choice);
  // No expert twice, whatever the numbers are: one that is not a number loses against every other.
  static thread_local std::vector<char> taken_store;
  taken_store.assign(static_cast<size_t>(experts), 0);
  float total = 0;
  for (int k = 0; k < router.topk; k++) {
    int top = -1;
    for (int e = 0; e < experts; e++) {
      if (taken_store[static_cast<size_t>(e)]) continue;
      if (top < 0 || choice[e] > choice[top] || std::isnan(choice[top])) top = e;
    }
    ids[k] = top;
    weights[k] = scores[top];
    total += scores[top];
    taken_store[static_cast<size_t>(top)] = 1;
  }
  const float factor = router.normalize ? router.factor / (total + 1e-20f) : router.factor;
  for (int k = 0; k < router.topk; k++) weights[k] *= factor;
}

// One feed-forward network and the rows it works on.
struct Feed {
  const Expert* expert = nullptr;
  std::vector<int> tokens;
  std::vector<float> weights;
  int first = 0;  // its first row among the rows of its kind
};

// What the stages of a call work on; kept by the calling thread, so that memory is taken once.
struct MoeWork {
  Inputs in;
  std::vector<Feed> feeds;
  size_t used = 0, routed = 0;       // feeds in use; those of routed experts come first
  QuantizedRows acts4[2], acts8[2];  // between the halves: of routed experts, of the shared one
  std::vector<float> acts[2];
  std::vector<int> ids;
  std::vector<float> weights, logits, bias;

  int kind(size_t feed) const { return feed < routed ? 0 : 1; }
  QuantizedRows& integers(const Matrix& down, int kind) {
    return down.codes == Codes::int4 ? acts4[kind] : acts8[kind];
  }
  Feed& next(const Expert* expert) {
    if (feeds.size() <= used) feeds.emplace_back();
    Feed& feed = feeds[used++];
    feed.expert = expert, feed.tokens.clear(), feed.weights.clear();
    return feed;
  }
};

inline int num_experts(const MoeLayer& layer) {
  return layer.bank ? static_cast<int>(layer.bank->experts.size()) : 0;
}

// Which forms of the input the layer's matrices read.
inline void want_inputs(const MoeCall& call, MoeWork& work) {
  const MoeLayer& layer = *call.layer;
  work.in.want_nothing();
  work.in.wants_floats = num_experts(layer) && !call.ids;
  const auto want = [&](const Expert& e) {
    work.in.want(e.gate, call.exact), work.in.want(e.up, call.exact);
  };
  if (layer.bank)
    for (const Expert& expert : layer.bank->experts)
      if (expert.is_here()) {
        want(expert);  // they are all of one kind
        break;
      }
  if (layer.has_shared) want(layer.shared);
}

// Asks the router; `ids` and `weights` of the call stand when it brings them.
inline void route(const MoeCall& call, MoeWork& work) {
  const MoeLayer& layer = *call.layer;
  const int count = call.count, topk = layer.router.topk, experts = layer.router.experts;
  const size_t hidden = static_cast<size_t>(layer.hidden), across = static_cast<size_t>(experts);
  int* ids = scratch(work.ids, static_cast<size_t>(count) * topk);
  float* weights = scratch(work.weights, static_cast<size_t>(count) * topk);
  float* logits = scratch(work.logits, static_cast<size_t>(count) * across);
  const float* bias = floats_of(layer.router.bias, work.bias);
  const int bands = (experts + 31) / 32, token_items = (count + 63) / 64;
  parallel(bands * token_items, [&](int item) {
    const int r0 = item / token_items * 32, t0 = item % token_items * 64;
    float_product(layer.router.weight, r0, std::min(experts, r0 + 32), work.in.floats.data(), hidden,
                  counting(count) + t0, std::min(64, count - t0),
                  logits + static_cast<size_t>(t0) * across + r0, across);
  });
  parallel_runs(count, [&](int t) {
    const size_t at = static_cast<size_t>(t), mine = at * topk;
    choose_experts(layer.router, bias, logits + at * across, ids + mine, weights + mine,
                   call.scores ? call.scores + at * across : nullptr);
  });
  const size_t chosen = static_cast<size_t>(count) * topk;
  if (call.chosen_ids) std::memcpy(call.chosen_ids, ids, sizeof(int) * chosen);
  if (call.chosen_weights) std::memcpy(call.chosen_weights, weights, sizeof(float) * chosen);
}

// A feed for each chosen expert, by rising numbers, with its tokens; then the shared one with all of them.
inline void list_feeds(const MoeCall& call, MoeWork& work) {
  const MoeLayer& layer = *call.layer;
  const int count = call.count, experts = num_experts(layer);
  work.used = 0;
  if (experts) {
    const int topk = call.ids ? call.topk : layer.router.topk;
    const int* ids = call.ids ? call.ids : work.ids.data();
    const float* weights = call.ids ? call.weights : work.weights.data();
    std::vector<int> feed_of(static_cast<size_t>(experts), -1);
    for (int i = 0; i < count * topk; i++) feed_of[static_cast<size_t>(ids[i])] = 0;
    for (size_t e = 0; e < feed_of.size(); e++) {
      if (feed_of[e] < 0) continue;
      const Expert& expert = layer.bank->experts[e];
      if (!expert.is_here()) throw std::runtime_error("expert " + std::to_string(e) + " is not in memory");
      feed_of[e] = static_cast<int>(work.used);
      work.next(&expert);
    }
    for (int t = 0; t < count; t++)
      for (int k = 0; k < topk; k++) {
        Feed& feed = work.feeds[static_cast<size_t>(feed_of[static_cast<size_t>(ids[t * topk + k])])];
        feed.tokens.push_back(t), feed.weights.push_back(weights[t * topk + k]);
      }
  }
  work.routed = work.used;
  if (layer.has_shared) {
    Feed& feed = work.next(&layer.shared);
    for (int t = 0; t < count; t++) feed.tokens.push_back(t), feed.weights.push_back(1.0f);
  }
}

// Room for the activations between the two halves: routed experts and the shared one may differ in width and
// kind.
inline void shape_activations(const MoeCall& call, MoeWork& work) {
  int rows[2] = {0, 0};
  for (size_t f = 0; f < work.used; f++) {
    int& mine = rows[work.kind(f)];
    work.feeds[f].first = mine;
    mine += static_cast<int>(work.feeds[f].tokens.size());
  }
  for (int kind = 0; kind < 2; kind++) {
    if (!rows[kind]) continue;
    const Matrix& down = kind == 0 ? work.feeds[0].expert->down : call.layer->shared.down;
    if (!by_integers(down, call.exact)) scratch(work.acts[kind], static_cast<size_t>(rows[kind]) * down.cols);
    else work.integers(down, kind).shape(rows[kind], down.cols, down.block(), down.codes);
  }
}

struct FeedItem {
  int feed, t0, t1, r0, r1;
};

// silu(gate x) * up x of some rows and tokens of a feed, in the form that its down product reads.
inline void gate_up_item(const MoeCall& call, MoeWork& work, const FeedItem& item) {
  const Feed& feed = work.feeds[static_cast<size_t>(item.feed)];
  const Expert& expert = *feed.expert;
  const int kind = work.kind(static_cast<size_t>(item.feed)), rows = item.r1 - item.r0,
            tokens = item.t1 - item.t0;
  const size_t line = static_cast<size_t>(rows + 15) / 16 * 16;
  const int* picks = feed.tokens.data() + item.t0;
  float gate[kItemRows * kItemTokens], up[kItemRows * kItemTokens];
  product(expert.gate, call.exact, item.r0, item.r1, work.in, picks, tokens, gate, line,
          row_of(expert.up, item.r0));
  product(expert.up, call.exact, item.r0, item.r1, work.in, picks, tokens, up, line,
          row_of(expert.gate, item.r1));
  const Matrix& down = expert.down;
  const bool integers = by_integers(down, call.exact);
  QuantizedRows& to = work.integers(down, kind);
  for (int t = item.t0; t < item.t1; t++) {
    float* row = gate + static_cast<size_t>(t - item.t0) * line;
    silu_times(row, up + static_cast<size_t>(t - item.t0) * line, rows);
    const int at = feed.first + t;
    if (!integers) {
      std::memcpy(work.acts[kind].data() + static_cast<size_t>(at) * down.cols + item.r0, row,
                  4 * static_cast<size_t>(rows));
      continue;
    }
    for (int r = 0; r < rows; r += to.block) quantize_block(row + r, to, at, (item.r0 + r) / to.block);
    if (item.r1 == down.cols) clear_tail(to, at);
  }
}

inline void gate_up(const MoeCall& call, MoeWork& work) {
  static thread_local std::vector<FeedItem> item_store;
  std::vector<FeedItem>& items = item_store;  // the caller's own: the pool's threads have others of that name
  items.clear();
  int all_rows = 0;
  for (size_t f = 0; f < work.used; f++) all_rows += work.feeds[f].expert->gate.rows;
  for (size_t f = 0; f < work.used; f++) {
    const int tokens = static_cast<int>(work.feeds[f].tokens.size()), width = work.feeds[f].expert->gate.rows;
    const int rows = item_rows(all_rows, tokens);
    for (int t0 = 0; t0 < tokens; t0 += kItemTokens)
      for (int r0 = 0; r0 < width; r0 += rows)
        items.push_back(
            {static_cast<int>(f), t0, std::min(tokens, t0 + kItemTokens), r0, std::min(width, r0 + rows)});
  }
  parallel_runs(static_cast<int>(items.size()),
                [&](int i) { gate_up_item(call, work, items[static_cast<size_t>(i)]); });
}

// total[t] += weight * down of a feed, for output columns [r0, r1) and tokens [t0, t1).
inline void add_feed(const MoeCall& call, MoeWork& work, size_t f, int r0, int r1, int t0, int t1,
                     float* total, size_t line) {
  const Feed& feed = work.feeds[f];
  const int kind = work.kind(f), rows = r1 - r0;
  const Matrix& down = feed.expert->down;
  const auto begin = std::lower_bound(feed.tokens.begin(), feed.tokens.end(), t0);
  const auto end = std::lower_bound(begin, feed.tokens.end(), t1);
  const int from = static_cast<int>(begin - feed.tokens.begin()),
            to = static_cast<int>(end - feed.tokens.begin());
  const uint8_t* next = f + 1 < work.used ? row_of(work.feeds[f + 1].expert->down, r0) : row_of(down, r1);
  float sums[kItemRows * kItemTokens];
  for (int done = from, n; done < to; done += n) {
    n = std::min({kItemTokens, kItemRows * kItemTokens / static_cast<int>(line), to - done});
    const int* picks = counting(feed.first + done + n) + feed.first + done;
    if (!by_integers(down, call.exact))
      float_product(down, r0, r1, work.acts[kind].data(), static_cast<size_t>(down.cols), picks, n, sums,
                    line);
    else integer_product(down, r0, r1, work.integers(down, kind), picks, n, sums, line, next);
    for (int t = 0; t < n; t++) {
      const size_t at = static_cast<size_t>(done + t);
      add_scaled(total + static_cast<size_t>(feed.tokens[at] - t0) * line,
                 sums + static_cast<size_t>(t) * line, feed.weights[at], rows);
    }
  }
}

// A band of output columns at a time over all experts, so that nothing is added twice at once. An expert's
// tokens stay together: each run of them reads its weights again.
inline void combine(const MoeCall& call, MoeWork& work) {
  const int hidden = call.layer->hidden, count = call.count, down_rows = item_rows(hidden, count);
  const int bands = (hidden + down_rows - 1) / down_rows,
            token_items = (count + kDownTokens - 1) / kDownTokens;
  const size_t line = static_cast<size_t>(down_rows), item = call.x_bf16 ? 2 : 4;
  parallel_runs(bands * token_items, [&](int i) {
    const int r0 = i / token_items * down_rows, r1 = std::min(hidden, r0 + down_rows), rows = r1 - r0;
    const int t0 = i % token_items * kDownTokens, t1 = std::min(count, t0 + kDownTokens);
    static thread_local std::vector<float> buffer;
    float* total = scratch(buffer, static_cast<size_t>(t1 - t0) * line);
    std::memset(total, 0, sizeof(float) * static_cast<size_t>(t1 - t0) * line);
    for (size_t f = 0; f < work.used; f++) add_feed(call, work, f, r0, r1, t0, t1, total, line);
    for (int t = t0; t < t1; t++) {
      float* row = total + static_cast<size_t>(t - t0) * line;
      const size_t at = (static_cast<size_t>(t) * hidden + r0) * item;
      if (call.add) {
        float other[kLongRows];
        widen(static_cast<const char*>(call.add) + at, call.x_bf16, other, rows);
        for (int r = 0; r < rows; r++) row[r] += other[r];
      }
      narrow(row, static_cast<char*>(call.out) + at, call.x_bf16, rows);
    }
  });
}

inline void route_only(const MoeCall& call) {
  static thread_local MoeWork store;
  MoeWork& work = store;
  work.in.want_nothing();
  work.in.wants_floats = true;
  take_inputs(work.in, call.x, call.x_bf16, call.count, call.layer->hidden, call.norm, call.eps);
  route(call, work);
}

// out = add + sum_k weight_k * down(silu(gate x) * up x) + shared(x).
inline void moe(const MoeCall& call) {
  static thread_local MoeWork store;
  MoeWork& work = store;  // the caller's own: the pool's threads have others of that name
  want_inputs(call, work);
  take_inputs(work.in, call.x, call.x_bf16, call.count, call.layer->hidden, call.norm, call.eps);
  if (num_experts(*call.layer) && !call.ids) route(call, work);
  list_feeds(call, work);
  shape_activations(call, work);
  gate_up(call, work);
  combine(call, work);
}

}  // namespace GLM5_ISA
}  // namespace glm5
