#include "transport/registry.hpp"

#include <cstdio>
#include <exception>
#include <mutex>
#include <set>

#include "transport/group.hpp"

namespace primitives {
namespace {

struct Registry {
  std::mutex mutex;
  std::set<Group*> groups;
};

Registry& registry() {
  static auto* all = new Registry;  // outlives every group
  return *all;
}

}  // namespace

void register_group(Group& group) {
  Registry& all = registry();
  std::lock_guard<std::mutex> lock(all.mutex);
  all.groups.insert(&group);
}

void unregister_group(Group& group) {
  Registry& all = registry();
  std::lock_guard<std::mutex> lock(all.mutex);
  all.groups.erase(&group);
}

void for_each_group(const std::function<void(Group&)>& visit) {
  Registry& all = registry();
  std::lock_guard<std::mutex> lock(all.mutex);
  for (Group* group : all.groups) visit(*group);
}

Waiting::Waiting(Group& group, const std::string& what, bool in_own_group)
    : group_(group), in_own_group_(in_own_group) {
  for_each_group([&](Group& other) { tell(other, what.c_str(), in_own_group); });
}

Waiting::~Waiting() {
  if (std::uncaught_exceptions() > 0) return;  // the wait failed: others still ask where it was
  for_each_group([&](Group& other) { tell(other, "", in_own_group_); });
}

void Waiting::tell(Group& group, const char* what, bool in_own_group) const {
  if (group.forked() || (&group == &group_ ? !in_own_group : group.shares_memory_with(group_))) {
    return;
  }
  auto& text = group.line(group.rank()).waiting;
  // What is there belongs to another wait of this process: the first one explains most.
  if (*what != '\0' && !text.empty()) return;
  text.write(what);
}

}  // namespace primitives
