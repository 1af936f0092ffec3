#include "bindings/vocab_entropy_ranks.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>

#include "bindings/tensor_checks.hpp"

namespace primitives::vocab_entropy {
namespace {

constexpr int kNumSegments = 16;
constexpr int64_t kMaxVocabSize = int64_t{1} << 48;  // all distances are far from an overflow

struct Header {
  int64_t vocab_size;
  int64_t bad_position;  // of the first label outside the vocabulary, or -1
  int64_t bad_label;
  int64_t unused;  // quads are aligned to 16 bytes
};
constexpr int64_t kHeaderNumel = sizeof(Header) / sizeof(float);

Header header_of(int64_t vocab_size, const Targets& targets) {
  Header header{vocab_size, -1, 0, 0};
  if (!targets.labels) return header;
  const at::Tensor labels = targets.labels->cpu();
  const int64_t* data = labels.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < labels.numel(); i++) {
    const int64_t label = data[i];
    if (label == targets.ignored || (label >= 0 && label < vocab_size)) continue;
    header.bad_position = i;
    header.bad_label = label;
    break;
  }
  return header;
}

// "1, 2" for element 5 of [2, 3].
std::string index_text(int64_t position, at::IntArrayRef shape) {
  std::string text;
  for (auto size = shape.rbegin(); size != shape.rend(); size++) {
    text = std::to_string(position % *size) + (text.empty() ? "" : ", ") + text;
    position /= *size;
  }
  return text;
}

}  // namespace

Shard::Shard(int64_t vocab_size, int rank, int num_ranks)
    : vocab_size_(vocab_size), rank_(rank), num_ranks_(num_ranks) {
  if (vocab_size < 1 || vocab_size > kMaxVocabSize) {
    throw py::value_error("vocab_size: expected 1 to 2^48 columns, got " +
                          std::to_string(vocab_size));
  }
  if (num_ranks < 1 || kNumSegments % num_ranks != 0) {
    throw py::value_error("group: the vocabulary's 16 segments need 1, 2, 4, 8 or 16 ranks, got " +
                          std::to_string(num_ranks));
  }
}

int64_t Shard::segment_length() const { return (vocab_size_ + kNumSegments - 1) / kNumSegments; }

int Shard::num_segments() const { return kNumSegments / num_ranks_; }

int64_t Shard::begin_of(int rank) const {
  return std::min(vocab_size_, rank * num_segments() * segment_length());
}

Ranks::Ranks(const std::string& group_name) {
  if (!group_name.empty()) group_ = c10d::resolve_process_group(group_name);
}

Shard Ranks::shard_of(int64_t num_columns, std::optional<int64_t> vocab_size) const {
  const Shard shard(vocab_size.value_or(num_columns * size()), rank(), size());
  if (shard.num_columns() == num_columns) return shard;
  throw py::value_error("logits: a vocabulary of " + std::to_string(shard.vocab_size()) +
                        " in segments of " + std::to_string(shard.segment_length()) +
                        " columns puts " + std::to_string(shard.num_columns()) + " on rank " +
                        std::to_string(rank()) + " of " + std::to_string(size()) + ", got " +
                        std::to_string(num_columns) +
                        (vocab_size ? "" : "; give vocab_size, if the ranks hold unequal parts"));
}

at::Tensor Ranks::all_gather(at::Tensor x) const {
  if (alone()) return x.unsqueeze(0);
  at::Tensor all = at::empty({size(), x.numel()}, x.options());
  at::Tensor flat = all.view(-1);
  c10d::AllgatherOptions options;
  options.asyncOp = false;
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"  // all_gather_single from torch 2.13 on
  const auto work = group_->_allgather_base(flat, x, options);
#pragma GCC diagnostic pop
  if (work) work->wait();
  return all;
}

Message::Message(int64_t num_tokens, at::Device device)
    : data_(at::empty({kHeaderNumel + 4 * num_tokens},
                      at::TensorOptions().dtype(at::kFloat).device(device))) {
  data_.narrow(0, 0, kHeaderNumel).zero_();
}

void Message::write_header(int64_t vocab_size, const Targets& targets) {
  Header header = header_of(vocab_size, targets);
  data_.narrow(0, 0, kHeaderNumel).copy_(at::from_blob(&header, {kHeaderNumel}, at::kFloat));
}

at::Tensor Message::quads() const {
  return data_.narrow(0, kHeaderNumel, data_.numel() - kHeaderNumel).view({-1, 4});
}

at::Tensor Message::exchange(const Ranks& ranks) {
  all_ = ranks.all_gather(data_);
  return all_.narrow(1, kHeaderNumel, all_.size(1) - kHeaderNumel).view({all_.size(0), -1, 4});
}

void Message::check_headers(at::IntArrayRef labels_shape) const {
  const at::Tensor on_host = all_.narrow(1, 0, kHeaderNumel).cpu();
  std::vector<Header> headers(static_cast<size_t>(on_host.size(0)));
  for (size_t rank = 0; rank < headers.size(); rank++) {
    const auto at = static_cast<int64_t>(rank) * on_host.stride(0);
    std::memcpy(&headers[rank], on_host.const_data_ptr<float>() + at, sizeof(Header));
  }
  const int64_t vocab_size = headers[0].vocab_size;
  for (size_t rank = 0; rank < headers.size(); rank++) {
    if (headers[rank].vocab_size == vocab_size) continue;
    throw py::value_error("vocab_size: rank 0 has " + std::to_string(vocab_size) + ", rank " +
                          std::to_string(rank) + " has " +
                          std::to_string(headers[rank].vocab_size) + "; expected one size");
  }
  for (size_t rank = 0; rank < headers.size(); rank++) {
    const auto& [size, position, label, unused] = headers[rank];
    if (position < 0) continue;
    throw py::value_error("labels: expected 0 <= label < " + std::to_string(vocab_size) +
                          " or ignore_index, got " + std::to_string(label) + " at [" +
                          index_text(position, labels_shape) + "] on rank " + std::to_string(rank));
  }
}

OptionalTensor labels_for(const at::Tensor& of, const OptionalTensor& labels) {
  if (!labels) return labels;
  const auto shape = of.sizes().slice(0, static_cast<size_t>(of.dim()) - 1);
  if (labels->sizes() != shape || labels->scalar_type() != at::kLong ||
      labels->device() != of.device()) {
    const auto text = [](at::IntArrayRef of, at::ScalarType type, at::Device device) {
      return Argument::text(of) + " of " + dtype_name(type) + " on " + device.str();
    };
    throw py::value_error("labels: expected " + text(shape, at::kLong, of.device()) + ", got " +
                          text(labels->sizes(), labels->scalar_type(), labels->device()));
  }
  return labels->reshape(-1).contiguous();
}

double scale_of(double temperature) {
  const auto scale = static_cast<float>(1 / temperature);
  if (temperature > 0 && std::isfinite(temperature) && scale > 0 && std::isfinite(scale)) {
    return scale;
  }
  std::ostringstream got;
  got << temperature;
  throw py::value_error("temperature: expected a positive finite number, got " + got.str());
}

void bind_vocab_entropy_ranks(py::module_& m) {
  py::class_<Shard>(m, "VocabShard", "The columns of the vocabulary that one rank holds.")
      .def(py::init<int64_t, int, int>(), py::arg("vocab_size"), py::arg("rank"),
           py::arg("num_ranks"))
      .def_property_readonly("vocab_size", &Shard::vocab_size)
      .def_property_readonly("segment_length", &Shard::segment_length)
      .def_property_readonly("num_segments", &Shard::num_segments)
      .def_property_readonly("first", &Shard::first)
      .def_property_readonly("num_columns", &Shard::num_columns);
  m.def(
      "vocab_shard_of",
      [](int64_t columns, std::optional<int64_t> vocab_size, const std::string& group_name) {
        return Ranks(group_name).shard_of(columns, vocab_size);
      },
      py::arg("columns"), py::arg("vocab_size"), py::arg("group_name"));
  m.def("vocab_labels_for", labels_for, py::arg("of"), py::arg("labels"));
  m.def("vocab_scale_of", scale_of, py::arg("temperature"));
  m.def(
      "vocab_entropy_exchange",
      [](const at::Tensor& quads, const std::string& group_name, int64_t vocab_size,
         OptionalTensor labels, int64_t ignored, const std::vector<int64_t>& labels_shape) {
        Message message(quads.size(0), quads.device());
        message.write_header(vocab_size, {std::move(labels), ignored});
        message.quads().copy_(quads);
        const at::Tensor shards = message.exchange(Ranks(group_name));
        message.check_headers(labels_shape);
        return shards;
      },
      py::arg("quads"), py::arg("group_name"), py::arg("vocab_size"), py::arg("labels"),
      py::arg("ignored"), py::arg("labels_shape"), py::call_guard<py::gil_scoped_release>());
}

}  // namespace primitives::vocab_entropy
