// The collectives and messages over several hosts that only move bytes. See [Note: two levels].
#include <algorithm>
#include <cstring>

#include "collectives/several_hosts.hpp"

namespace primitives {

// Tags on the wire: collectives use 0, messages what is above.
constexpr int kAnnounced = 1 << 29, kPayload = 1 << 30;

void SeveralHosts::spread(const std::vector<Item>& items) {
  if (hosts_.is_leader()) {
    Messages messages(*this);
    for (const Item& item : items) {
      if (item.host != hosts_.mine) messages.recv(item.part, hosts_.members[item.host][0]);
      for (int h = 0; item.host == hosts_.mine && h < std::ssize(hosts_.members); h++) {
        if (h != hosts_.mine) messages.send(item.part, hosts_.members[h][0]);
      }
    }
    messages.wait();
  }
  for (const Item& item : items) {
    if (item.host == hosts_.mine || item.part.nbytes == 0) continue;
    Call call = local_call(Op::kBroadcast, item.part.nbytes);
    call.root = 0;
    primitives::broadcast(*local_, call, item.part.data, item.part.nbytes, time_left());
  }
}

void SeveralHosts::gather_all(const void* in, size_t in_nbytes, const std::vector<Part>& out) {
  Call call = local_call(Op::kAllGather, in_nbytes);
  call.has_counts = true;
  primitives::all_gather(*local_, call, in, in_nbytes, local_parts(out), time_left());
  std::vector<Item> items;
  for (int r = 0; r < hosts_.world_size(); r++) items.push_back({hosts_.of[r], out[r]});
  spread(items);
}

void SeveralHosts::all_gather(const Call& call, const void* in, size_t in_nbytes,
                              const std::vector<Part>& out, Milliseconds timeout) {
  std::vector<uint64_t> send(out.size(), in_nbytes), recv;
  for (const Part& part : out) recv.push_back(part.nbytes);
  run(call, call.has_counts ? send.data() : nullptr, recv.data(), timeout,
      [&] { gather_all(in, in_nbytes, out); });
}

void SeveralHosts::broadcast(const Call& call, void* data, size_t nbytes, Milliseconds timeout) {
  run(call, nullptr, nullptr, timeout, [&] {
    if (hosts_.is_local(call.root)) {
      Call local = local_call(Op::kBroadcast, nbytes);
      local.root = hosts_.position(call.root);
      primitives::broadcast(*local_, local, data, nbytes, time_left());
    }
    spread({{hosts_.of[call.root], {data, nbytes}}});
  });
}

void SeveralHosts::gather(const Call& call, const void* in, size_t in_nbytes,
                          const std::vector<Part>& out, Milliseconds timeout) {
  run(call, nullptr, nullptr, timeout, [&] {
    Messages messages(*this);
    if (hosts_.is_local(call.root)) {
      for (int r = 0; hosts_.rank == call.root && r < hosts_.world_size(); r++) {
        if (!hosts_.is_local(r)) messages.recv(out[r], r);
      }
      Call local = local_call(Op::kGather, in_nbytes);
      local.root = hosts_.position(call.root);
      const auto parts = hosts_.rank == call.root ? local_parts(out) : std::vector<Part>{};
      primitives::gather(*local_, local, in, in_nbytes, parts, time_left());
    } else {
      messages.send({const_cast<void*>(in), in_nbytes}, call.root);
    }
    messages.wait();
  });
}

void SeveralHosts::scatter(const Call& call, const std::vector<Part>& in, void* out,
                           size_t out_nbytes, Milliseconds timeout) {
  run(call, nullptr, nullptr, timeout, [&] {
    Messages messages(*this);
    if (hosts_.is_local(call.root)) {
      for (int r = 0; hosts_.rank == call.root && r < hosts_.world_size(); r++) {
        if (!hosts_.is_local(r)) messages.send(in[r], r);
      }
      Call local = local_call(Op::kScatter, out_nbytes);
      local.root = hosts_.position(call.root);
      const auto parts = hosts_.rank == call.root ? local_parts(in) : std::vector<Part>{};
      primitives::scatter(*local_, local, parts, out, out_nbytes, time_left());
    } else {
      messages.recv({out, out_nbytes}, call.root);
    }
    messages.wait();
  });
}

void SeveralHosts::all_to_all(const Call& call, const std::vector<Part>& in,
                              const std::vector<Part>& out, Milliseconds timeout) {
  std::vector<uint64_t> send, recv;
  for (const Part& part : in) send.push_back(part.nbytes);
  for (const Part& part : out) recv.push_back(part.nbytes);
  run(call, call.has_counts ? send.data() : nullptr, recv.data(), timeout, [&] {
    Messages messages(*this);
    for (int r = 0; r < hosts_.world_size(); r++) {
      if (hosts_.is_local(r)) continue;
      messages.recv(out[r], r);
      messages.send(in[r], r);
    }
    Call local = local_call(Op::kAllToAll, 0);
    local.has_counts = true;
    primitives::all_to_all(*local_, local, local_parts(in), local_parts(out), time_left());
    messages.wait();
  });
}

void SeveralHosts::barrier(Milliseconds timeout) {
  Call call;
  call.op = Op::kBarrier;
  run(call, nullptr, nullptr, timeout, [] {});  // the agreement is one
}

// ---- point to point: an announcement under the message's tag, so that the receiver can refuse a
// payload that does not fit; then the payload under a tag of its own. Messages inside a host go
// this way too: a receive from any rank waits in one place.

struct SeveralHosts::Announcement {
  Envelope envelope;
  int32_t src;
  uint32_t id;
};

void SeveralHosts::send(const void* data, const Envelope& envelope, int dst, Milliseconds timeout,
                        Mailbox::Done done) {
  local_->check();
  if (envelope.tag < 0 || envelope.tag >= kAnnounced || dst == hosts_.rank) {
    throw std::invalid_argument(
        "send over several hosts: expected another rank and a tag below 2^29");
  }
  const auto deadline = Clock::now() + timeout;
  auto announcement = std::make_shared<Announcement>(
      Announcement{envelope, hosts_.rank, num_messages_++ % kPayload});
  const std::string what = "send, tag " + std::to_string(envelope.tag);
  const auto first = posted(dst, what, [&] {
    return wire_->send(announcement.get(), sizeof(Announcement), dst, kAnnounced + envelope.tag);
  });
  std::shared_ptr<Wire::Pending> second;
  if (envelope.nbytes > 0) {
    second = posted(dst, what, [&] {
      return wire_->send(data, envelope.nbytes, dst, kPayload + static_cast<int>(announcement->id));
    });
  }
  num_sending_++;
  waiters_->run([=, this] {
    std::exception_ptr error;
    try {
      first->wait(deadline);
      if (second) second->wait(deadline);
    } catch (const WireError& broken) {
      try {
        lost(dst, deadline, what, broken.what());
      } catch (...) {
        error = std::current_exception();
      }
    }
    num_sending_--;
    static_cast<void>(announcement);  // kept until it has left
    done(error, hosts_.rank);
  });
}

void SeveralHosts::recv(void* data, const Envelope& envelope, int src, Milliseconds timeout,
                        Mailbox::Done done) {
  local_->check();
  if (envelope.tag < 0 || envelope.tag >= kAnnounced || src == hosts_.rank) {
    throw std::invalid_argument(
        "recv over several hosts: expected another rank and a tag below 2^29");
  }
  const auto deadline = Clock::now() + timeout;
  auto sent = std::make_shared<Announcement>();
  const std::string what = "recv, tag " + std::to_string(envelope.tag);
  const auto first = posted(src, what, [&] {
    return wire_->recv(sent.get(), sizeof(Announcement), src, kAnnounced + envelope.tag);
  });
  waiters_->run([=, this] {
    std::exception_ptr error;
    try {
      try {
        first->wait(deadline);
        if (sent->envelope.nbytes != envelope.nbytes ||
            std::strcmp(sent->envelope.dtype, envelope.dtype) != 0) {
          auto text = [](const Envelope& of) {
            return "(" + std::string(of.dtype) + ", " + std::to_string(of.nbytes) + " bytes, tag " +
                   std::to_string(of.tag) + ")";
          };
          fail(Failure::kMismatch,
               "in group '" + options_.name + "' rank " + std::to_string(sent->src) +
                   " called send" + text(sent->envelope) + ", but rank " +
                   std::to_string(hosts_.rank) + " called recv" + text(envelope));
        }
        if (envelope.nbytes > 0) {
          wire_->recv(data, envelope.nbytes, sent->src, kPayload + static_cast<int>(sent->id))
              ->wait(deadline);
        }
      } catch (const WireError& broken) {
        lost(src, deadline, what, broken.what());
      }
    } catch (...) {
      error = std::current_exception();
    }
    done(error, sent->src);
  });
}

}  // namespace primitives
