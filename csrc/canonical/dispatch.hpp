// From a run-time Dtype to the storage type the kernels are compiled for.
#pragma once

#include "canonical/kernels.hpp"
#include "canonical/simd.hpp"

namespace primitives::canonical {
namespace {

// Calls body(Float32{}), body(Float16{}) or body(BFloat16{}).
template <class Body>
CANONICAL_FN void with_dtype(Dtype dtype, Body body) {
  switch (dtype) {
    case Dtype::kFloat32:
      return body(Float32{});
    case Dtype::kFloat16:
      return body(Float16{});
    case Dtype::kBFloat16:
      return body(BFloat16{});
  }
}

template <class T>
CANONICAL_FN const typename T::Storage* as(Input x) {
  return static_cast<const typename T::Storage*>(x.data);
}

template <class T>
CANONICAL_FN typename T::Storage* as(Output x) {
  return static_cast<typename T::Storage*>(x.data);
}

}  // namespace
}  // namespace primitives::canonical
