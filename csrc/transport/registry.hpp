// The groups of this process, for what concerns all of them: dumps, and where a process stands.
#pragma once

#include <functional>
#include <string>

namespace primitives {

class Group;

void register_group(Group& group);
void unregister_group(Group& group);
// Under a lock: `visit` must neither wait nor make or end a group.
void for_each_group(const std::function<void(Group&)>& visit);

// While it lives, this rank tells the ranks of its groups what it has been waiting for: a rank that
// is missing in one group may be blocked in another. `in_own_group`: also those of `group` itself,
// who see its collectives anyway.
class Waiting {
 public:
  Waiting(Group& group, const std::string& what, bool in_own_group);
  ~Waiting();
  Waiting(const Waiting&) = delete;
  Waiting& operator=(const Waiting&) = delete;

 private:
  void tell(Group& group, const char* what, bool in_own_group) const;

  Group& group_;
  const bool in_own_group_;
};

}  // namespace primitives
