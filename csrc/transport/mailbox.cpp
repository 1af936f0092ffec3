#include "transport/mailbox.hpp"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <cstring>

#include "transport/digest.hpp"
#include "transport/futex.hpp"

namespace primitives {

Mailbox::Mailbox(Group& group)
    : group_(group),
      sends_(group.world_size()),
      incoming_(group.world_size()),
      aside_(group.world_size()),
      seen_gone_(group.world_size()) {}

void Mailbox::send(const void* data, const Envelope& envelope, int dst, Milliseconds timeout,
                   Done done) {
  post(sends_[dst],
       {static_cast<char*>(const_cast<void*>(data)), envelope, dst, 0, Clock::now() + timeout,
        std::move(done)},
       Op::kSend);
}

void Mailbox::recv(void* data, const Envelope& envelope, int src, Milliseconds timeout, Done done) {
  post(recvs_,
       {static_cast<char*>(data), envelope, src, 0, Clock::now() + timeout, std::move(done)},
       Op::kRecv);
}

void Mailbox::post(std::list<Operation>& to, Operation operation, Op op) {
  group_.check();
  Envelope& envelope = operation.envelope;
  operation.site = this_site();
  if (operation.site != nullptr) std::memcpy(envelope.site, operation.site->text, kSiteNbytes);
  if (op == Op::kSend && group_.checked()) {
    envelope.digest = digest_of(operation.data, envelope.nbytes);
  }
  operation.flight = group_.record_message(op, operation.peer, envelope.tag, envelope.dtype,
                                           envelope.numel, operation.site);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (stopping_) throw TransportError(Failure::kOther, "the process group is destroyed");
    to.push_back(std::move(operation));
    if (!thread_.joinable()) thread_ = std::thread([this] { loop(); });
  }
  ring_bell(group_.rank());
}

bool Mailbox::idle() {
  std::lock_guard<std::mutex> lock(mutex_);
  return std::all_of(sends_.begin(), sends_.end(), [](const auto& list) { return list.empty(); });
}

void Mailbox::stop() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  ring_bell(group_.rank());
  if (thread_.joinable()) thread_.join();
}

void Mailbox::ring_bell(int rank) {
  RankLine& line = group_.line(rank);
  line.bell.fetch_add(1, std::memory_order_seq_cst);
  if (line.asleep.load(std::memory_order_seq_cst) != 0) futex_wake_all(&line.bell);
}

void Mailbox::loop() {
  pthread_setname_np(pthread_self(), "primitives-p2p");
  RankLine& mine = group_.line(group_.rank());
  auto next_check = Clock::now();
  for (int num_idle = 0;;) {
    const uint32_t bell = mine.bell.load(std::memory_order_seq_cst);
    bool moved = false, pending = false, stopping = false;
    std::vector<Finished> finished;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stopping = stopping_;
      try {
        if (stopping) throw TransportError(Failure::kOther, "the process group was destroyed");
        moved = progress();
        if (Clock::now() >= next_check) {
          group_.check();
          check_pending();
          tell_waiting();
          next_check = Clock::now() + Milliseconds(100);
        }
      } catch (...) {
        fail_pending(std::current_exception());
      }
      pending = !recvs_.empty();
      for (const auto& list : sends_) pending = pending || !list.empty();
      for (const auto& incoming : incoming_) pending = pending || incoming.active;
      finished.swap(finished_);
    }
    for (Finished& operation : finished) {
      Flight::of_process().end(operation.flight,
                               operation.error ? FlightState::kFailed : FlightState::kDone);
      operation.done(operation.error, operation.src);
    }
    if (stopping) return;
    num_idle = moved || !finished.empty() ? 0 : num_idle + 1;
    if (num_idle == 0) continue;
    if (pending && num_idle < 20) {  // the peer is probably at it
      sched_yield();
      continue;
    }
    mine.asleep.store(1, std::memory_order_seq_cst);
    if (mine.bell.load(std::memory_order_seq_cst) == bell) {
      futex_wait(&mine.bell, bell, Milliseconds(pending ? 50 : 1000));
    }
    mine.asleep.store(0, std::memory_order_seq_cst);
  }
}

bool Mailbox::progress() {
  bool moved = match_aside();
  for (int r = 0; r < group_.world_size(); r++) {
    while (progress_send(r)) moved = true;
    while (progress_recv(r)) moved = true;
  }
  return moved;
}

void Mailbox::copy_in(int dst, uint64_t at, const char* data, size_t nbytes) {
  if (nbytes == 0) return;  // an empty payload may have no address
  char* base = group_.segment().data() + group_.layout().ring_data(group_.rank(), dst);
  const size_t offset = at % kRingNbytes, first = std::min(nbytes, kRingNbytes - offset);
  std::memcpy(base + offset, data, first);
  std::memcpy(base, data + first, nbytes - first);
}

void Mailbox::copy_out(int src, uint64_t at, char* data, size_t nbytes) {
  if (nbytes == 0) return;
  const char* base = group_.segment().data() + group_.layout().ring_data(src, group_.rank());
  const size_t offset = at % kRingNbytes, first = std::min(nbytes, kRingNbytes - offset);
  std::memcpy(data, base + offset, first);
  std::memcpy(data + first, base, nbytes - first);
}

// Moves what fits of the first message to `dst`. False when nothing could move.
bool Mailbox::progress_send(int dst) {
  if (sends_[dst].empty()) return false;
  Operation& send = sends_[dst].front();
  Ring& to = ring(group_.rank(), dst);
  if (to.backed.load(std::memory_order_relaxed) == 0) {
    try {
      group_.segment().commit(group_.layout().ring_data(group_.rank(), dst), kRingNbytes);
    } catch (const TransportError& error) {  // the receiver shall not wait for its deadline
      group_.fail(error.failure, "send to " + describe(send) + ": " + error.what());
    }
    to.backed.store(1, std::memory_order_relaxed);
  }
  const uint64_t written = to.written.load(std::memory_order_relaxed);
  size_t room = kRingNbytes - (written - to.read.load(std::memory_order_acquire));
  uint64_t at = written;
  if (send.moved == 0) {
    if (room < sizeof(Envelope)) return false;
    copy_in(dst, at, reinterpret_cast<const char*>(&send.envelope), sizeof(Envelope));
    send.moved = sizeof(Envelope);
    at += sizeof(Envelope);
    room -= sizeof(Envelope);
  }
  const size_t nbytes = std::min(room, send.envelope.nbytes + sizeof(Envelope) - send.moved);
  copy_in(dst, at, send.data + (send.moved - sizeof(Envelope)), nbytes);
  send.moved += nbytes;
  at += nbytes;
  if (at != written) {
    to.written.store(at, std::memory_order_release);
    ring_bell(dst);
  }
  if (send.moved < send.envelope.nbytes + sizeof(Envelope)) return at != written;
  finish(send, group_.rank());
  sends_[dst].pop_front();
  return true;
}

// Moves what has come of the first message from `src`. False when nothing could move.
bool Mailbox::progress_recv(int src) {
  Incoming& incoming = incoming_[src];
  Ring& from = ring(src, group_.rank());
  uint64_t read = from.read.load(std::memory_order_relaxed);
  const uint64_t begin = read;
  uint64_t available = from.written.load(std::memory_order_acquire) - read;
  if (!incoming.active) {
    if (available < sizeof(Envelope) || !wanted_from(src)) return false;
    Envelope envelope;
    copy_out(src, read, reinterpret_cast<char*>(&envelope), sizeof envelope);
    start_incoming(src, envelope);
    read += sizeof envelope;
    available -= sizeof envelope;
  }
  Operation& into = incoming.into;
  const size_t nbytes = std::min<size_t>(available, into.envelope.nbytes - into.moved);
  copy_out(src, read, into.data + into.moved, nbytes);
  into.moved += nbytes;
  read += nbytes;
  if (read != begin) {
    from.read.store(read, std::memory_order_release);
    ring_bell(src);
  }
  if (into.moved < into.envelope.nbytes) return read != begin;
  if (!incoming.unexpected) check_payload(into, incoming.envelope, src);
  incoming.active = false;
  if (incoming.unexpected) {
    aside_[src].push_back(std::move(incoming.aside));
    match_aside();
  } else {
    finish(into, src);
  }
  return true;
}

void Mailbox::finish(Operation& operation, int src, std::exception_ptr error) {
  finished_.push_back({std::move(operation.done), error, src, operation.flight});
}

// "rank 1, tag 3 on rank 0 of group 'world'"
std::string Mailbox::describe(const Operation& operation) const {
  const int peer = operation.peer;
  return (peer == kAnySource ? "any rank" : group_.named(peer)) + ", tag " +
         std::to_string(operation.envelope.tag) + " on " + group_.named(group_.rank()) +
         " of group '" + group_.name() + "'" + at_site(operation.envelope.site);
}

bool Mailbox::wanted_from(int src) const {
  return std::any_of(recvs_.begin(), recvs_.end(), [&](const Operation& recv) {
    return recv.peer == src || recv.peer == kAnySource;
  });
}

// Gives the message whose header was just read to the first receive that asks for it, or puts it
// aside.
void Mailbox::start_incoming(int src, const Envelope& envelope) {
  Incoming& incoming = incoming_[src];
  incoming.envelope = envelope;
  const auto recv = std::find_if(recvs_.begin(), recvs_.end(), [&](const Operation& posted) {
    return (posted.peer == src || posted.peer == kAnySource) && posted.envelope.tag == envelope.tag;
  });
  incoming.unexpected = recv == recvs_.end();
  if (incoming.unexpected) {
    incoming.aside = {envelope, std::vector<char>(envelope.nbytes)};
    incoming.into = {incoming.aside.payload.data(), envelope, src, 0, Clock::time_point::max(), {}};
  } else {
    check_match(*recv, envelope, src);
    incoming.into = std::move(*recv);
    incoming.into.peer = src;
    recvs_.erase(recv);
  }
  incoming.active = true;
}

// Hands messages that were put aside to receives posted since.
bool Mailbox::match_aside() {
  bool moved = false;
  for (auto recv = recvs_.begin(); recv != recvs_.end();) {
    bool matched = false;
    for (int src = 0; src < group_.world_size() && !matched; src++) {
      if (recv->peer != src && recv->peer != kAnySource) continue;
      const auto aside =
          std::find_if(aside_[src].begin(), aside_[src].end(),
                       [&](const Aside& kept) { return kept.envelope.tag == recv->envelope.tag; });
      if (aside == aside_[src].end()) continue;
      check_match(*recv, aside->envelope, src);
      if (!aside->payload.empty()) {
        std::memcpy(recv->data, aside->payload.data(), aside->payload.size());
      }
      check_payload(*recv, aside->envelope, src);
      finish(*recv, src);
      aside_[src].erase(aside);
      matched = moved = true;
    }
    recv = matched ? recvs_.erase(recv) : std::next(recv);
  }
  return moved;
}

void Mailbox::check_match(const Operation& recv, const Envelope& sent, int src) {
  const Envelope& asked = recv.envelope;
  if (asked.nbytes == sent.nbytes && std::strcmp(asked.dtype, sent.dtype) == 0) return;
  auto text = [](const Envelope& of) {
    return "(" + std::string(of.dtype) + ", " + std::to_string(of.nbytes) + " bytes, tag " +
           std::to_string(of.tag) + ")" + at_site(of.site);
  };
  group_.fail(Failure::kMismatch, "in group '" + group_.name() + "' " + group_.named(src) +
                                      " called send" + text(sent) + ", but " +
                                      group_.named(group_.rank()) + " called recv" + text(asked));
}

// What has come is what was sent, in checked mode. See [Note: digests].
void Mailbox::check_payload(const Operation& recv, const Envelope& sent, int src) {
  if (sent.digest == 0 || digest_of(recv.data, sent.nbytes) == sent.digest) return;
  Operation from = recv;
  from.peer = src;
  group_.fail(Failure::kOther, "recv from " + describe(from) + " read other bytes than " +
                                   group_.named(src) + " wrote, in bytes [0, " +
                                   std::to_string(sent.nbytes) + ") of its send" +
                                   at_site(sent.site));
}

// Messages that have waited for long are told to the other ranks.
void Mailbox::tell_waiting() {
  const Operation* first = recvs_.empty() ? nullptr : &recvs_.front();
  std::string what = "recv from ";
  for (const auto& list : sends_) {
    if (first != nullptr || list.empty()) continue;
    first = &list.front();
    what = "send to ";
  }
  waiting_.reset();
  if (first != nullptr) waiting_.emplace(group_, what + describe(*first), true);
}

// Every 100 ms: deadlines, and peers that are gone. A peer counts as gone the second time, so that
// what it wrote just before is read first.
void Mailbox::check_pending() {
  std::vector<bool> lost(group_.world_size());
  for (int r = 0; r < group_.world_size(); r++) {
    const bool is_gone = group_.has_gone(r);
    lost[r] = is_gone && seen_gone_[r];
    seen_gone_[r] = is_gone;
  }
  auto check = [&](const Operation& operation, const std::string& what) {
    std::vector<int> peers{operation.peer};
    if (operation.peer == kAnySource) {
      peers.clear();
      for (int r = 0; r < group_.world_size(); r++) peers.push_back(r);
    }
    const bool all_lost = std::all_of(peers.begin(), peers.end(), [&](int r) {
      return r == group_.rank() ? peers.size() > 1 : lost[r];
    });
    const auto first = std::find(lost.begin(), lost.end(), true);
    const int gone = !all_lost           ? -1
                     : peers.size() == 1 ? peers[0]
                                         : static_cast<int>(first - lost.begin());
    if (all_lost || Clock::now() >= operation.deadline) {
      group_.check_missing(peers, gone, operation.deadline, what + describe(operation));
    }
  };
  for (const auto& list : sends_) {
    if (!list.empty()) check(list.front(), "send to ");
  }
  for (const Operation& recv : recvs_) check(recv, "recv from ");
  for (const Incoming& incoming : incoming_) {
    if (incoming.active) check(incoming.into, "recv from ");
  }
}

void Mailbox::fail_pending(std::exception_ptr error) {
  auto fail = [&](Operation& operation) {
    if (operation.done) finish(operation, operation.peer, error);
  };
  for (auto& list : sends_) {
    for (Operation& send : list) fail(send);
    list.clear();
  }
  for (Operation& recv : recvs_) fail(recv);
  recvs_.clear();
  for (Incoming& incoming : incoming_) {
    if (incoming.active) fail(incoming.into);
    incoming.active = false;
  }
}

}  // namespace primitives
