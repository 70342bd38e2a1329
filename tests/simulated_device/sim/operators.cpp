// What runs on the device: a fallback for every operator, and the few kernels that need their own.
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/library.h>

#include "bridge.h"

namespace sim {

REGISTER_ALLOCATOR(TYPE, &allocator);
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

namespace {

using Names = std::set<std::string>;

// Their results have to be known to the host: sizes, checks, values.
const Names WAITING = {"aten::nonzero", "aten::nonzero.out", "aten::masked_select", "aten::masked_select.out",
                       "aten::equal", "aten::is_nonzero", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive",
                       "aten::bincount", "aten::repeat_interleave.Tensor", "aten::_linalg_check_errors",
                       "aten::_linalg_eigh", "aten::_linalg_eigh.eigenvalues"};
// CUDA takes the indices of these from the host as well.
const Names INDEXING = {"aten::index.Tensor", "aten::index.Tensor_out", "aten::_unsafe_index.Tensor", "aten::index_put_",
                        "aten::_index_put_impl_", "aten::index_put", "aten::_unsafe_index_put"};
const Names PRODUCTS = {"aten::mm", "aten::mm.out", "aten::bmm", "aten::bmm.out", "aten::addmm", "aten::addmm.out",
                        "aten::baddbmm", "aten::baddbmm.out"};
// CUDA has no deterministic kernel for these.
const Names UNORDERED = {"aten::cumsum", "aten::cumsum.out", "aten::histc", "aten::median.dim_values", "aten::put_",
                         "aten::_adaptive_avg_pool2d_backward", "aten::adaptive_max_pool2d_backward.grad_input",
                         "aten::nll_loss2d_forward"};

[[noreturn]] void refuse_mixture(const std::string& name, c10::Device a, c10::Device b) {
  TORCH_CHECK(false, "Expected all tensors to be on the same device, but found at least two devices, ", a, " and ", b, "! (",
              name, ")");
}

void check_dtype(c10::ScalarType dtype) {
  const bool wide = dtype == at::kDouble || dtype == at::kComplexDouble;
  TORCH_CHECK_TYPE(!(on.refuse_float64 && wide), "The sim device has no float64. Use float32 instead.");
}

// To the ten bits of TF32, half away from zero.
at::Tensor tf32(const at::Tensor& x, bool rounds) {
  if (!rounds || !x.defined() || x.scalar_type() != at::kFloat) return x;
  return x.contiguous().view(at::kInt).add(0x1000).bitwise_and(~0x1FFF).view(at::kFloat).view(x.sizes());
}
bool rounds_products() { return on.tensor_cores && at::globalContext().allowTF32CuBLAS(); }
bool rounds_convolutions() { return on.tensor_cores && at::globalContext().allowTF32CuDNN(); }

const at::Tensor& resize(const at::Tensor& self, c10::SymIntArrayRef size, std::optional<at::MemoryFormat> format) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(C10_AS_INTARRAYREF_SLOW(size));
  if (format) impl->empty_tensor_restride(*format);
  const size_t bytes = (self.numel() + self.storage_offset()) * self.itemsize();
  if (self.numel() > 0 && self.storage().nbytes() < bytes) at::detail::getPrivateUse1Hooks().resizePrivateUse1Bytes(self.storage(), bytes);
  return self;
}

// What a call is given: devices, generator, and whether they go together.
struct Given {
  std::string name;
  std::optional<c10::Device> where, asked, on_host;
  std::optional<at::Generator> generator;

  void look(const at::Tensor& tensor, bool index = false) {
    if (is_ours(tensor)) {
      if (where && *where != tensor.device()) refuse_mixture(name, *where, tensor.device());
      where = tensor.device();
    } else if (tensor.defined() && tensor.dim() > 0 && !(index && INDEXING.count(name))) {
      on_host = tensor.device();
    }
  }
  void look(const c10::IValue& value) {
    if (value.isTensor()) {
      look(value.toTensor());
    } else if (value.isTensorList()) {
      for (const auto& tensor : value.toTensorVector()) look(tensor);
    } else if (value.isOptionalTensorList()) {
      for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorVector()) if (tensor) look(*tensor, true);
    } else if (value.isDevice()) {
      asked = value.toDevice();
    } else if (value.isGenerator()) {
      generator = value.toGenerator();
    }
  }
  c10::Device settled() {
    if (where && on_host) refuse_mixture(name, *where, *on_host);
    const bool foreign = generator && generator->defined() && generator->device().type() != TYPE;
    TORCH_CHECK(!foreign, "Expected a 'sim' device type for generator but found '", generator->device().type(), "'");
    auto found = where ? *where : asked && asked->type() == TYPE ? *asked : device(-1);
    return device(found.index());
  }
};

// Run an operator of the CPU with the state of a generator of ours.
void with_random_state(const at::Generator& source, const std::function<void()>& run) {
  auto cpu = at::detail::getDefaultCPUGenerator();
  auto before = cpu.get_state();
  cpu.set_state(source.get_state());
  try {
    run();
  } catch (...) {
    cpu.set_state(before);
    throw;
  }
  auto after = cpu.get_state();
  at::Generator(source).set_state(after);
  cpu.set_state(before);
}

struct Quiet final : c10::WarningHandler {
  void process(const c10::Warning&) override {}
};

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  Given given;
  given.name = schema.overload_name().empty() ? schema.name() : schema.name() + "." + schema.overload_name();
  count(operators, given.name);
  if (WAITING.count(given.name)) wait(given.name);
  const size_t size = schema.arguments().size();
  for (const auto& value : torch::jit::last(stack, size)) given.look(value);
  const auto where = given.settled();
  if (UNORDERED.count(given.name) && at::isFloatingType(torch::jit::peek(stack, 0, size).toTensor().scalar_type())) {
    at::globalContext().alertNotDeterministic(given.name);
  }

  Bridge bridge;
  std::vector<std::pair<at::Tensor, at::Tensor>> written;
  const bool low = PRODUCTS.count(given.name) && rounds_products();
  at::AutoDispatchBelowADInplaceOrView below;
  auto values = torch::jit::pop(*stack, size);
  for (size_t i = 0; i < size; ++i) {
    auto& value = values[i];
    const auto* alias = schema.arguments()[i].alias_info();
    const bool writes = alias != nullptr && alias->isWrite();
    auto lend = [&](const at::Tensor& tensor) {
      auto seen = bridge.host(tensor);
      if (writes && is_ours(tensor)) written.emplace_back(tensor, seen);
      return writes ? seen : tf32(seen, low);
    };
    if (value.isTensor()) {
      value = lend(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> seen;
      for (const auto& tensor : value.toTensorVector()) seen.push_back(lend(tensor));
      value = seen;
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> seen;
      for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorVector()) {
        seen.push_back(tensor ? std::optional<at::Tensor>(lend(*tensor)) : std::nullopt);
      }
      value = seen;
    } else if (value.isDevice()) {
      value = c10::Device(at::kCPU);
    } else if (value.isGenerator()) {
      value = c10::IValue();
    }
  }
  stack->insert(stack->end(), values.begin(), values.end());

  static Quiet quiet;  // an `out` is resized twice, once for each device, and the first is warned of
  c10::WarningUtils::WarningHandlerGuard guard(&quiet);
  auto run = [&] { op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack); };
  if (op.hasTag(at::Tag::nondeterministic_seeded) || given.generator) {
    const bool own = given.generator && given.generator->defined();
    with_random_state(own ? *given.generator : own_generator(where.index()), run);
  } else {
    run();
  }

  for (auto& [ours, seen] : written) {
    if (seen.sizes() == ours.sizes() && seen.strides() == ours.strides() && seen.data_ptr() == ours.data_ptr()) continue;
    resize(ours, c10::fromIntArrayRefSlow(seen.sizes()), std::nullopt);
    if (seen.numel() > 0) Bridge().host(ours).copy_(seen);
  }
  auto home = [&](const at::Tensor& tensor) {
    if (tensor.defined()) check_dtype(tensor.scalar_type());
    return bridge.back(tensor, where);
  };
  auto results = torch::jit::pop(*stack, schema.returns().size());
  for (auto& value : results) {
    if (value.isTensor()) {
      value = home(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> all;
      for (const auto& tensor : value.toTensorVector()) all.push_back(home(tensor));
      value = all;
    }
  }
  stack->insert(stack->end(), results.begin(), results.end());
}

at::Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<at::Device> to, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  count(operators, "aten::empty");
  check_dtype(c10::dtype_or_default(dtype));
  const c10::DeviceGuard guard(to.value_or(device(-1)));
  return at::detail::empty_generic(size, &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device> to, std::optional<bool>) {
  count(operators, "aten::empty");
  check_dtype(c10::dtype_or_default(dtype));
  const c10::DeviceGuard guard(to.value_or(device(-1)));
  return at::detail::empty_strided_generic(size, stride, &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           c10::dtype_or_default(dtype));
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  count(operators, "aten::copy_");
  const bool leaves = is_ours(from) && !is_ours(to), arrives = is_ours(to) && !is_ours(from), any = from.numel() > 0;
  if (is_ours(to)) check_dtype(to.scalar_type());
  const auto& outside = leaves ? to : from;
  const bool free = non_blocking && (leaves || arrives) && PinnedAllocator::holds(outside.data_ptr());
  Bridge bridge;
  at::AutoDispatchBelowADInplaceOrView below;
  auto values = bridge.host(from);
  if (leaves && free && on.late_copies && any) {
    std::memset(to.data_ptr(), 0xFF, to.is_contiguous() ? to.nbytes() : to.itemsize());
    std::lock_guard<std::mutex> lock(mutex);
    late.push_back({to, values.clone()});
    return to;
  }
  if (leaves && any && !free) wait(non_blocking ? "copy to the host (not pinned)" : "copy to the host");
  if (arrives && any && !non_blocking) wait("copy to the device");
  bridge.host(to).copy_(values);
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Scalar item(const at::Tensor& self) {
  wait("item");
  Bridge bridge;
  at::AutoDispatchBelowADInplaceOrView below;
  return bridge.host(self).item();
}

at::Tensor& set_storage(at::Tensor& self, at::Storage source, c10::SymInt offset, c10::SymIntArrayRef size,
                        c10::SymIntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  auto sizes = C10_AS_INTARRAYREF_SLOW(size), strides = C10_AS_INTARRAYREF_SLOW(stride);
  if (strides.empty() && !sizes.empty()) {
    impl->set_sizes_contiguous(sizes);
    impl->set_storage_offset(offset.expect_int());
  } else {
    impl->set_sizes_and_strides(sizes, strides, offset.expect_int());
  }
  return self;
}

at::Tensor& set_whole(at::Tensor& self, at::Storage source) {
  const auto size = static_cast<int64_t>(source.nbytes() / self.itemsize());
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(source));
  self.unsafeGetTensorImpl()->set_sizes_and_strides(c10::IntArrayRef{size}, c10::IntArrayRef{1}, 0);
  return self;
}

at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(source.storage());
  self.unsafeGetTensorImpl()->set_sizes_and_strides(source.sizes(), source.strides(), source.storage_offset());
  return self;
}

c10::Device of_one(const char* name, std::initializer_list<const at::Tensor*> tensors) {
  Given given;
  given.name = name;
  for (const auto* tensor : tensors) given.look(*tensor);
  return given.settled();
}

at::Tensor convolution(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                       c10::SymIntArrayRef stride, c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation, bool transposed,
                       c10::SymIntArrayRef output_padding, c10::SymInt groups) {
  count(operators, "aten::convolution");
  const auto none = at::Tensor();
  const auto& given = bias ? *bias : none;
  const auto where = of_one("convolution", {&input, &weight, &given});
  const bool low = rounds_convolutions();
  Bridge bridge;
  at::AutoDispatchBelowADInplaceOrView below;
  auto seen = given.defined() ? std::optional<at::Tensor>(bridge.host(given)) : std::nullopt;
  return bridge.back(at::convolution_symint(tf32(bridge.host(input), low), tf32(bridge.host(weight), low), seen, stride,
                                            padding, dilation, transposed, output_padding, groups), where);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> convolution_backward(
    const at::Tensor& grad, const at::Tensor& input, const at::Tensor& weight, c10::SymIntArrayRef stride,
    c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation, bool transposed, c10::SymIntArrayRef output_padding,
    c10::SymInt groups, std::array<bool, 3> mask) {
  count(operators, "aten::convolution_backward");
  const auto where = of_one("convolution_backward", {&grad, &input, &weight});
  const bool low = rounds_convolutions();
  std::vector<c10::SymInt> bias = {transposed ? weight.sym_size(1) * groups : weight.sym_size(0)};
  Bridge bridge;
  at::AutoDispatchBelowADInplaceOrView below;
  auto [a, b, c] = at::convolution_backward_symint(
      tf32(bridge.host(grad), low), tf32(bridge.host(input), low), tf32(bridge.host(weight), low),
      mask[2] ? at::OptionalSymIntArrayRef(bias) : std::nullopt, stride, padding, dilation, transposed, output_padding,
      groups, mask);
  return {bridge.back(a, where), bridge.back(b, where), bridge.back(c, where)};
}

void record_stream(at::Tensor&, c10::Stream) {}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", item);
  m.impl("resize_", resize);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("set_.source_Storage", set_whole);
  m.impl("set_.source_Tensor", set_tensor);
  m.impl("convolution_overrideable", convolution);
  m.impl("convolution_backward_overrideable", convolution_backward);
  m.impl("record_stream", record_stream);
}

using namespace at::autocast;  // with CUDA's lists
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
#define LOW(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
#define WIDE(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
#define SUMS(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32_set_opt_dtype)
#define WIDEST(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, promote)
  AT_FORALL_LOWER_PRECISION_FP(LOW)
  AT_FORALL_FP32(WIDE)
  AT_FORALL_FP32_SET_OPT_DTYPE(SUMS)
  AT_FORALL_PROMOTE(WIDEST)
}

// `x.data = y` across devices, which PyTorch allows between the CPU and CUDA alone.
void set_data(const at::Tensor& self, const at::Tensor& data) {
  if (auto* meta = torch::autograd::impl::get_autograd_meta(self)) {
    std::lock_guard<std::mutex> lock(meta->mutex_);
    meta->grad_accumulator_.reset();
  }
  self.unsafeGetTensorImpl()->shallow_copy_from(data.getIntrusivePtr());
}

std::map<std::string, int64_t> copy_of(const std::map<std::string, int64_t>& counter) {
  std::lock_guard<std::mutex> lock(mutex);
  return counter;
}

}  // namespace
}  // namespace sim

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace sim;
  static Hooks hooks;
  at::RegisterPrivateUse1HooksInterface(&hooks);
  m.def("current_device", [] { return static_cast<int>(here); });
  m.def("set_device", [](int to) { Guard().setDevice(c10::Device(TYPE, static_cast<c10::DeviceIndex>(to))); });
  m.def("device_count", [] { return device_count; });
  m.def("set_device_count", [](int count) { device_count = std::min(count, MOST); });
  m.def("default_generator", [](int of) { return own_generator(static_cast<c10::DeviceIndex>(of)); });
  m.def("set_data", &set_data);
  m.def("synchronize", [] { wait("synchronize"); });
  m.def("start_counting", [](pybind11::object called) {
    std::lock_guard<std::mutex> lock(mutex);
    operators.clear();
    waits.clear();
    Py_XDECREF(watcher);
    watcher = called.is_none() ? nullptr : called.release().ptr();
    on.counting = true;
  });
  m.def("stop_counting", [] { on.counting = false; return std::make_pair(copy_of(operators), copy_of(waits)); });
  m.def("refuse_float64", [](bool value) { on.refuse_float64 = value; });
  m.def("round_products", [](bool value) { on.tensor_cores = value; });
  m.def("land_copies_late", [](bool value) { on.late_copies = value; });
  m.def("memory", [] { return std::make_tuple(int64_t(used), int64_t(peak), int64_t(limit)); });
  m.def("reset_peak", [] { peak = int64_t(used); });
  m.def("set_memory", [](int64_t bytes) { limit = bytes; });
}
