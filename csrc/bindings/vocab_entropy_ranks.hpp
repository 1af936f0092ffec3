// The ranks that share a vocabulary: which columns each holds, and the one message they exchange.
#pragma once

#include <string>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include "bindings/bindings.hpp"
#include "bindings/vocab_entropy.hpp"

namespace primitives::vocab_entropy {

// The part of one rank: 16 / num_ranks whole segments of ceil(vocab_size / 16) columns; the last
// ones may be cut short, or empty. Throws ValueError.
class Shard {
 public:
  Shard(int64_t vocab_size, int rank, int num_ranks);

  int64_t vocab_size() const { return vocab_size_; }
  int64_t segment_length() const;
  int num_segments() const;
  // The first column that is this rank's, if it has any.
  int64_t first() const { return begin_of(rank_); }
  // How many columns this rank has, perhaps none.
  int64_t num_columns() const { return begin_of(rank_ + 1) - first(); }
  Columns columns() const { return {first(), segment_length(), num_segments()}; }

 private:
  int64_t begin_of(int rank) const;

  int64_t vocab_size_;
  int rank_, num_ranks_;
};

// This rank among those that share the vocabulary.
class Ranks {
 public:
  // The process group of this name; for an empty one this rank is alone.
  explicit Ranks(const std::string& group_name);

  int rank() const { return group_ ? group_->getRank() : 0; }
  int size() const { return group_ ? group_->getSize() : 1; }
  bool alone() const { return !group_; }

  // The shard of a rank with so many columns; without vocab_size all ranks have as many. Throws
  // ValueError when it should have another number.
  Shard shard_of(int64_t num_columns, std::optional<int64_t> vocab_size) const;

  // x [numel] of every rank: [ranks, numel].
  at::Tensor all_gather(at::Tensor x) const;

 private:
  c10::intrusive_ptr<c10d::ProcessGroup> group_;
};

// What a rank sends to all: a header, and the quads of its columns.
class Message {
 public:
  // With an empty header.
  Message(int64_t num_tokens, at::Device device);

  // Says which vocabulary the quads are of, and which label lies outside it. Waits for a device.
  void write_header(int64_t vocab_size, const Targets& targets);
  // [tokens, 4], to be filled.
  at::Tensor quads() const;

  // The quads of all ranks, [ranks, tokens, 4].
  at::Tensor exchange(const Ranks& ranks);
  // Then, if they have written headers: a label outside the vocabulary (labels_shape: as its caller
  // knows it) or vocabularies of different sizes are a ValueError on all ranks. Waits for a device.
  void check_headers(at::IntArrayRef labels_shape) const;

 private:
  at::Tensor data_, all_;
};

// Raises ValueError unless there is a label, int64 and on its device, for each vector of `of`
// [..., n]; the labels [tokens], contiguous.
OptionalTensor labels_for(const at::Tensor& of, const OptionalTensor& labels);

// What logits are multiplied by: 1 / temperature in float32. Throws ValueError unless that is a
// positive finite number.
double scale_of(double temperature);

void bind_vocab_entropy_ranks(py::module_& m);

}  // namespace primitives::vocab_entropy
