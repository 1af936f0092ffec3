#include "device_faults.hpp"

#include <unistd.h>

#include "collectives/cuda/device_transport.hpp"
#include "collectives/cuda/stream_transport.hpp"
#include "emulator/runtime.hpp"
#include "faults.hpp"

namespace primitives::native_tests {
namespace {

constexpr Milliseconds kLong{60000}, kShort{200}, kSoon{5000};

// A sum of ones that is launched; the failure comes later, from a kernel.
std::vector<float> sum(StreamTransport& device, size_t numel, Milliseconds timeout) {
  std::vector<float> data(numel, 1.0f);
  Call call;
  call.op = Op::kAllReduce;
  call.reduce_op = ReduceOp::kSum;
  std::snprintf(call.dtype, sizeof call.dtype, "float32");
  call.itemsize = sizeof(float);
  call.numel = numel;
  const Reduction reduction{find_reduce(DType::kFloat32, ReduceOp::kSum), DType::kFloat32,
                            ReduceOp::kSum, sizeof(float), 0};
  device.all_reduce(call, data.data(), numel * sizeof(float), reduction, timeout);
  device.drain();
  return data;
}

// The failure of the group, which all ranks learn of, whatever they do.
void wait_for_failure(StreamTransport& device) {
  const auto end = Clock::now() + kSoon;
  while (!device.group().failed() && Clock::now() < end) usleep(1000);
  device.check();
}

// ... and what it says to all of them.
void expect_text(StreamTransport& device, const std::string& part) {
  const std::string text = device.group().failure_text();
  if (text.find(part) == std::string::npos) throw WrongResult("no '" + part + "' in: " + text);
}

void differs(StreamTransport& device, bool guilty) {
  expect_failure(Failure::kMismatch, "one rank sums another number of elements", [&] {
    sum(device, guilty ? 9 : 8, kLong);
    wait_for_failure(device);
  });
  expect_text(device, "differs between ranks");
  expect_text(device, "all_reduce(sum, float32, numel ");
  expect_text(device, "all_reduce(sum, float32, 3");  // 32 or 36 bytes
}

void cuts_otherwise(StreamTransport& device, bool guilty) {
  const int n = device.group().world_size();
  std::vector<int64_t> numels(2 * n, 4);
  if (guilty) numels[0]++, numels[1]--;
  const Cuts cuts(n, numels);
  std::vector<float> full(4 * n, 1.0f), shard(5);
  const std::vector<const void*> in{full.data(), full.data()};
  const std::vector<float*> out{shard.data(), shard.data()};
  Call call;
  call.op = Op::kReduceScatterMany;
  call.reduce_op = ReduceOp::kSum;
  std::snprintf(call.dtype, sizeof call.dtype, "float32");
  call.itemsize = sizeof(float);
  call.num_tensors = 2;
  call.digest = cuts.digest();
  const ReduceScatterMany many{cuts, in,    out,     DType::kFloat32, sizeof(float),
                               1.0f, false, nullptr, nullptr};
  expect_failure(Failure::kMismatch, "one rank cuts its tensors otherwise", [&] {
    device.reduce_scatter_many(call, many, kLong);
    device.drain();
    wait_for_failure(device);
  });
  expect_text(device, "differs between ranks");
  expect_text(device, "fused reduce_scatter(sum, float32, 2 tensors cut as ");
}

void absent(StreamTransport& device, int culprit, bool guilty) {
  expect_failure(Failure::kTimeout, "one rank does not call", [&] {
    if (!guilty) sum(device, 40000, kShort);
    wait_for_failure(device);
  });
  expect_text(device, "missing: rank " + std::to_string(culprit));
}

void aborts(StreamTransport& device, bool guilty) {
  expect_failure(Failure::kPeerLost, "one rank aborts", [&] {
    if (guilty) {
      usleep(5000);
      device.group().abort("to see what happens");
    } else {
      sum(device, 8, kLong);
    }
    wait_for_failure(device);
  });
}

void leaves(Transport& host, StreamTransport& device, int culprit, bool guilty) {
  if (guilty) {
    usleep(5000);
    device.drain();
    return host.close();
  }
  expect_failure(Failure::kPeerLost, "one rank leaves", [&] {
    sum(device, 8, kLong);
    wait_for_failure(device);
  });
  expect_text(device, "rank " + std::to_string(culprit));
}

void cannot_copy(StreamTransport& by_host, int culprit, bool guilty) {
  expect_failure(Failure::kOther, "one rank cannot copy to the host", [&] {
    if (guilty) emulator::fail_next("copy");
    sum(by_host, 8, kLong);
  });
  expect_text(by_host, "rank " + std::to_string(culprit));
  expect_text(by_host, "all_reduce on device 0, by way of the host: cannot be copied");
}

void expect_sum(StreamTransport& device, int world_size) {
  for (const float one : sum(device, 1000, kLong)) {
    if (one != static_cast<float>(world_size)) throw WrongResult("handed over: another sum");
  }
}

// All ranks take the way of the host; rank 0 says so, once.
void cannot_reach(OneHost& host, emulator::Stream& stream, const GroupOptions& options) {
  static int num_said = 0;  // a rank is a process
  const int n = options.world_size;
  const auto say = [&](const std::string& text) {
    num_said++;
    const bool names_it = text.find("the memory of rank ") != std::string::npos &&
                          text.find("cannot be mapped: cannot be ") != std::string::npos;
    if (options.rank != 0 || !names_it) throw WrongResult("handed over: it says: " + text);
  };
  const auto device =
      make_stream_transport(host, {options.rank, n, 0, [&] { return &stream; }, kLong, say});
  if (!device->runs_on_host()) throw WrongResult("not handed over");
  if (num_said != (options.rank == 0 ? 1 : 0)) throw WrongResult("handed over: not said once");
  expect_sum(*device, n);
  stream.captured = true;
  try {
    sum(*device, 8, kLong);
    throw WrongResult("handed over: captured");
  } catch (const std::invalid_argument& error) {
    const std::string text = error.what();
    if (text.find("expected a stream that is not captured") == std::string::npos) throw;
  }
  stream.captured = false;
  expect_sum(*device, n);
  host.close();
}

}  // namespace

void play_device_fault(int kind, int culprit, Meeting& meeting, const GroupOptions& options) {
  const bool guilty = options.rank == culprit;
  OneHost host(meeting, options);
  emulator::Stream stream;
  const auto make = [&] {
    return std::make_unique<DeviceTransport>(host, 0, [&] { return &stream; }, kLong);
  };
  if (kind == 0) {
    if (guilty) emulator::fail_next("allocate");
    return expect_failure(Failure::kOther, "one rank has no memory", make);
  }
  if (kind == 6) {
    ByHostTransport by_host(host, options.rank, options.world_size, 0, [&] { return &stream; });
    return cannot_copy(by_host, culprit, guilty);
  }
  if (kind > 6) {
    if (guilty) emulator::fail_next(kind == 7 ? "map" : "export");
    return cannot_reach(host, stream, options);
  }
  const auto device = make();
  switch (kind) {
    case 1:
      differs(*device, guilty);
      break;
    case 2:
      absent(*device, culprit, guilty);
      break;
    case 3:
      aborts(*device, guilty);
      break;
    case 4:
      leaves(host, *device, culprit, guilty);
      break;
    case 5:
      cuts_otherwise(*device, guilty);
      break;
  }
  device->drain();
  host.close();
}

}  // namespace primitives::native_tests
