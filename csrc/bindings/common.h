// What every binding needs: tensors of torch's stable ABI to raw pointers, the current stream, the device, errors.
//
// The same binding is compiled into each library that it names: bindings/x.cpp into all, x_cpu.cpp into `cpu`,
// x_cuda.cpp into `cuda` and, on CPU tensors, `emu`. Schemas are defined in Python (dataflex.ops._ext.define), a
// binding only implements:
//   DATAFLEX_OPS(m) { m.impl("name", TORCH_BOX(&function)); }
// Python has validated the arguments; the checks here guard memory against a direct call of torch.ops.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <tuple>
#include <vector>

#if defined(DATAFLEX_CUDA)
// Absent from a libtorch without CUDA, where this library still has to load.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);
#define DATAFLEX_OPS(m) STABLE_TORCH_LIBRARY_IMPL(dataflex, CUDA, m)
#elif defined(DATAFLEX_EMU)
#include "cuda_emu.h"
#define DATAFLEX_OPS(m) STABLE_TORCH_LIBRARY_IMPL(dataflex_emu, CPU, m)
#else
#define DATAFLEX_OPS(m) STABLE_TORCH_LIBRARY_IMPL(dataflex, CPU, m)
#endif

namespace dataflex {
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The data of a contiguous tensor of the dtype of T; throws for another dtype or layout.
template <typename T>
inline const T* input(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_contiguous(), name, ": expected a contiguous tensor");
  return tensor.const_data_ptr<T>();
}
template <typename T>
inline T* output(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_contiguous(), name, ": expected a contiguous tensor");
  return tensor.mutable_data_ptr<T>();
}
// The same, or null for None.
template <typename T>
inline const T* input(const std::optional<Tensor>& tensor, const char* name) {
  return tensor.has_value() ? input<T>(*tensor, name) : nullptr;
}
template <typename T>
inline T* output(const std::optional<Tensor>& tensor, const char* name) {
  return tensor.has_value() ? output<T>(*tensor, name) : nullptr;
}

// 0, 1, 2 for float32, bfloat16, float16 (DataflexDtype of kernels/api.h); throws for another.
inline int dtype_code(const Tensor& tensor, const char* name) {
  const ScalarType dtype = tensor.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, name,
                  ": expected float32, bfloat16 or float16");
  return dtype == ScalarType::Float ? 0 : dtype == ScalarType::BFloat16 ? 1 : 2;
}

#if defined(DATAFLEX_CUDA)
// Makes the tensor's device current and holds its current stream.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch has no CUDA");
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream_));
  }
  void* stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};
inline void check_launch(int code, const char* op) { STD_TORCH_CHECK(code == 0, op, ": CUDA error ", code); }
#elif defined(DATAFLEX_EMU)
class OnDevice {
 public:
  explicit OnDevice(const Tensor&) { emu::devices_set++; }
  ~OnDevice() { emu::devices_set--; }
  void* stream() const { return nullptr; }
};
inline void check_launch(int code, const char* op) { STD_TORCH_CHECK(code == 0, op, ": ", emu::last_error()); }
#endif
}  // namespace dataflex
