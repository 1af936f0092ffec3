// Python call sites, for errors and the flight recorder.
//
// [Note: call sites] A site is the innermost Python frame outside torch, primitives and contextlib.
// c10d calls us without the GIL, and taking it for every call could cost a switch interval; so the
// running thread reads its own frames, which stay as they are while it is in here, and looks each
// (code, instruction) up in a table. Only the first call of a place takes the GIL, to learn its
// file, line and function. The table holds its code objects alive, so an address never changes
// meaning; it is bounded, and when it is full new places have no site.
#include <torch/csrc/dynamo/cpython_includes.h>
#include <torch/csrc/utils/pybind.h>
#include <unistd.h>

#include <atomic>
#include <mutex>
#include <string>
#include <vector>

#include "bindings/bindings.hpp"
#include "transport/caller.hpp"
#include "transport/flight.hpp"

namespace primitives {
namespace {

using Frame = _PyInterpreterFrame;

struct Place {
  PyCodeObject* code;
  const void* instruction;
  bool is_library;
  Site site;
};

constexpr size_t kNumPlaces = 8192;
std::atomic<const Place*> places[kNumPlaces];
std::atomic<size_t> num_places{0};
std::vector<std::string>* libraries = nullptr;  // file name prefixes; written once, at import

size_t hash_of(const void* code, const void* instruction) {
  const auto mixed = reinterpret_cast<uintptr_t>(code) ^ reinterpret_cast<uintptr_t>(instruction);
  return (mixed * 0x9E3779B97F4A7C15ull) >> 40;
}

const Place* find_place(const PyCodeObject* code, const void* instruction) {
  for (size_t i = hash_of(code, instruction);; i++) {
    const Place* place = places[i % kNumPlaces].load(std::memory_order_acquire);
    if (place == nullptr || (place->code == code && place->instruction == instruction)) {
      return place;
    }
  }
}

std::string utf8(PyObject* text) {
  const char* chars = text == nullptr ? nullptr : PyUnicode_AsUTF8(text);
  if (chars != nullptr) return chars;
  PyErr_Clear();
  return "?";
}

// Takes the GIL. Null when the table is full.
const Place* add_place(PyCodeObject* code, const void* instruction) {
  if (Py_IsInitialized() == 0) return nullptr;
  const pybind11::gil_scoped_acquire gil;
  if (const Place* place = find_place(code, instruction)) return place;  // by another thread
  if (num_places.load() >= kNumPlaces / 2) return nullptr;
  const pybind11::error_scope keep_pending_error;
  auto* place = new Place{code, instruction, false, {}};
  Py_INCREF(code);
  const std::string file = utf8(code->co_filename);
  for (const std::string& library : *libraries) {
    place->is_library = place->is_library || file.compare(0, library.size(), library) == 0;
  }
  const auto* first = reinterpret_cast<const char*>(_PyCode_CODE(code));
  const int line =
      PyCode_Addr2Line(code, static_cast<int>(static_cast<const char*>(instruction) - first));
  std::string text = ":" + std::to_string(line) + " in " + utf8(code->co_name);
  if (text.size() > kSiteNbytes / 2) text.resize(kSiteNbytes / 2);
  const size_t room = kSiteNbytes - 1 - text.size();
  text = (file.size() > room ? "..." + file.substr(file.size() - room + 3) : file) + text;
  text.copy(place->site.text, kSiteNbytes - 1);
  for (size_t i = hash_of(code, instruction);; i++) {
    const Place* empty = nullptr;
    if (places[i % kNumPlaces].compare_exchange_strong(empty, place)) break;
  }
  num_places++;
  return place;
}

const Frame* innermost_frame() {
  const PyThreadState* thread = PyGILState_GetThisThreadState();
  if (thread == nullptr) return nullptr;
#if PY_VERSION_HEX >= 0x030D0000
  return thread->current_frame;
#else
  return thread->cframe == nullptr ? nullptr : thread->cframe->current_frame;
#endif
}

const Site* find_site() {
  const Place* library = nullptr;
  for (const Frame* frame = innermost_frame(); frame != nullptr; frame = frame->previous) {
#if PY_VERSION_HEX >= 0x030C0000
    if (frame->owner == FRAME_OWNED_BY_CSTACK) continue;  // between two runs of the interpreter
#endif
    PyCodeObject* code = F_CODE(frame);
    const Place* place = find_place(code, PREV_INSTR(frame));
    if (place == nullptr) place = add_place(code, PREV_INSTR(frame));
    if (place == nullptr) return nullptr;
    if (!place->is_library) return &place->site;
    if (library == nullptr) library = place;
  }
  return library == nullptr ? nullptr : &library->site;
}

// Python runs its signal handlers on the main thread only, and only when asked.
void check_python_signals() {
  if (gettid() != getpid() || Py_IsInitialized() == 0) return;
  const pybind11::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() != 0) throw pybind11::error_already_set();
}

std::string folder_of(const char* package) {
  const std::string file = pybind11::module_::import(package).attr("__file__").cast<std::string>();
  return file.substr(0, file.rfind('/') + 1);
}

}  // namespace

void bind_call_sites(py::module_& m) {
  libraries = new std::vector<std::string>{
      folder_of("torch"), folder_of("primitives"),
      py::module_::import("contextlib").attr("__file__").cast<std::string>()};
  install_caller_hooks({find_site, check_python_signals});
  m.def(
      "set_recording",
      [](bool on) {
        install_caller_hooks({on ? find_site : nullptr, check_python_signals});
        Flight::of_process().set_recording(on);
      },
      py::arg("on"), "Call sites and flight recorder; off only for measuring what they cost.");
  m.def(
      "call_site",
      [] {
        const Site* site = this_site();
        return std::string(site == nullptr ? "" : site->text);
      },
      "The call site that errors would name for a collective called here.");
}

}  // namespace primitives
