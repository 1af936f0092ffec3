// Point to point: messages with tags, independent of the collectives.
//
// Each ordered pair of ranks has a ring in the segment: a stream of bytes, where every message is a
// header and its payload. One thread per rank moves the bytes, so a send goes on though nobody
// waits for it.
//
// [Note: unexpected messages] A message nobody asked for stays in the ring and holds its sender
// back, unless this rank waits for another message behind it: then it is put aside in memory. So
// two ranks that post sends before receives cannot block each other, and a fast sender cannot fill
// a slow receiver's memory.
#pragma once

#include <deque>
#include <exception>
#include <functional>
#include <list>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "transport/group.hpp"
#include "transport/registry.hpp"

namespace primitives {

constexpr int kAnySource = -1;

// The header of a message. The caller fills the first four, the mailbox the others.
struct Envelope {
  uint64_t nbytes;
  uint64_t numel;
  int32_t tag;
  char dtype[20];
  uint64_t digest = 0;          // of the payload, in checked mode
  char site[kSiteNbytes] = "";  // where it was sent
};

class Mailbox {
 public:
  // Called once per operation, on the mailbox thread: its error or null, and the rank the message
  // came from.
  using Done = std::function<void(std::exception_ptr, int src)>;

  explicit Mailbox(Group& group);
  ~Mailbox() { stop(); }
  Mailbox(const Mailbox&) = delete;
  Mailbox& operator=(const Mailbox&) = delete;

  // The memory must live until `done`.
  void send(const void* data, const Envelope& envelope, int dst, Milliseconds timeout, Done done);
  void recv(void* data, const Envelope& envelope, int src, Milliseconds timeout, Done done);
  // All sends have left.
  bool idle();
  void stop();

 private:
  struct Operation {
    char* data;
    Envelope envelope;
    int peer;
    size_t moved;  // bytes of the payload; of header and payload for a send
    Clock::time_point deadline;
    Done done;
    const Site* site = nullptr;
    uint64_t flight = 0;
  };
  struct Finished {
    Done done;
    std::exception_ptr error;
    int src;
    uint64_t flight;
  };
  struct Aside {  // an unexpected message
    Envelope envelope;
    std::vector<char> payload;
  };
  struct Incoming {  // the message at the head of a ring, once its header is read
    bool active = false;
    Operation into;  // data == aside.payload when nobody asked for it
    Envelope envelope;
    bool unexpected = false;
    Aside aside;
  };

  void post(std::list<Operation>& to, Operation operation, Op op);
  void ring_bell(int rank);
  void loop();
  bool progress();
  bool progress_send(int dst);
  bool progress_recv(int src);
  void start_incoming(int src, const Envelope& envelope);
  bool match_aside();
  void finish(Operation& operation, int src, std::exception_ptr error = nullptr);
  void check_pending();
  void fail_pending(std::exception_ptr error);
  void check_match(const Operation& recv, const Envelope& sent, int src);
  void check_payload(const Operation& recv, const Envelope& sent, int src);
  void tell_waiting();
  bool wanted_from(int src) const;
  std::string describe(const Operation& operation) const;

  Ring& ring(int src, int dst) const {
    return *reinterpret_cast<Ring*>(group_.segment().data() + group_.layout().ring_head(src, dst));
  }
  void copy_in(int dst, uint64_t at, const char* data, size_t nbytes);
  void copy_out(int src, uint64_t at, char* data, size_t nbytes);

  Group& group_;
  std::mutex mutex_;
  std::vector<std::list<Operation>> sends_;  // by destination
  std::list<Operation> recvs_;               // in the order they were posted
  std::vector<Incoming> incoming_;           // by source
  std::vector<std::deque<Aside>> aside_;     // by source
  std::vector<bool> seen_gone_;
  std::vector<Finished> finished_;
  std::optional<Waiting> waiting_;
  bool stopping_ = false;
  std::thread thread_;  // started by the first operation
};

}  // namespace primitives
