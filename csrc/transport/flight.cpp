#include "transport/flight.hpp"

#include <chrono>
#include <cstring>

namespace primitives {

Flight& Flight::of_process() {
  static auto* flight = new Flight;  // outlives every thread
  return *flight;
}

uint64_t Flight::begin(const FlightRecord& record) {
  if (!recording_.load(std::memory_order_relaxed)) return 0;
  const uint64_t number = num_begun_.fetch_add(1, std::memory_order_relaxed) + 1;
  Place& place = places_[number % kNumRecords];
  uint64_t words[kNumWords];
  std::memcpy(words, &record, sizeof record);
  place.number.store(0, std::memory_order_relaxed);
  std::atomic_thread_fence(std::memory_order_release);
  for (size_t i = 0; i < kNumWords; i++) place.words[i].store(words[i], std::memory_order_relaxed);
  place.state.store(static_cast<uint32_t>(record.state), std::memory_order_relaxed);
  place.end_ns.store(0, std::memory_order_relaxed);
  place.number.store(number, std::memory_order_release);
  // The ring is larger than the nearest caches: fetch the next place while nobody waits for it.
  const char* next = reinterpret_cast<const char*>(&places_[(number + 1) % kNumRecords]);
  for (size_t at = 0; at < sizeof(Place) + 64; at += 64) __builtin_prefetch(next + at, 1);
  return number;
}

void Flight::end(uint64_t number, FlightState state) {
  Place& place = places_[number % kNumRecords];
  if (number == 0 || place.number.load(std::memory_order_relaxed) != number) return;
  if (place.end_ns.load(std::memory_order_relaxed) != 0) return;
  place.state.store(static_cast<uint32_t>(state), std::memory_order_relaxed);
  place.end_ns.store(std::chrono::steady_clock::now().time_since_epoch().count(),
                     std::memory_order_relaxed);
}

void Flight::each(const std::function<void(const FlightRecord&)>& visit) const {
  const uint64_t last = num_begun_.load(std::memory_order_acquire);
  for (uint64_t number = last < kNumRecords ? 1 : last - kNumRecords + 1; number <= last;
       number++) {
    const Place& place = places_[number % kNumRecords];
    if (place.number.load(std::memory_order_acquire) != number) continue;
    uint64_t words[kNumWords];
    for (size_t i = 0; i < kNumWords; i++)
      words[i] = place.words[i].load(std::memory_order_relaxed);
    FlightRecord record;
    std::memcpy(static_cast<void*>(&record), words, sizeof record);
    record.state = static_cast<FlightState>(place.state.load(std::memory_order_relaxed));
    record.end_ns = place.end_ns.load(std::memory_order_relaxed);
    std::atomic_thread_fence(std::memory_order_acquire);
    if (place.number.load(std::memory_order_relaxed) == number) visit(record);
  }
}

}  // namespace primitives
