// The NEON kernels beside the portable ones, on a machine or an emulator of AArch64 (`make neon`).
//
// Products of integers must agree to the bit; what is summed in floats, to rounding.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <utility>

#include "plan.h"
#include "threads.h"

using namespace glm5;

namespace {

std::mt19937 random_bits(1);
int comparisons = 0, failures = 0;

float normal() { return std::normal_distribution<float>()(random_bits); }
std::vector<float> floats(size_t count, float scale = 1) {
  std::vector<float> values(count);
  for (float& value : values) value = scale * normal();
  return values;
}
uint16_t bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// A random matrix and what it points to.
struct Weights {
  std::vector<uint8_t> data;
  std::vector<uint16_t> scales;
  Matrix matrix;
};
Weights weights(Codes codes, int rows, int cols, int group) {
  Weights made;
  made.matrix.codes = codes, made.matrix.rows = rows, made.matrix.cols = cols, made.matrix.group = group;
  if (codes == Codes::bf16) {
    made.data.resize(static_cast<size_t>(rows) * cols * 2 + 64);
    for (size_t i = 0; i < static_cast<size_t>(rows) * cols; i++) {
      const uint16_t value = bf16(normal());
      std::memcpy(made.data.data() + 2 * i, &value, 2);
    }
  } else {
    made.data.resize(static_cast<size_t>(rows) * cols / (codes == Codes::int4 ? 2 : 1) + 64);
    for (uint8_t& byte : made.data) byte = static_cast<uint8_t>(random_bits());
    made.scales.resize(static_cast<size_t>(rows) * (cols / group) + 32);
    for (uint16_t& scale : made.scales) scale = bf16(0.01f * normal());
    made.matrix.scale_type = Scales::bf16, made.matrix.scales = made.scales.data();
  }
  made.matrix.data = made.data.data();
  return made;
}

std::vector<float> linear_by(const Table& table, const Weights& w, const std::vector<float>& x, int count) {
  std::vector<float> out(static_cast<size_t>(count) * w.matrix.rows);
  LinearOutput to;
  to.matrix = &w.matrix, to.out = out.data(), to.stride = static_cast<size_t>(w.matrix.rows);
  LinearCall call;
  call.x = x.data(), call.count = count, call.output = &to, call.outputs = 1;
  table.linear(call);
  return out;
}

std::vector<float> attend_by(const Table& table, const Weights& kv_b, const std::vector<float>& q,
                             const std::vector<float>& turns, const std::vector<float>& cache, int count,
                             int heads, int slots) {
  AttendCall call;
  call.kv_b = &kv_b.matrix, call.q = q.data(), call.turns = turns.data();
  call.count = count, call.heads = heads, call.nope = 24, call.rotary = 16, call.latent = kv_b.matrix.cols,
  call.value = 40, call.scale = 0.2f;
  std::vector<float> out(static_cast<size_t>(count) * heads * call.value);
  std::vector<int32_t> rows(static_cast<size_t>(count), 0), counts;
  for (int t = 0; t < count; t++) counts.push_back(slots - t);
  call.out = out.data(), call.seen.rows = rows.data(), call.seen.counts = counts.data();
  const int32_t page = 0, *tables[] = {&page};
  call.cache.pages.tables = tables;
  call.cache.keys = call.cache.values = cache.data();
  call.cache.key_width = call.latent + call.rotary, call.cache.value_width = call.latent;
  call.cache.key_stride = call.cache.value_stride = static_cast<size_t>(call.cache.key_width);
  table.attend(call);
  return out;
}

// `tolerance` of the size of what is wanted; 0 = the same bits.
void compare(const char* what, int rows, int cols, int count, const std::vector<float>& found,
             const std::vector<float>& wanted, double tolerance) {
  comparisons++;
  double difference = 0, size = 0;
  for (size_t i = 0; i < wanted.size(); i++) {
    difference += std::pow(static_cast<double>(found[i]) - wanted[i], 2);
    size += std::pow(static_cast<double>(wanted[i]), 2);
  }
  const bool same = std::memcmp(found.data(), wanted.data(), 4 * wanted.size()) == 0;
  if (tolerance == 0 ? same : std::sqrt(difference) <= tolerance * std::sqrt(size)) return;
  std::printf("%s %dx%d, %d rows: differs by %.2g of %.2g\n", what, rows, cols, count, std::sqrt(difference),
              std::sqrt(size));
  failures++;
}

// What `call` gives with each set in use, NEON's first.
template <class F>
std::pair<std::vector<float>, std::vector<float>> by_both(F&& call) {
  use_table("neon");
  std::vector<float> found = call(table());
  use_table("portable");
  return {std::move(found), call(table())};
}

}  // namespace

int main() {
  set_threads(2);
  if (!use_table("neon")) return std::printf("no NEON dot product here\n"), 2;
  const std::pair<Codes, const char*> kinds[] = {
      {Codes::int4, "int4"}, {Codes::int8, "int8"}, {Codes::bf16, "bf16"}};
  for (const auto& [codes, name] : kinds)
    for (const int cols : {32, 64, 160, 512, 1024, 1184})
      for (const int rows : {1, 17, 70})
        for (const int count : {1, 2, 3, 5, 13}) {
          const Weights w = weights(codes, rows, cols, cols % 64 ? 32 : 64);
          const std::vector<float> x = floats(static_cast<size_t>(count) * cols);
          const auto [found, wanted] = by_both([&](const Table& set) { return linear_by(set, w, x, count); });
          compare(name, rows, cols, count, found, wanted, codes == Codes::bf16 ? 1e-5 : 0);
        }
  for (const int latent : {64, 512})
    for (const int slots : {5, 70}) {
      const int heads = 5, count = 3;
      const Weights kv_b = weights(Codes::int4, heads * 64, latent, 64);
      const auto q = floats(static_cast<size_t>(count) * heads * 40),
                 cache = floats(static_cast<size_t>(slots) * (latent + 16));
      std::vector<float> turns;
      for (int i = 0; i < count * 8; i++)
        turns.push_back(std::cos(0.1f * i)), turns.push_back(std::sin(0.1f * i));
      const auto [found, wanted] = by_both(
          [&](const Table& set) { return attend_by(set, kv_b, q, turns, cache, count, heads, slots); });
      // W_UV meets activations rounded to int8: another last bit before may round another way.
      compare("attention over slots", slots, latent, count, found, wanted, 1e-3);
    }
  std::printf("%d comparisons, %d failed\n", comparisons, failures);
  return failures ? 1 : 0;
}
