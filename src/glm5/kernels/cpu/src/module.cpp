// The Python module `glm5.kernels._cpu`. A call is an object whose fields are set by name; tensors come as
// addresses. `glm5.kernels.cpu` checks every shape, dtype and index and keeps the tensors alive: it is the
// only caller, and nothing here may be called with unchecked sizes.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <type_traits>

#include "plan.h"
#include "threads.h"

namespace nb = nanobind;
using namespace glm5;

namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// A plain struct in Python: fields by name, pointers as addresses.
template <class C>
class Fields {
 public:
  Fields(nb::module_& m, const char* name) : bound_(m, name) { bound_.def(nb::init<>()); }

  template <class T>
  Fields& operator()(const char* name, T C::* field) {
    if constexpr (std::is_pointer_v<T>)
      bound_.def_prop_rw(
          name, [field](const C& self) { return reinterpret_cast<uintptr_t>(self.*field); },
          [field](C& self, uintptr_t address) { self.*field = reinterpret_cast<T>(address); });
    else bound_.def_rw(name, field);
    return *this;
  }

  nb::class_<C>& bound() { return bound_; }

 private:
  nb::class_<C> bound_;
};

Matrix make_matrix(int codes, int rows, int cols, int group, uintptr_t data, int scale_type,
                   uintptr_t scales) {
  Matrix m;
  m.codes = static_cast<Codes>(codes);
  m.rows = rows, m.cols = cols, m.group = group;
  m.scale_type = static_cast<Scales>(scale_type);
  m.data = at<const uint8_t>(data);
  m.scales = at<const void>(scales);
  return m;
}

void bind_parts(nb::module_& m) {
  nb::class_<Matrix>(m, "Matrix")
      .def("__init__",
           [](Matrix* self, int codes, int rows, int cols, int group, uintptr_t data, int scale_type,
              uintptr_t scales) {
             new (self) Matrix(make_matrix(codes, rows, cols, group, data, scale_type, scales));
           })
      .def_prop_ro("block", &Matrix::block);
  nb::class_<Vector>(m, "Vector").def("__init__", [](Vector* self, uintptr_t data, int type, int size) {
    new (self) Vector{at<const void>(data), static_cast<Codes>(type), size};
  });
  nb::class_<ExpertBank>(m, "ExpertBank")
      .def("__init__", [](ExpertBank* self, int hidden,
                          size_t experts) { new (self) ExpertBank{hidden, std::vector<Expert>(experts)}; })
      .def("put", [](ExpertBank& self, size_t expert, const Matrix& gate, const Matrix& up,
                     const Matrix& down) { self.experts.at(expert) = {gate, up, down}; })
      .def("drop", [](ExpertBank& self, size_t expert) { self.experts.at(expert) = Expert(); });
  nb::class_<MoeLayer>(m, "MoeLayer")
      .def("__init__",
           [](MoeLayer* self, int hidden) {
             new (self) MoeLayer();
             self->hidden = hidden;
           })
      .def(
          "set_bank", [](MoeLayer& self, const ExpertBank& bank) { self.bank = &bank; },
          nb::keep_alive<1, 2>())
      .def("set_shared",
           [](MoeLayer& self, const Matrix& gate, const Matrix& up, const Matrix& down) {
             self.has_shared = true;
             self.shared = {gate, up, down};
           })
      .def("set_router", [](MoeLayer& self, const Matrix& weight, const Vector& bias, int topk, int groups,
                            int topk_groups, bool normalize, float factor) {
        self.router = {weight, bias, weight.rows, topk, groups, topk_groups, normalize, factor};
      });
  using L = DecoderLayer;
  Fields<L> layer(m, "DecoderLayer");
  layer("grouped", &L::grouped)("hidden", &L::hidden)("heads", &L::heads)("kv_heads", &L::kv_heads)("nope",
                                                                                                    &L::nope);
  layer("rotary", &L::rotary)("latent", &L::latent)("value", &L::value)("scale", &L::scale);
  layer("q_in", &L::q_in)("q_b", &L::q_b)("kv_in", &L::kv_in)("kv_b", &L::kv_b)("v", &L::v)("o", &L::o);
  layer("q_bias", &L::q_bias)("kv_bias", &L::kv_bias)("v_bias", &L::v_bias)("o_bias", &L::o_bias);
  layer("input_norm", &L::input_norm)("post_norm", &L::post_norm)("q_norm", &L::q_norm)("kv_norm",
                                                                                        &L::kv_norm);
  layer("eps", &L::eps)("head_eps", &L::head_eps);
  layer("index_q", &L::index_q)("index_k", &L::index_k)("index_weights", &L::index_weights)("index_norm",
                                                                                            &L::index_norm);
  layer("index_norm_bias", &L::index_norm_bias)("index_eps", &L::index_eps)("index_heads", &L::index_heads);
  layer("index_width", &L::index_width)("topk", &L::topk);
  layer.bound().def(
      "set_feed", [](L& self, const MoeLayer& feed) { self.feed = &feed; }, nb::keep_alive<1, 2>());
}

void bind_calls(nb::module_& m) {
  Fields<LinearCall>(m, "LinearCall")("x", &LinearCall::x)("x_bf16", &LinearCall::x_bf16)(
      "count", &LinearCall::count)("norm", &LinearCall::norm)("eps", &LinearCall::eps)("exact",
                                                                                       &LinearCall::exact);
  Fields<LinearOutput>(m, "LinearOutput")("bias", &LinearOutput::bias)("add", &LinearOutput::add)(
      "out", &LinearOutput::out)("stride", &LinearOutput::stride)("bf16", &LinearOutput::bf16);
  using N = NormCall;
  Fields<N>(m, "NormCall")("x", &N::x)("out", &N::out)("weight", &N::weight)("bf16", &N::bf16)(
      "count", &N::count)("cols", &N::cols)("stride", &N::stride)("eps", &N::eps);
  using E = MoeCall;
  Fields<E>(m, "MoeCall")("x", &E::x)("add", &E::add)("out", &E::out)("x_bf16", &E::x_bf16)(
      "count", &E::count)("norm", &E::norm)("eps", &E::eps)("exact", &E::exact)("ids", &E::ids)(
      "weights", &E::weights)("topk", &E::topk)("chosen_ids", &E::chosen_ids)(
      "chosen_weights", &E::chosen_weights)("scores", &E::scores);
  Fields<Pages>(m, "Pages")("tables", &Pages::tables)("shift", &Pages::shift);
  using C = CachedRows;
  Fields<C>(m, "CachedRows")("keys", &C::keys)("values", &C::values)("bf16", &C::bf16)(
      "key_width", &C::key_width)("value_width", &C::value_width)("key_stride", &C::key_stride)(
      "value_stride", &C::value_stride)("key_page_bytes", &C::key_page_bytes)(
      "value_page_bytes", &C::value_page_bytes)("pages", &C::pages);
  using S = SeenSlots;
  Fields<S>(m, "SeenSlots")("rows", &S::rows)("slots", &S::slots)("counts", &S::counts)("room", &S::room);
  using A = AttendCall;
  Fields<A>(m, "AttendCall")("q", &A::q)("turns", &A::turns)("out", &A::out)("bf16", &A::bf16)(
      "exact", &A::exact)("count", &A::count)("heads", &A::heads)("nope", &A::nope)("rotary", &A::rotary)(
      "latent", &A::latent)("value", &A::value)("cache", &A::cache)("seen", &A::seen)("scale", &A::scale);
  using G = GroupedCall;
  Fields<G>(m, "GroupedCall")("q", &G::q)("out", &G::out)("count", &G::count)("heads", &G::heads)(
      "kv_heads", &G::kv_heads)("cache", &G::cache)("seen", &G::seen)("scale", &G::scale);
  using D = SelectCall;
  Fields<D>(m, "SelectCall")("q", &D::q)("turns", &D::turns)("weights", &D::weights)("cache", &D::cache)(
      "bf16", &D::bf16)("bf16_cache", &D::bf16_cache)("count", &D::count)("heads", &D::heads)(
      "width", &D::width)("rotary", &D::rotary)("keys", &D::keys)("topk", &D::topk)(
      "page_bytes", &D::page_bytes)("pages", &D::pages)("rows", &D::rows)("limits", &D::limits)(
      "visible", &D::visible)("slots", &D::slots)("counts", &D::counts);
  using L = LayerCall;
  Fields<L>(m, "LayerCall")("x", &L::x)("out", &L::out)("bf16", &L::bf16)("cache_bf16", &L::cache_bf16)(
      "causal", &L::causal)("exact", &L::exact)("count", &L::count)("keys", &L::keys)("rows", &L::rows)("at", &L::at)(
      "limits", &L::limits)("pages", &L::pages)(
      "turns", &L::turns)("latents", &L::latents)("values", &L::values)("index_keys", &L::index_keys)(
      "latents_page_bytes", &L::latents_page_bytes)("values_page_bytes", &L::values_page_bytes)(
      "index_page_bytes", &L::index_page_bytes)("visible", &L::visible)("visible_at", &L::visible_at)(
      "slots", &L::slots)("counts", &L::counts)("room", &L::room)("chosen_slots", &L::chosen_slots)(
      "chosen_counts", &L::chosen_counts)("expert_ids", &L::expert_ids)("expert_weights", &L::expert_weights)(
      "expert_scores", &L::expert_scores);
  using R = RoundCall;
  Fields<R>(m, "RoundCall")("weights", &R::weights)("rows", &R::rows)("cols", &R::cols)("group", &R::group)(
      "bits", &R::bits)("importance", &R::importance)("search", &R::search)("codes", &R::codes)("scales",
                                                                                                &R::scales);
}

// The functions; each runs without the interpreter's lock.
void bind_functions(nb::module_& m) {
  m.def("linear", [](LinearCall call, LinearOutput output, const Matrix& matrix) {
    nb::gil_scoped_release release;
    output.matrix = &matrix;
    call.output = &output, call.outputs = 1;
    table().linear(call);
  });
  m.def("take_rows", [](const Matrix& matrix, uintptr_t ids, uintptr_t out, bool bf16, int count) {
    RowsCall call;
    call.ids = at<const int64_t>(ids), call.out = at<void>(out), call.bf16 = bf16, call.count = count;
    for (int t = 0; t < count; t++)
      if (call.ids[t] < 0 || call.ids[t] >= matrix.rows)
        throw std::out_of_range("row " + std::to_string(call.ids[t]) + " of " + std::to_string(matrix.rows));
    nb::gil_scoped_release release;
    table().take_rows(matrix, call);
  });
  m.def("norm_rows", [](const NormCall& call) {
    nb::gil_scoped_release release;
    table().norm_rows(call);
  });
  m.def("moe", [](MoeCall call, const MoeLayer& layer) {
    nb::gil_scoped_release release;
    call.layer = &layer;
    table().moe(call);
  });
  m.def("route", [](MoeCall call, const MoeLayer& layer) {
    nb::gil_scoped_release release;
    call.layer = &layer;
    table().route(call);
  });
  m.def("attend", [](AttendCall call, const Matrix& kv_b) {
    nb::gil_scoped_release release;
    call.kv_b = &kv_b;
    table().attend(call);
  });
  m.def("attend_grouped", [](const GroupedCall& call) {
    nb::gil_scoped_release release;
    table().attend_grouped(call);
  });
  m.def("select", [](const SelectCall& call) {
    nb::gil_scoped_release release;
    table().select(call);
  });
  // Does every token of a call lie in a page of its sequence, of which there are `pages` in the cache? The largest
  // page number of the tables, or -1.
  m.def("check_places", [](const LayerCall& call, uintptr_t starts, int sequences, int entries) {
    const auto* first = at<const int64_t>(starts);
    const int32_t* table = sequences > 0 ? call.pages.tables[0] - first[0] : nullptr;
    for (int t = 0; t < call.count; t++) {
      const int row = call.rows[t];
      if (row < 0 || row >= sequences) return -1;
      const int64_t size = (row + 1 < sequences ? first[row + 1] : entries) - first[row];
      const int64_t reach = std::min<int64_t>(size << call.pages.shift, call.keys);
      if (call.at[t] < 0 || call.at[t] >= call.limits[t] || call.limits[t] > reach) return -1;
    }
    int most = 0;
    for (int i = 0; i < entries; i++) {
      if (table[i] < 0) return -1;
      most = std::max(most, table[i]);
    }
    return most;
  });
  m.def("decode_layer", [](const DecoderLayer& layer, const LayerCall& call) {
    nb::gil_scoped_release release;
    table().decode_layer(layer, call);
  });
  m.def("round_weights", [](RoundCall call, int dtype) {
    double error = 0, energy = 0;
    call.dtype = static_cast<Codes>(dtype), call.error = &error, call.energy = &energy;
    {
      nb::gil_scoped_release release;
      table().round_weights(call);
    }
    return nb::make_tuple(error, energy);
  });
  m.def("read_all", [](uintptr_t data, size_t bytes, int streams) {
    nb::gil_scoped_release release;
    return table().read_all(at<const uint8_t>(data), bytes, streams);
  });
  m.def("spin_products", [](int rounds) {
    nb::gil_scoped_release release;
    return table().spin_products(rounds);
  });
}

}  // namespace

NB_MODULE(_cpu, m) {
  m.doc() = "Native CPU kernels of glm5; use glm5.kernels.cpu.";
  bind_parts(m);
  bind_calls(m);
  bind_functions(m);
  m.def("set_threads", &set_threads);
  m.def("threads", &threads);
  m.def("instruction_set", [] { return std::string(table().name); });
  m.def("instruction_sets", [] {
    std::vector<std::string> names;
    for (const char* name : tables()) names.emplace_back(name);
    return names;
  });
  m.def("use_instruction_set", [](const std::string& name) {
    if (!use_table(name.c_str()))
      throw std::invalid_argument("unknown or unsupported instruction set: " + name);
  });
}
