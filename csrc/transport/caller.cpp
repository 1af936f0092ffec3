#include "transport/caller.hpp"

namespace primitives {
namespace {

CallerHooks installed;  // written once, at import
thread_local const Site* site_of_another = nullptr;

}  // namespace

std::string at_site(const std::string& site) { return site.empty() ? "" : " at " + site; }

void install_caller_hooks(const CallerHooks& hooks) { installed = hooks; }

const Site* this_site() {
  if (site_of_another != nullptr) return site_of_another;
  return installed.find_site == nullptr ? nullptr : installed.find_site();
}

void check_signals() {
  if (installed.check_signals != nullptr) installed.check_signals();
}

SiteScope::SiteScope(const Site* site) : outer_(site_of_another) { site_of_another = site; }

SiteScope::~SiteScope() { site_of_another = outer_; }

}  // namespace primitives
