// A tensor of the device seen as one of the CPU, and back: the same memory, nothing is copied.
#pragma once
#include <c10/core/CPUAllocator.h>

#include "device.h"

namespace sim {

class Bridge {
 public:
  // Storages are lent once a call, so that arguments that share memory share it on the other side as well.
  at::Tensor host(const at::Tensor& tensor) {
    if (!is_ours(tensor)) return tensor;
    const auto& storage = tensor.storage();
    auto known = lent_.find(storage.unsafeGetStorageImpl());
    if (known == lent_.end()) {
      auto owner = new c10::Storage(storage);
      at::DataPtr memory(storage.mutable_data(), owner, [](void* o) { delete static_cast<c10::Storage*>(o); }, at::kCPU);
      c10::Storage seen(c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(memory), c10::GetCPUAllocator(), true);
      origin_.emplace(seen.unsafeGetStorageImpl(), tensor);
      known = lent_.emplace(storage.unsafeGetStorageImpl(), seen).first;
    }
    auto view = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(known->second),
                                                         c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.dtype());
    shape(view, tensor);
    whole_.emplace(view.unsafeGetTensorImpl(), tensor);
    return view;
  }

  at::Tensor back(const at::Tensor& tensor, c10::Device to) {
    if (!tensor.defined() || is_ours(tensor)) return tensor;
    if (auto known = whole_.find(tensor.unsafeGetTensorImpl()); known != whole_.end()) return known->second;
    const auto& storage = tensor.storage();
    auto source = origin_.find(storage.unsafeGetStorageImpl());
    if (source != origin_.end() && source->second.storage().data() == storage.data()) {  // a view of an argument
      const auto& base = source->second;
      auto view = at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(base.storage()),
                                                           base.key_set(), tensor.dtype());
      shape(view, tensor);
      return view;
    }
    take(storage.nbytes());
    auto owner = new c10::Storage(storage);
    at::DataPtr memory(storage.mutable_data(), owner, [](void* o) {
      std::unique_ptr<c10::Storage> own(static_cast<c10::Storage*>(o));
      used -= static_cast<int64_t>(own->nbytes());
    }, to);
    c10::Storage own(c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(memory), &allocator, true);
    auto result = at::detail::make_tensor<c10::TensorImpl>(std::move(own), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                                           tensor.dtype());
    shape(result, tensor);
    return result;
  }

 private:
  static void shape(at::Tensor& tensor, const at::Tensor& like) {
    tensor.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
    if (tensor.is_conj() != like.is_conj()) tensor._set_conj(like.is_conj());
    if (tensor.is_neg() != like.is_neg()) tensor._set_neg(like.is_neg());
  }
  std::unordered_map<c10::StorageImpl*, c10::Storage> lent_;      // ours -> the CPU's
  std::unordered_map<c10::StorageImpl*, at::Tensor> origin_;      // the CPU's -> a tensor of ours
  std::unordered_map<c10::TensorImpl*, at::Tensor> whole_;        // what was lent, as a whole
};

}  // namespace sim
