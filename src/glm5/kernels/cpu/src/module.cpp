// The Python module `glm5.kernels._cpu`: addresses and sizes in, nothing out. `glm5.kernels.cpu`
// checks shapes and keeps the tensors alive; nothing here may be called with unchecked sizes.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <initializer_list>
#include <stdexcept>
#include <utility>

#include "plan.h"
#include "threads.h"

namespace nb = nanobind;
using namespace glm5;

namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

Matrix make_matrix(int codes, int rows, int cols, int group, uintptr_t data, int scale_type, uintptr_t scales) {
  Matrix m;
  m.codes = static_cast<Codes>(codes);
  m.rows = rows, m.cols = cols, m.group = group;
  m.scale_type = static_cast<Scales>(scale_type);
  m.data = at<const uint8_t>(data);
  m.scales = at<const void>(scales);
  return m;
}

void run_linear(const Matrix& matrix, uintptr_t x, bool x_bf16, int count, uintptr_t out, bool out_bf16, uintptr_t bias,
                uintptr_t add, uintptr_t norm, float eps, bool exact) {
  LinearOutput output;
  output.matrix = &matrix;
  output.bias = at<const float>(bias);
  output.add = at<const void>(add);
  output.out = at<void>(out);
  output.stride = static_cast<size_t>(matrix.rows);
  output.bf16 = out_bf16;
  LinearCall call;
  call.x = at<const void>(x), call.x_bf16 = x_bf16, call.count = count;
  call.norm = at<const float>(norm), call.eps = eps, call.exact = exact;
  call.output = &output, call.outputs = 1;
  nb::gil_scoped_release release;
  table().linear(call);
}

void run_rms_norm(uintptr_t x, bool bf16, int count, int cols, uintptr_t weight, float eps, uintptr_t out) {
  NormCall call;
  call.x = at<const void>(x), call.out = at<void>(out), call.weight = at<const float>(weight);
  call.bf16 = bf16, call.count = count, call.cols = cols, call.eps = eps;
  nb::gil_scoped_release release;
  table().norm_rows(call);
}

void run_moe(const MoeLayer& layer, uintptr_t x, bool x_bf16, int count, uintptr_t out, uintptr_t add, uintptr_t norm,
             float eps, bool exact, uintptr_t ids, uintptr_t weights, uintptr_t chosen_ids) {
  MoeCall call;
  call.layer = &layer;
  call.x = at<const void>(x), call.x_bf16 = x_bf16, call.count = count;
  call.out = at<void>(out), call.add = at<const void>(add);
  call.norm = at<const float>(norm), call.eps = eps, call.exact = exact;
  call.ids = at<const int>(ids), call.weights = at<const float>(weights), call.chosen_ids = at<int>(chosen_ids);
  nb::gil_scoped_release release;
  table().moe(call);
}

void run_attend(const Matrix& kv_b, uintptr_t q, bool bf16, uintptr_t turns, uintptr_t cache, bool cache_bf16, size_t cache_row_bytes,
                uintptr_t out, int count, int heads, int nope, int rotary, int value, uintptr_t cache_rows, uintptr_t slots,
                uintptr_t counts, int max_slots, float scale, bool exact) {
  AttendCall call;
  call.kv_b = &kv_b;
  call.q = at<const void>(q), call.bf16 = bf16, call.turns = at<const float>(turns);
  call.cache = at<const void>(cache), call.cache_bf16 = cache_bf16, call.cache_row_bytes = cache_row_bytes;
  call.out = at<void>(out);
  call.count = count, call.heads = heads, call.nope = nope, call.rotary = rotary, call.latent = kv_b.cols, call.value = value;
  call.cache_rows = at<const int32_t>(cache_rows), call.slots = at<const int32_t>(slots);
  call.counts = at<const int32_t>(counts), call.max_slots = max_slots, call.scale = scale, call.exact = exact;
  nb::gil_scoped_release release;
  table().attend(call);
}

void run_attend_prompt(uintptr_t q_own, std::vector<size_t> q_own_at, uintptr_t q_shared, std::vector<size_t> q_shared_at, uintptr_t k_own,
                       std::vector<size_t> k_own_at, uintptr_t k_shared, std::vector<size_t> k_shared_at, uintptr_t v, std::vector<size_t> v_at,
                       uintptr_t out, bool bf16, bool shared_bf16, std::vector<int> sizes, bool causal, uintptr_t visible, size_t visible_at, float scale) {
  if (q_own_at.size() != 3 || q_shared_at.size() != 3 || k_own_at.size() != 3 || k_shared_at.size() != 2 || v_at.size() != 3 || sizes.size() != 8)
    throw std::invalid_argument("offsets or sizes are incomplete");
  PromptCall call;
  call.q_own = at<const void>(q_own), call.q_shared = at<const void>(q_shared), call.k_own = at<const void>(k_own);
  call.k_shared = at<const void>(k_shared), call.v = at<const void>(v), call.out = at<void>(out);
  for (size_t i = 0; i < 3; i++) call.q_own_at[i] = q_own_at[i], call.q_shared_at[i] = q_shared_at[i], call.k_own_at[i] = k_own_at[i], call.v_at[i] = v_at[i];
  for (size_t i = 0; i < 2; i++) call.k_shared_at[i] = k_shared_at[i];
  call.bf16 = bf16, call.shared_bf16 = shared_bf16;
  call.batch = sizes[0], call.queries = sizes[1], call.keys = sizes[2], call.heads = sizes[3], call.kv_heads = sizes[4];
  call.own = sizes[5], call.shared = sizes[6], call.value = sizes[7];
  call.causal = causal, call.visible = at<const uint8_t>(visible), call.visible_at = visible_at, call.scale = scale;
  nb::gil_scoped_release release;
  table().attend_prompt(call);
}

void run_select(uintptr_t q, bool bf16, uintptr_t turns, uintptr_t weights, uintptr_t cache, bool bf16_cache, size_t cache_row_bytes,
                int count, int heads, int width, int rotary, int keys, int topk, uintptr_t cache_rows, uintptr_t visible,
                uintptr_t slots, uintptr_t counts) {
  SelectCall call;
  call.q = at<const void>(q), call.bf16 = bf16, call.turns = at<const float>(turns), call.weights = at<const float>(weights);
  call.cache = at<const void>(cache), call.bf16_cache = bf16_cache, call.cache_row_bytes = cache_row_bytes;
  call.count = count, call.heads = heads, call.width = width, call.rotary = rotary, call.keys = keys, call.topk = topk;
  call.cache_rows = at<const int32_t>(cache_rows), call.visible = at<const uint8_t>(visible);
  call.slots = at<int32_t>(slots), call.counts = at<int32_t>(counts);
  nb::gil_scoped_release release;
  table().select(call);
}

void run_decode_layer(const DecoderLayer& layer, uintptr_t x, uintptr_t out, bool bf16, int batch, int queries, int keys, bool causal, uintptr_t turns,
                      uintptr_t latents, size_t latents_row_bytes, uintptr_t index_keys, size_t index_row_bytes, bool cache_bf16, uintptr_t visible,
                      size_t visible_at, uintptr_t slots, uintptr_t counts, int max_slots, uintptr_t chosen_slots, uintptr_t chosen_counts) {
  LayerCall call;
  call.layer = &layer, call.x = at<const void>(x), call.out = at<void>(out), call.bf16 = bf16;
  call.batch = batch, call.queries = queries, call.keys = keys, call.causal = causal, call.turns = at<const float>(turns);
  call.latents = at<void>(latents), call.latents_row_bytes = latents_row_bytes;
  call.index_keys = at<void>(index_keys), call.index_row_bytes = index_row_bytes, call.cache_bf16 = cache_bf16;
  call.visible = at<const uint8_t>(visible), call.visible_at = visible_at;
  call.slots = at<const int32_t>(slots), call.counts = at<const int32_t>(counts), call.max_slots = max_slots;
  call.chosen_slots = at<int32_t>(chosen_slots), call.chosen_counts = at<int32_t>(chosen_counts);
  nb::gil_scoped_release release;
  table().decode_layer(call);
}

nb::tuple run_round(uintptr_t weights, int dtype, int rows, int cols, int group, int bits, uintptr_t importance, bool search,
                    uintptr_t codes, uintptr_t scales) {
  double error = 0, energy = 0;
  RoundCall call;
  call.weights = at<const void>(weights), call.dtype = static_cast<Codes>(dtype);
  call.rows = rows, call.cols = cols, call.group = group, call.bits = bits;
  call.importance = at<const float>(importance), call.search = search;
  call.codes = at<uint8_t>(codes), call.scales = at<uint16_t>(scales);
  call.error = &error, call.energy = &energy;
  {
    nb::gil_scoped_release release;
    table().round_weights(call);
  }
  return nb::make_tuple(error, energy);
}

// Is every value of a run of bf16, f16 or f32 finite? Infinities and NaN have all exponent bits set.
template <class T>
bool finite_run(const T* values, size_t count, T exponent) {
  bool found = false;
  for (size_t i = 0; i < count; i++) found |= (values[i] & exponent) == exponent;
  return !found;
}

bool all_finite(uintptr_t address, size_t count, int codes) {
  nb::gil_scoped_release release;
  switch (static_cast<Codes>(codes)) {
    case Codes::bf16: return finite_run<uint16_t>(at<const uint16_t>(address), count, 0x7f80);
    case Codes::f16: return finite_run<uint16_t>(at<const uint16_t>(address), count, 0x7c00);
    default: return finite_run<uint32_t>(at<const uint32_t>(address), count, 0x7f800000u);
  }
}

}  // namespace

NB_MODULE(_cpu, m) {
  m.doc() = "Native CPU kernels of glm5; use glm5.kernels.cpu.";
  nb::class_<Matrix>(m, "Matrix")
      .def("__init__", [](Matrix* self, int codes, int rows, int cols, int group, uintptr_t data, int scale_type, uintptr_t scales) {
        new (self) Matrix(make_matrix(codes, rows, cols, group, data, scale_type, scales));
      })
      .def_ro("rows", &Matrix::rows)
      .def_ro("cols", &Matrix::cols)
      .def_prop_ro("block", &Matrix::block)
      .def_prop_ro("row_bytes", &Matrix::row_bytes);
  nb::class_<MoeLayer>(m, "MoeLayer")
      .def("__init__", [](MoeLayer* self, int hidden) { new (self) MoeLayer(); self->hidden = hidden; })
      .def("add_expert", [](MoeLayer& self, const Matrix& gate, const Matrix& up, const Matrix& down) { self.experts.push_back({gate, up, down}); })
      .def("set_shared", [](MoeLayer& self, const Matrix& gate, const Matrix& up, const Matrix& down) {
        self.has_shared = true;
        self.shared = {gate, up, down};
      })
      .def("set_router", [](MoeLayer& self, const Matrix& weight, std::vector<float> bias, int topk, int groups, int topk_groups,
                            bool normalize, float factor) {
        self.router = {weight, std::move(bias), weight.rows, topk, groups, topk_groups, normalize, factor};
      });
  nb::class_<DecoderLayer> layer(m, "DecoderLayer");
  layer.def(nb::init<>());
  for (auto [name, field] : std::initializer_list<std::pair<const char*, Matrix DecoderLayer::*>>{
           {"down", &DecoderLayer::down}, {"q_b", &DecoderLayer::q_b}, {"kv_a", &DecoderLayer::kv_a}, {"kv_b", &DecoderLayer::kv_b},
           {"o", &DecoderLayer::o}, {"index_q", &DecoderLayer::index_q}, {"index_k", &DecoderLayer::index_k}, {"index_weights", &DecoderLayer::index_weights}})
    layer.def_rw(name, field);
  for (auto [name, field] : std::initializer_list<std::pair<const char*, std::vector<float> DecoderLayer::*>>{
           {"input_norm", &DecoderLayer::input_norm}, {"post_norm", &DecoderLayer::post_norm}, {"q_norm", &DecoderLayer::q_norm},
           {"kv_norm", &DecoderLayer::kv_norm}, {"index_norm", &DecoderLayer::index_norm}, {"index_norm_bias", &DecoderLayer::index_norm_bias},
           {"down_bias", &DecoderLayer::down_bias}, {"kv_a_bias", &DecoderLayer::kv_a_bias}, {"o_bias", &DecoderLayer::o_bias}})
    layer.def_rw(name, field);
  for (auto [name, field] : std::initializer_list<std::pair<const char*, float DecoderLayer::*>>{
           {"eps", &DecoderLayer::eps}, {"latent_eps", &DecoderLayer::latent_eps}, {"index_eps", &DecoderLayer::index_eps}, {"scale", &DecoderLayer::scale}})
    layer.def_rw(name, field);
  for (auto [name, field] : std::initializer_list<std::pair<const char*, int DecoderLayer::*>>{
           {"hidden", &DecoderLayer::hidden}, {"heads", &DecoderLayer::heads}, {"nope", &DecoderLayer::nope}, {"rotary", &DecoderLayer::rotary},
           {"latent", &DecoderLayer::latent}, {"value", &DecoderLayer::value}, {"index_heads", &DecoderLayer::index_heads},
           {"index_width", &DecoderLayer::index_width}, {"topk", &DecoderLayer::topk}})
    layer.def_rw(name, field);
  layer.def("set_feed", [](DecoderLayer& self, const MoeLayer& feed) { self.feed = &feed; }, nb::keep_alive<1, 2>());
  m.def("decode_layer", &run_decode_layer);
  m.def("linear", &run_linear);
  m.def("rms_norm", &run_rms_norm);
  m.def("moe", &run_moe);
  m.def("attend", &run_attend);
  m.def("attend_prompt", &run_attend_prompt);
  m.def("select", &run_select);
  m.def("round_weights", &run_round);
  m.def("all_finite", &all_finite);
  m.def("read_all", [](uintptr_t data, size_t bytes, int streams) {
    nb::gil_scoped_release release;
    return table().read_all(at<const uint8_t>(data), bytes, streams);
  });
  m.def("spin_products", [](int rounds) {
    nb::gil_scoped_release release;
    return table().spin_products(rounds);
  });
  m.def("set_threads", &set_threads);
  m.def("threads", &threads);
  m.def("instruction_set", [] { return std::string(table().name); });
  m.def("instruction_sets", [] {
    std::vector<std::string> names;
    for (const char* name : tables()) names.emplace_back(name);
    return names;
  });
  m.def("use_instruction_set", [](const std::string& name) {
    if (!use_table(name.c_str())) throw std::invalid_argument("unknown or unsupported instruction set: " + name);
  });
}
