#include "faults.hpp"

#include <unistd.h>

#include <future>
#include <string>

#include "collectives/collectives.hpp"
#include "transport/mailbox.hpp"
#include "values.hpp"

namespace primitives::native_tests {
namespace {

constexpr Milliseconds kLong{60000}, kShort{200};

void sum(Group& group, size_t numel, Milliseconds timeout) {
  std::vector<float> data(numel, 1.0f);
  Call call;
  call.op = Op::kAllReduce;
  call.reduce_op = ReduceOp::kSum;
  call.itemsize = sizeof(float);
  call.numel = numel;
  const Reduction reduction{find_reduce(DType::kFloat32, ReduceOp::kSum), DType::kFloat32,
                            ReduceOp::kSum, sizeof(float), 0};
  all_reduce(group, call, data.data(), numel * sizeof(float), reduction, timeout);
}

void wrong_call(Group& group, bool guilty) {
  expect_failure(Failure::kMismatch, "one rank sums another number of elements",
                 [&] { sum(group, guilty ? 9 : 8, kLong); });
}

void absent(Group& group, bool guilty) {
  expect_failure(Failure::kTimeout, "one rank does not call", [&] {
    if (guilty) {
      while (!group.failed()) usleep(1000);
      group.check();
    }
    sum(group, 40000, kShort);
  });
}

void aborts(Group& group, bool guilty) {
  expect_failure(Failure::kPeerLost, "one rank aborts", [&] {
    if (guilty) {
      usleep(5000);
      group.abort("to see what happens");
      group.check();
    }
    sum(group, 8, kLong);
  });
}

void leaves(Group& group, bool guilty) {
  if (guilty) {
    usleep(5000);
    return group.close();
  }
  expect_failure(Failure::kPeerLost, "one rank leaves", [&] { sum(group, 8, kLong); });
}

Envelope envelope_of(const int32_t& data) {
  Envelope envelope{};
  envelope.nbytes = sizeof data;
  envelope.numel = 1;
  envelope.tag = 3;
  std::snprintf(envelope.dtype, sizeof envelope.dtype, "int32");
  return envelope;
}

// Receives from every rank; the culprit's message never comes.
void no_message(Group& group, int culprit) {
  Mailbox mailbox(group);
  std::promise<void> received;
  int32_t data = 0;
  auto arrived = [&](std::exception_ptr error, int) {
    error ? received.set_exception(error) : received.set_value();
  };
  mailbox.recv(&data, envelope_of(data), culprit, kShort, arrived);
  expect_failure(Failure::kTimeout, "a message does not come",
                 [&] { received.get_future().get(); });
}

// A group's threads stop while operations are pending.
void stops(Group& group) {
  Mailbox mailbox(group);
  std::promise<void> received;
  int32_t data = 0;
  auto arrived = [&](std::exception_ptr error, int) {
    error ? received.set_exception(error) : received.set_value();
  };
  mailbox.recv(&data, envelope_of(data), kAnySource, kLong, arrived);
  mailbox.stop();
  expect_failure(Failure::kOther, "the mailbox stops", [&] { received.get_future().get(); });
  sum(group, 8, kLong);  // the collectives go on
}

}  // namespace

void play_fault(int kind, int culprit, Meeting& meeting, const GroupOptions& options) {
  const bool guilty = options.rank == culprit;
  if (kind == 0) {
    if (guilty) return;  // never comes
    GroupOptions impatient = options;
    impatient.timeout = kShort;
    return expect_failure(Failure::kTimeout, "one rank does not join",
                          [&] { Group group(meeting, impatient); });
  }
  Group group(meeting, options);
  switch (kind) {
    case 1:
      return wrong_call(group, guilty);
    case 2:
      return absent(group, guilty);
    case 3:
      return aborts(group, guilty);
    case 4:
      return leaves(group, guilty);
    case 5:
      return no_message(group, culprit);
  }
  stops(group);
}

}  // namespace primitives::native_tests
