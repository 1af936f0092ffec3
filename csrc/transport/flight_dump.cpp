// The flight recorder as JSON, and when it is written. See [Note: flight].
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <thread>

#include "transport/errors.hpp"
#include "transport/flight.hpp"
#include "transport/group.hpp"
#include "transport/registry.hpp"

namespace primitives {
namespace {

std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      out += {'\\', c};
    } else if (static_cast<unsigned char>(c) < 0x20) {
      out += ' ';
    } else {
      out += c;
    }
  }
  return out + "\"";
}

// {"name": value, ...}
class Object {
 public:
  Object& number(const char* name, int64_t value) { return add(name, std::to_string(value)); }
  Object& text(const char* name, const std::string& value) { return add(name, quoted(value)); }
  Object& raw(const char* name, const std::string& value) { return add(name, value); }
  std::string str() const { return "{" + members_ + "}"; }

 private:
  Object& add(const char* name, const std::string& value) {
    members_ += (members_.empty() ? "\"" : ", \"") + std::string(name) + "\": " + value;
    return *this;
  }
  std::string members_;
};

std::string joined(const std::vector<std::string>& items) {
  std::string out;
  for (const std::string& item : items) out += (out.empty() ? "\n  " : ",\n  ") + item;
  return "[" + out + "]";
}

std::string group_json(Group& group) {
  std::vector<std::string> ranks;
  for (int r = 0; r < group.world_size(); r++) {
    const Standing at = group.standing(r);
    ranks.push_back(Object()
                        .number("rank", r)
                        .number("global_rank", group.members()[r])
                        .number("pid", at.pid)
                        .text("state", at.state)
                        .number("seq", static_cast<int64_t>(at.seq))
                        .text("op", op_name(at.op))
                        .raw("inside", at.inside ? "true" : "false")
                        .text("site", at.site)
                        .text("waiting", at.waiting)
                        .str());
  }
  return Object()
      .text("name", group.name())
      .number("rank", group.rank())
      .text("failure", group.failure_text())
      .raw("ranks", joined(ranks))
      .str();
}

std::string record_json(const FlightRecord& record) {
  static const char* const kStates[] = {"queued", "started", "done", "failed"};
  const Call& call = record.call;
  return Object()
      .text("group", record.group)
      .number("rank", record.rank)
      .number("seq", static_cast<int64_t>(record.seq))
      .text("op", op_name(call.op))
      .text("reduce_op", reduce_op_name(call.reduce_op))
      .text("dtype", call.dtype)
      .number("numel", static_cast<int64_t>(call.numel))
      .number("root", call.root)
      .number("peer", record.peer)
      .number("tag", record.tag)
      .text("state", kStates[static_cast<uint32_t>(record.state)])
      .number("start_ns", record.start_ns)
      .number("end_ns", record.end_ns)
      .text("site", record.site == nullptr ? "" : record.site->text)
      .str();
}

int64_t clock_ns(clockid_t clock) {
  timespec time;
  clock_gettime(clock, &time);
  return int64_t{1000000000} * time.tv_sec + time.tv_nsec;
}

// The rank that names this process: of the largest group it is in.
int process_rank() {
  int rank = -1, largest = 0;
  for_each_group([&](Group& group) {
    if (group.world_size() <= largest) return;
    largest = group.world_size();
    rank = group.members()[group.rank()];
  });
  return rank;
}

struct Watch {
  std::mutex mutex;
  std::string folder;  // empty: nothing is written
  int wakeup = -1;     // eventfd: the handler rings, the thread writes the dump
  pid_t owner = 0;
  struct sigaction previous;
};

Watch& watch() {
  static auto* only = new Watch;
  return *only;
}

void on_signal(int number, siginfo_t* info, void* context) {
  Watch& mine = watch();
  const int saved = errno;
  const uint64_t one = 1;
  if (getpid() == mine.owner && write(mine.wakeup, &one, sizeof one) < 0) {
    // the counter is full: a dump is on its way
  }
  errno = saved;
  const struct sigaction& previous = mine.previous;
  if (previous.sa_flags & SA_SIGINFO) {
    previous.sa_sigaction(number, info, context);
  } else if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN) {
    previous.sa_handler(number);
  }
}

void write_dumps() {
  pthread_setname_np(pthread_self(), "primitives-fly");
  sigset_t all;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, nullptr);
  for (uint64_t num_rung = 0;;) {
    if (read(watch().wakeup, &num_rung, sizeof num_rung) > 0) dump_flight_on_error("SIGUSR1");
  }
}

}  // namespace

std::string flight_json(const std::string& reason) {
  std::vector<std::string> groups, records;
  for_each_group([&](Group& group) {
    if (!group.forked()) groups.push_back(group_json(group));
  });
  Flight::of_process().each(
      [&](const FlightRecord& record) { records.push_back(record_json(record)); });
  char host[256] = "";
  gethostname(host, sizeof host - 1);
  return Object()
             .number("version", 1)
             .text("reason", reason)
             .number("rank", process_rank())
             .number("pid", getpid())
             .text("host", host)
             .text("boot", boot_id())
             .number("time_ns", clock_ns(CLOCK_MONOTONIC))
             .number("unix_time_ns", clock_ns(CLOCK_REALTIME))
             .raw("groups", joined(groups))
             .raw("records", joined(records))
             .str() +
         "\n";
}

std::string dump_flight(const std::string& folder, const std::string& reason) {
  // Also over what is written: an older state must not replace a newer one.
  static std::mutex one_writer;
  std::lock_guard<std::mutex> lock(one_writer);
  const std::string text = flight_json(reason);
  mkdir(folder.c_str(), 0777);
  const std::string path = folder + "/flight_rank_" + std::to_string(process_rank()) + "_pid_" +
                           std::to_string(getpid()) + ".json";
  const std::string staged = path + ".new";
  FILE* file = std::fopen(staged.c_str(), "we");
  const bool written = file != nullptr && std::fwrite(text.data(), text.size(), 1, file) == 1;
  if ((file != nullptr && std::fclose(file) != 0) || !written ||
      std::rename(staged.c_str(), path.c_str()) != 0) {
    const int error = errno;
    ::unlink(staged.c_str());
    throw TransportError(Failure::kOther, "cannot write the flight recorder's dump " + path + ": " +
                                              std::strerror(error));
  }
  return path;
}

void watch_flight() {
  Watch& mine = watch();
  std::lock_guard<std::mutex> lock(mine.mutex);
  const char* folder = std::getenv("PRIMITIVES_FLIGHT_DIR");
  mine.folder = folder == nullptr ? "" : folder;
  if (mine.folder.empty() || mine.owner == getpid()) return;
  mine.wakeup = eventfd(0, EFD_CLOEXEC);
  if (mine.wakeup < 0) return;
  const bool inherited = mine.owner != 0;  // a fork: the handler is there, the thread is not
  mine.owner = getpid();
  std::thread(write_dumps).detach();
  if (inherited) return;
  struct sigaction action = {};
  action.sa_sigaction = on_signal;
  action.sa_flags = SA_SIGINFO | SA_RESTART | SA_ONSTACK;
  sigaction(SIGUSR1, &action, &mine.previous);
}

void dump_flight_on_error(const std::string& reason) {
  std::string folder;
  {
    std::lock_guard<std::mutex> lock(watch().mutex);
    if (watch().owner == getpid()) folder = watch().folder;
  }
  if (folder.empty()) return;
  try {
    dump_flight(folder, reason);
  } catch (const TransportError& error) {  // the error it belongs to matters more
    std::fprintf(stderr, "primitives: %s\n", error.what());
  }
}

}  // namespace primitives
