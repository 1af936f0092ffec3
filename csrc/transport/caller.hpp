// The program that calls: where in its source a call was made, and whether a signal waits for it.
// The transport knows no Python; the bindings install how to ask.
#pragma once

#include <cstddef>
#include <string>

namespace primitives {

constexpr size_t kSiteNbytes = 160;

// "train.py:12 in step"; lives as long as the process.
struct Site {
  char text[kSiteNbytes];
};

// " at train.py:12 in step", or nothing when the site is unknown.
std::string at_site(const std::string& site);

struct CallerHooks {
  // The site of the running thread, null when it has none; cheap, and takes no lock.
  const Site* (*find_site)() = nullptr;
  // Throws when a signal handler of the program wants the running call to end.
  void (*check_signals)() = nullptr;
};
void install_caller_hooks(const CallerHooks& hooks);

// Whom errors and the flight recorder name for the calls that this thread makes now.
const Site* this_site();
void check_signals();

// While it lives, this thread works for a call that was made at `site`, on another thread.
class SiteScope {
 public:
  explicit SiteScope(const Site* site);
  ~SiteScope();
  SiteScope(const SiteScope&) = delete;
  SiteScope& operator=(const SiteScope&) = delete;

 private:
  const Site* outer_;
};

}  // namespace primitives
