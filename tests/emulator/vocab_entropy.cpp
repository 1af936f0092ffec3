// The CUDA kernels of the vocabulary entropy on the emulated device, for tests/vocab_emulator.py.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "emulator/device.hpp"
#include "vocab_entropy/launch.hpp"

namespace {

using namespace primitives::vocab_entropy;
using emulator::Device;

int64_t itemsize(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

int finished(const Device& device, int code, char* error, int capacity) {
  if (code != 0) snprintf(error, static_cast<size_t>(capacity), "%s", device.error().c_str());
  return code;
}

}  // namespace

// How a call is played, and the struct arguments of the C functions, flat.
struct Play {
  uint32_t seed;
  int32_t mode;
  int64_t enough_blocks, num_tokens;
};

struct LogitsArgument {
  const void* data;
  int64_t dtype, row_stride, columns, segment_length, num_segments;
  double scale;
};

static Logits logits_of(const LogitsArgument& x) {
  return {x.data,
          static_cast<Dtype>(x.dtype),
          x.row_stride,
          x.columns,
          x.segment_length,
          static_cast<int>(x.num_segments),
          static_cast<float>(x.scale),
          false};
}

static void allow_rows(Device& device, const LogitsArgument& x, const void* data, int64_t stride,
                       int64_t num_tokens, bool writable) {
  const int64_t nbytes = itemsize(static_cast<Dtype>(x.dtype));
  device.given().allow(data, num_tokens, stride * nbytes, x.columns * nbytes, writable);
}

static void allow_floats(Device& device, const float* data, int64_t numel, bool writable) {
  if (data != nullptr) device.given().allow(data, 1, 0, 4 * numel, writable);
}

extern "C" {

int emulate_forward(const Play* play, const LogitsArgument* x, const int64_t* labels,
                    int64_t ignored, int64_t first, float* quads, char* error, int capacity) {
  Device device(play->seed, play->enough_blocks);
  const Logits logits = logits_of(*x);
  const int64_t n = play->num_tokens;
  const int64_t numel = workspace_of(logits, n, device.enough_blocks());
  std::vector<emulator::Packed> workspace(static_cast<size_t>(numel / 4));
  float* floats = reinterpret_cast<float*>(workspace.data());
  allow_rows(device, *x, x->data, x->row_stride, n, false);
  allow_floats(device, quads, 4 * n, true);
  allow_floats(device, floats, numel, true);
  const int code = launch_forward(device, static_cast<Mode>(play->mode), logits,
                                  {labels, ignored, first}, n, floats, quads);
  return finished(device, code, error, capacity);
}

int emulate_finish(const Play* play, const float* shards, int64_t rank_stride, int num_ranks,
                   const int64_t* labels, int64_t ignored, double scale, float* quads,
                   float* results, char* error, int capacity) {
  Device device(play->seed, play->enough_blocks);
  const int64_t n = play->num_tokens;
  device.given().allow(shards, num_ranks, 4 * rank_stride, 16 * n, false);
  allow_floats(device, quads, 4 * n, true);
  allow_floats(device, results, 3 * n, true);
  const int code =
      launch_finish(device, shards, rank_stride, num_ranks, {labels, ignored, 0},
                    static_cast<float>(scale), n, quads, results, results + n, results + 2 * n);
  return finished(device, code, error, capacity);
}

int emulate_backward(const Play* play, const LogitsArgument* x, const int64_t* labels,
                     int64_t ignored, int64_t first, const float* quads, const float* by_entropy,
                     const float* by_log_prob, const float* by_log_sum_exp, void* out,
                     int64_t out_stride, char* error, int capacity) {
  Device device(play->seed, play->enough_blocks);
  const int64_t n = play->num_tokens;
  allow_rows(device, *x, x->data, x->row_stride, n, false);
  allow_rows(device, *x, out, out_stride, n, true);
  allow_floats(device, quads, 4 * n, false);
  for (const float* gradient : {by_entropy, by_log_prob, by_log_sum_exp}) {
    allow_floats(device, gradient, n, false);
  }
  const int code = launch_backward(device, static_cast<Mode>(play->mode), logits_of(*x),
                                   {labels, ignored, first}, quads,
                                   {by_entropy, by_log_prob, by_log_sum_exp}, n, out, out_stride);
  return finished(device, code, error, capacity);
}
}
