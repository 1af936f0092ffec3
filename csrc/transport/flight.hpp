// The flight recorder: the last calls of this process, always on, and how they are told.
//
// [Note: flight] Every collective and message of every group of the process takes the next place of
// one ring. A dump is one JSON file a process: where the ranks of each group stand, then the
// records. It is written when a group fails and on SIGUSR1, if PRIMITIVES_FLIGHT_DIR names a
// folder; `testbed flight` merges the files of all ranks.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

#include "transport/call.hpp"
#include "transport/caller.hpp"

namespace primitives {

enum class FlightState : uint32_t { kQueued, kStarted, kDone, kFailed };

struct FlightRecord {
  char group[48] = "";
  int32_t rank = 0;  // within the group
  int32_t peer = -1;
  int32_t tag = 0;
  FlightState state = FlightState::kStarted;
  uint64_t seq = 0;  // of the collective; 0 for messages
  Call call;
  const Site* site = nullptr;
  int64_t start_ns = 0;  // CLOCK_MONOTONIC
  int64_t end_ns = 0;    // 0: not ended
};

class Flight {
 public:
  static constexpr uint64_t kNumRecords = 2048;

  static Flight& of_process();

  // The number of the record, for end(); 0 while recording is off.
  uint64_t begin(const FlightRecord& record);
  // Does nothing when the record has been overwritten, or has ended already.
  void end(uint64_t number, FlightState state);
  // The records that are left, oldest first.
  void each(const std::function<void(const FlightRecord&)>& visit) const;
  // Only for measuring what it costs.
  void set_recording(bool on) { recording_.store(on, std::memory_order_relaxed); }

 private:
  static constexpr size_t kNumWords = (sizeof(FlightRecord) + 7) / 8;
  struct Place {
    std::atomic<uint64_t> number;  // 0 while it is being written
    std::atomic<uint64_t> words[kNumWords];
    std::atomic<uint32_t> state;
    std::atomic<int64_t> end_ns;
  };

  std::atomic<uint64_t> num_begun_{0};
  std::atomic<bool> recording_{true};
  Place places_[kNumRecords] = {};
};

// --- dumps
// All that is known in this process, as JSON.
std::string flight_json(const std::string& reason);
// Writes flight_json() to FOLDER/flight_rank_R_pid_P.json, whole or not at all; returns the path.
// Throws TransportError when it cannot.
std::string dump_flight(const std::string& folder, const std::string& reason);
// From now on this process dumps into PRIMITIVES_FLIGHT_DIR, if it is set, on SIGUSR1 and on
// dump_flight_on_error(). A handler of the program for SIGUSR1 is still called.
void watch_flight();
void dump_flight_on_error(const std::string& reason);

}  // namespace primitives
