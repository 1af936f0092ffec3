// The life of a group over several hosts: who is where, the agreement on a call, and failure. See
// [Note: two levels] and [Note: failure over hosts].
#include "collectives/several_hosts.hpp"

#include <algorithm>
#include <cstring>

#include "transport/caller.hpp"

namespace primitives {
namespace {

constexpr Milliseconds kWatchPeriod(100);
// The rank that is missing is known best on its own host: remote waits let that host speak first,
// and ranks that wait for their leader come last.
constexpr Milliseconds kWireGrace(500), kLocalGrace(1500);

class PrefixedMeeting : public Meeting {
 public:
  PrefixedMeeting(Meeting& of, std::string prefix) : of_(of), prefix_(std::move(prefix)) {}
  void set(const std::string& key, const std::string& value) override {
    of_.set(prefix_ + key, value);
  }
  std::string get(const std::string& key) override { return of_.get(prefix_ + key); }
  bool has(const std::string& key) override { return of_.has(prefix_ + key); }
  int64_t add(const std::string& key, int64_t value) override {
    return of_.add(prefix_ + key, value);
  }

 private:
  Meeting& of_;
  std::string prefix_;
};

// What each rank says before a collective; followed by 2 * world_size counts.
struct Record {
  Call call;
  char site[kSiteNbytes];  // where it was called; "" when unknown
};

}  // namespace

Hosts::Hosts(int rank, const std::vector<std::string>& host_of_rank) : rank(rank) {
  for (int r = 0; r < std::ssize(host_of_rank); r++) {
    const auto at = std::find(names.begin(), names.end(), host_of_rank[r]);
    of.push_back(static_cast<int>(at - names.begin()));
    if (at == names.end()) {
      names.push_back(host_of_rank[r]);
      members.emplace_back();
    }
    members[of[r]].push_back(r);
  }
  mine = of[rank];
}

int Hosts::position(int r) const {
  const auto& ranks = members[of[r]];
  return static_cast<int>(std::find(ranks.begin(), ranks.end(), r) - ranks.begin());
}

int Hosts::counterpart(int host, int r) const {
  if (of[r] == host) return r;
  const auto before = std::count_if(of.begin(), of.begin() + r, [&](int h) { return h != host; });
  return members[host][before % std::ssize(members[host])];
}

SeveralHosts::SeveralHosts(std::unique_ptr<Meeting> meeting, GroupOptions options,
                           const std::vector<std::string>& host_of_rank, std::unique_ptr<Wire> wire)
    : hosts_(options.rank, host_of_rank),
      options_(options),
      meeting_(std::move(meeting)),
      wire_(std::move(wire)) {
  // The store may hold what an earlier group of this name left.
  round_ =
      "hosts" + std::to_string(meeting_->add("hosts/" + std::to_string(options.rank), 1)) + "/";
  const auto& ranks = hosts_.local();
  options.rank = hosts_.position(hosts_.rank);
  options.world_size = static_cast<int>(ranks.size());
  options.name += " on host " + hosts_.names[hosts_.mine];
  options.numbers = ranks;
  PrefixedMeeting here(*meeting_, round_ + std::to_string(hosts_.mine) + "/");
  for (size_t i = 0; !options_.members.empty() && i < ranks.size(); i++) {
    options.members[i] = options_.members[ranks[i]];  // ascending, so none is overwritten early
  }
  if (!options_.members.empty()) options.members.resize(ranks.size());
  local_ = std::make_unique<Group>(here, options);
  watch_ = std::thread([this] { watch(); });
}

SeveralHosts::~SeveralHosts() { close(); }

void SeveralHosts::close() {
  if (local_->forked()) return;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  changed_.notify_all();
  if (watch_.joinable()) watch_.join();
  wire_->abort();
  while (!waiters_->idle()) std::this_thread::sleep_for(Milliseconds(1));
  waiters_->stop();
  local_->close();
  wire_->close();
}

// ---- failure

bool SeveralHosts::has_gone(int rank) const {
  return hosts_.is_local(rank) && local_->has_gone(hosts_.position(rank));
}

std::string SeveralHosts::describe_rank(int rank) const {
  return "rank " + std::to_string(rank) + " on host '" + hosts_.names[hosts_.of[rank]] + "'";
}

void SeveralHosts::fail(Failure failure, const std::string& what) {
  publish(failure, what);
  local_->fail(failure, what);
}

// Makes it the failure of this host's part unless that has one already.
void SeveralHosts::adopt(Failure failure, const std::string& what) {
  try {
    local_->fail(failure, what);
  } catch (const TransportError&) {  // told to everybody here, which is all that is wanted
  }
}

void SeveralHosts::publish(Failure failure, const std::string& what) {
  try {
    if (!meeting_->has(round_ + "failure")) {
      meeting_->set(round_ + "failure",
                    std::to_string(static_cast<uint32_t>(failure)) + "\n" + what);
    }
  } catch (const std::exception&) {  // the store went with its host: peers notice that themselves
  }
}

bool SeveralHosts::adopt_published() {
  try {
    if (!meeting_->has(round_ + "failure")) return false;
    const std::string value = meeting_->get(round_ + "failure");
    const size_t cut = value.find('\n');
    adopt(static_cast<Failure>(std::stoul(value.substr(0, cut))), value.substr(cut + 1));
    return true;
  } catch (const std::exception&) {  // as above
    return false;
  }
}

void SeveralHosts::watch() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (!stopping_ && !local_->failed()) changed_.wait_for(lock, kWatchPeriod);
  if (stopping_) return;
  lock.unlock();
  try {
    local_->check();
  } catch (const TransportError& error) {
    publish(error.failure, error.what());
  }
  wire_->abort();
  wire_->close();
}

void SeveralHosts::lost(int peer, Clock::time_point deadline, const std::string& what,
                        const std::string& why) {
  const bool late = Clock::now() >= deadline;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (stopping_) throw TransportError(Failure::kOther, "the process group was destroyed");
  }
  // The peer's host may know better: give its words the time to come.
  for (int i = 0; i < 5 && !local_->failed() && !adopt_published(); i++) {
    std::this_thread::sleep_for(kWatchPeriod);
  }
  local_->check();
  const std::string waiting =
      describe_rank(hosts_.rank) + " of group '" + options_.name + "' in " + what;
  std::string ranks;
  for (int r : hosts_.members[hosts_.of[std::max(peer, 0)]]) {
    ranks += (ranks.empty() ? "" : ", ") + std::to_string(r);
  }
  if (late) {
    fail(Failure::kTimeout,
         waiting + " passed its deadline; missing: " +
             (peer == kAnySource ? "any rank"
                                 : describe_rank(peer) + " (that host runs ranks " + ranks + ")"));
  }
  fail(Failure::kPeerLost, (peer == kAnySource ? "another host" : describe_rank(peer)) +
                               " cannot be reached any more; " + waiting + " still needs it (" +
                               why + ")");
}

// ---- messages of one step

void SeveralHosts::Messages::send(const Part& part, int dst) {
  if (part.nbytes > 0) pending_.emplace_back(dst, of_.wire_->send(part.data, part.nbytes, dst, 0));
}

void SeveralHosts::Messages::recv(const Part& part, int src) {
  if (part.nbytes > 0) pending_.emplace_back(src, of_.wire_->recv(part.data, part.nbytes, src, 0));
}

void SeveralHosts::Messages::wait() {
  const auto deadline = of_.deadline_ + kWireGrace;
  for (auto& [peer, message] : pending_) {
    try {
      message->wait(deadline);
    } catch (const WireError& error) {
      of_.lost(peer, deadline, "collective " + std::to_string(of_.seq_), error.what());
    }
  }
}

// ---- the agreement

void SeveralHosts::run(const Call& call, const uint64_t* send_nbytes, const uint64_t* recv_nbytes,
                       Milliseconds timeout, const std::function<void()>& body) {
  try {
    agree(call, send_nbytes, recv_nbytes, timeout);
    body();
  } catch (const TransportError& error) {
    if (local_->failed()) publish(error.failure, error.what());
    throw;
  } catch (const WireError& error) {  // a message could not even be posted
    lost(hosts_.rank, Clock::time_point::max(), "collective " + std::to_string(seq_), error.what());
  }
}

void SeveralHosts::agree(const Call& call, const uint64_t* send_nbytes, const uint64_t* recv_nbytes,
                         Milliseconds timeout) {
  local_->check();
  if (timeout.count() <= 0) timeout = options_.timeout;
  deadline_ = Clock::now() + timeout;
  seq_++;
  const int n = hosts_.world_size();
  const size_t nbytes = sizeof(Record) + 2 * n * sizeof(uint64_t);
  std::vector<char> records(n * nbytes);  // by host, then by rank
  std::vector<Item> items;
  std::vector<Part> mine;
  for (char* at = records.data(); const auto& ranks : hosts_.members) {
    items.push_back({static_cast<int>(items.size()), {at, ranks.size() * nbytes}});
    at += items.back().part.nbytes;
  }
  for (size_t i = 0; i < hosts_.local().size(); i++) {
    mine.push_back({static_cast<char*>(items[hosts_.mine].part.data) + i * nbytes, nbytes});
  }
  std::vector<char> own(nbytes);
  Record record{call, ""};
  record.call.has_counts = send_nbytes != nullptr;
  if (const Site* site = this_site()) std::memcpy(record.site, site->text, sizeof record.site);
  std::memcpy(own.data(), &record, sizeof record);
  if (send_nbytes != nullptr) {
    std::memcpy(own.data() + sizeof record, send_nbytes, n * sizeof(uint64_t));
    std::memcpy(own.data() + sizeof record + n * sizeof(uint64_t), recv_nbytes,
                n * sizeof(uint64_t));
  }
  primitives::all_gather(*local_, local_call(Op::kAllGather, nbytes), own.data(), nbytes, mine,
                         timeout);
  spread(items);
  compare(records.data(), nbytes);
}

// Every rank compares everything, so every rank throws the same error.
void SeveralHosts::compare(const char* records, size_t record_nbytes) {
  const int n = hosts_.world_size();
  std::vector<Record> of(n);
  std::vector<std::vector<uint64_t>> counts(n, std::vector<uint64_t>(2 * n));
  std::vector<Side> sides(n);
  std::vector<std::string> sites(n);
  for (const auto& ranks : hosts_.members) {
    for (int r : ranks) {
      std::memcpy(&of[r], records, sizeof(Record));
      std::memcpy(counts[r].data(), records + sizeof(Record), 2 * n * sizeof(uint64_t));
      sides[r] = {&of[r].call, counts[r].data()};
      sites[r] = of[r].site;
      records += record_nbytes;
    }
  }
  if (sides_agree(n, [&](int r) { return sides[r]; })) return;
  fail(Failure::kMismatch, describe_sides(seq_, options_.name, sides, sites));
}

Milliseconds SeveralHosts::time_left() const {
  const auto left = std::chrono::duration_cast<Milliseconds>(deadline_ - Clock::now());
  return std::max(left, Milliseconds(0)) + kLocalGrace;
}

Call SeveralHosts::local_call(Op op, size_t nbytes) const {
  Call call;
  call.op = op;
  std::strcpy(call.dtype, "bytes");
  call.numel = nbytes;
  return call;
}

std::vector<Part> SeveralHosts::local_parts(const std::vector<Part>& parts) const {
  std::vector<Part> local;
  for (int r : hosts_.local()) local.push_back(parts[r]);
  return local;
}

}  // namespace primitives
