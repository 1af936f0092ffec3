// Plays random collectives, messages and faults on ranks that are threads or processes, without
// Python and torch, so that the sanitizers see all code that runs.
//
//   driver [--ranks N] [--processes] [--device | --by-host] [--cases N] [--faults N] [--seed N]
//          [--break race|overflow|bits]
//
// --device plays the collectives of CUDA devices, on the runtime of tests/emulator/runtime.hpp;
// --by-host those whose devices cannot map each other.
// --break makes a mistake on purpose: a race for ThreadSanitizer, a read beyond a buffer for
// AddressSanitizer, a flipped bit for the comparison; each must make the run fail.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <string>
#include <thread>
#include <vector>

#include "cases.hpp"
#include "collectives/cuda/device_transport.hpp"
#include "device_faults.hpp"
#include "device_heap.hpp"
#include "device_sharing.hpp"
#include "emulator/runtime.hpp"
#include "faults.hpp"
#include "meeting.hpp"
#include "staging_pace.hpp"
#include "values.hpp"

namespace primitives::native_tests {
namespace {

constexpr int kCasesPerGroup = 100;

struct Plan {
  int num_ranks = 4;
  bool processes = false;
  bool device = false;
  bool by_host = false;  // a device
  int num_cases = 1000;
  int num_faults = kNumFaults;
  uint64_t seed = 1;
  std::string mistake;
  std::string folder;
};

Plan parse(int argc, char** argv) {
  Plan plan;
  for (int i = 1; i < argc; i++) {
    const std::string flag = argv[i];
    if (flag == "--processes") {
      plan.processes = true;
      continue;
    }
    if (flag == "--device" || flag == "--by-host") {
      plan.device = true;
      plan.by_host = flag == "--by-host";
      continue;
    }
    if (i + 1 == argc) throw std::invalid_argument("driver: " + flag + " needs a value");
    const std::string text = argv[++i];
    if (flag == "--ranks") {
      plan.num_ranks = std::stoi(text);
    } else if (flag == "--cases") {
      plan.num_cases = std::stoi(text);
    } else if (flag == "--faults") {
      plan.num_faults = std::stoi(text);
    } else if (flag == "--seed") {
      plan.seed = std::stoull(text);
    } else if (flag == "--break") {
      plan.mistake = text;
    } else {
      throw std::invalid_argument("driver: unknown flag " + flag);
    }
  }
  return plan;
}

void make_mistake(const std::string& mistake, Group& group) {
  std::vector<float> data(16, 1.0f);
  if (mistake == "race") {
    group.slot(0, group.epoch() + 1)[0] = static_cast<char>(group.rank());
  } else if (mistake == "overflow") {
    Call call;
    call.op = Op::kBroadcast;
    call.root = 0;
    const size_t nbytes = data.size() * sizeof(float) + 1;
    broadcast(group, call, data.data(), nbytes, Milliseconds(10000));
  } else if (mistake == "bits") {
    const std::vector<float> want = data;
    data[3] = 1.0000001f;
    expect_bits(data.data(), want, "a flipped bit");
  } else {
    throw std::invalid_argument("driver: unknown mistake " + mistake);
  }
}

// One rank, from the first group to the last.
void play_rank(const Plan& plan, int rank) {
  auto options = [&](int round) {
    return GroupOptions{rank, plan.num_ranks, "round " + std::to_string(round), "/dev/shm",
                        Milliseconds(60000)};
  };
  int round = 0;
  auto next_folder = [&] { return plan.folder + "/" + std::to_string(++round); };
  std::mt19937_64 random(plan.seed);
  std::mt19937 own_random(static_cast<unsigned>(plan.seed * 100 + rank));
  const auto play_cases = [&](Player player, int* num_played) {
    try {
      if (!plan.mistake.empty()) make_mistake(plan.mistake, player.transport.group());
      for (int i = 0; i < kCasesPerGroup && *num_played < plan.num_cases; i++, ++*num_played) {
        if (own_random() % 16 == 0) usleep(own_random() % 300);  // another order of arrival
        play_case(player);
      }
    } catch (const std::exception& error) {
      player.transport.group().abort(error.what());
      throw;
    }
    random = player.random;
  };
  uint64_t num_zero_copy = 0;
  for (int num_played = 0; num_played < plan.num_cases;) {
    FolderMeeting meeting(next_folder());
    OneHost host(meeting, options(round));
    if (plan.device) {
      emulator::Stream streams[2];  // used in turn: the calls must follow each other all the same
      int num_calls = 0;
      const auto current = [&] { return &streams[num_calls++ % 2]; };
      std::unique_ptr<StreamTransport> device;
      if (plan.by_host) {
        device = std::make_unique<ByHostTransport>(host, rank, plan.num_ranks, 0, current);
      } else {
        device = std::make_unique<DeviceTransport>(host, 0, current, Milliseconds(60000));
      }
      const auto settle = [&] {
        device->drain();
        device->check();
      };
      const auto allocate = [&](size_t nbytes) { return device->allocate(nbytes); };
      play_cases({*device, settle, false, allocate, random}, &num_played);
      device->drain();
      num_zero_copy += device->num_zero_copy();
      host.close();
    } else {
      play_cases({host, [] {}, true, nullptr, random}, &num_played);
      host.close();
    }
  }
  if (plan.device && !plan.by_host && plan.num_cases >= kCasesPerGroup && num_zero_copy == 0) {
    throw WrongResult("no call read symmetric memory in place");
  }
  for (int i = 0; i < plan.num_faults && plan.num_ranks > 1; i++) {
    FolderMeeting meeting(next_folder());
    if (plan.device) {
      const int num_kinds = plan.processes ? kNumDeviceFaults : kNumDeviceFaultsOfThreads;
      play_device_fault(i % num_kinds, i % plan.num_ranks, meeting, options(round));
    } else {
      play_fault(i % kNumFaults, i % plan.num_ranks, meeting, options(round));
    }
  }
}

bool passes(const Plan& plan, int rank) {
  try {
    play_rank(plan, rank);
    return true;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "rank %d: %s\n", rank, error.what());
    return false;
  }
}

bool play_threads(const Plan& plan) {
  std::atomic<bool> ok{true};
  std::vector<std::thread> ranks;
  for (int r = 0; r < plan.num_ranks; r++) {
    ranks.emplace_back([&, r] {
      if (!passes(plan, r)) ok = false;
    });
  }
  for (std::thread& rank : ranks) rank.join();
  return ok;
}

bool play_processes(const Plan& plan) {
  std::vector<pid_t> ranks;
  for (int r = 0; r < plan.num_ranks; r++) {
    const pid_t pid = fork();
    if (pid == 0) std::exit(passes(plan, r) ? 0 : 1);
    ranks.push_back(pid);
  }
  bool ok = true;
  for (const pid_t pid : ranks) {
    int status = 0;
    ok = waitpid(pid, &status, 0) == pid && WIFEXITED(status) && WEXITSTATUS(status) == 0 && ok;
  }
  return ok;
}

struct TemporaryFolder {
  TemporaryFolder() {
    if (mkdtemp(path) == nullptr) throw std::runtime_error("driver: no temporary folder");
  }
  ~TemporaryFolder() { std::filesystem::remove_all(path); }
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;

  char path[32] = "/tmp/primitives-driver-XXXXXX";
};

int run(int argc, char** argv) {
  Plan plan = parse(argc, argv);
  check_staging_pace();
  const char* const memory = std::getenv("PRIMITIVES_CUDA_MEMORY");
  if (!check_device_sharing() && memory != nullptr && std::strcmp(memory, "virtual") == 0) {
    std::printf("not played: this system refuses descriptors of other processes\n");
    return 0;
  }
  const TemporaryFolder folder;
  plan.folder = folder.path;
  check_device_heap(plan.folder + "/heap");
  const auto start = Clock::now();
  const bool ok = plan.processes ? play_processes(plan) : play_threads(plan);
  const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
  std::printf("%s: %d %s, %d cases, %d faults, seed %llu, %.1f s\n", ok ? "ok" : "FAILED",
              plan.num_ranks, plan.processes ? "processes" : "threads", plan.num_cases,
              plan.num_faults, static_cast<unsigned long long>(plan.seed), seconds);
  return ok ? 0 : 1;
}

}  // namespace
}  // namespace primitives::native_tests

int main(int argc, char** argv) {
  try {
    return primitives::native_tests::run(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 2;
  }
}
