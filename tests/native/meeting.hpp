// A folder of files as the place where ranks meet: for threads and for processes alike.
#pragma once

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>

#include "transport/group.hpp"

namespace primitives::native_tests {

class FolderMeeting : public Meeting {
 public:
  explicit FolderMeeting(std::string folder) : folder_(std::move(folder)) {
    std::filesystem::create_directories(folder_);
  }

  void set(const std::string& key, const std::string& value) override {
    const std::string path = path_of(key);
    const std::string written = path + "." + std::to_string(gettid());
    std::ofstream(written) << value;
    std::filesystem::rename(written, path);  // readers see all of it or nothing
  }
  std::string get(const std::string& key) override {
    std::ifstream file(path_of(key));
    return {std::istreambuf_iterator<char>(file), {}};
  }
  bool has(const std::string& key) override { return std::filesystem::exists(path_of(key)); }
  int64_t add(const std::string& key, int64_t value) override {
    const std::string lock_path = path_of(key) + ".lock";
    const int lock = ::open(lock_path.c_str(), O_CREAT | O_RDWR | O_CLOEXEC, 0600);
    flock(lock, LOCK_EX);
    const int64_t sum = (has(key) ? std::stoll(get(key)) : 0) + value;
    set(key, std::to_string(sum));
    ::close(lock);
    return sum;
  }

 private:
  std::string path_of(std::string key) const {
    for (char& c : key) c = c == '/' ? '_' : c;
    return folder_ + "/" + key;
  }

  const std::string folder_;
};

}  // namespace primitives::native_tests
