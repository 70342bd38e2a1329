// The device itself: switches, counters, memory, guard and random streams.
#pragma once
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/extension.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

namespace sim {

constexpr auto TYPE = c10::DeviceType::PrivateUse1;
constexpr int MOST = 2;
inline int device_count = 2;
inline thread_local c10::DeviceIndex here = 0;

inline c10::Device device(c10::DeviceIndex index) { return {TYPE, index < 0 ? here : index}; }
inline bool is_ours(const at::Tensor& tensor) { return tensor.defined() && tensor.device().type() == TYPE; }

// Switches and counters ---------------------------------------------------------------------------------------------

struct Switches {
  std::atomic<bool> counting{false};
  std::atomic<bool> refuse_float64{false};  // as Apple's devices
  std::atomic<bool> tensor_cores{false};    // products of ten bits, where torch's flags allow them
  std::atomic<bool> late_copies{false};     // a pinned copy without waiting lands at the next wait, and is NaN until then
};
inline Switches on;
inline std::mutex mutex;
inline std::map<std::string, int64_t> operators, waits;
inline PyObject* watcher = nullptr;  // called with the name of each wait

inline void count(std::map<std::string, int64_t>& counter, const std::string& name) {
  if (!on.counting) return;
  std::lock_guard<std::mutex> lock(mutex);
  ++counter[name];
}

struct LateCopy {
  at::Tensor to, values;
};
inline std::vector<LateCopy> late;

inline void land_copies() {
  std::vector<LateCopy> landing;
  {
    std::lock_guard<std::mutex> lock(mutex);
    landing.swap(late);
  }
  at::AutoDispatchBelowADInplaceOrView below;
  for (auto& copy : landing) copy.to.copy_(copy.values);
}

inline void wait(const std::string& name) {
  land_copies();
  count(waits, name);
  if (watcher == nullptr || !on.counting) return;
  pybind11::gil_scoped_acquire gil;
  pybind11::reinterpret_borrow<pybind11::function>(watcher)(name);
}

// Memory ------------------------------------------------------------------------------------------------------------

inline std::atomic<int64_t> used{0}, peak{0}, limit{int64_t(16) << 30};

inline void take(size_t bytes) {
  used += static_cast<int64_t>(bytes);
  peak = std::max<int64_t>(peak, used);
}

struct Allocator final : c10::Allocator {
  struct Block {
    void* memory;
    size_t bytes;
  };
  static void release(void* context) {
    std::unique_ptr<Block> block(static_cast<Block*>(context));
    used -= static_cast<int64_t>(block->bytes);
    std::free(block->memory);
  }
  at::DataPtr allocate(size_t bytes) override {
    TORCH_CHECK_WITH(OutOfMemoryError, used + static_cast<int64_t>(bytes) <= limit, "sim out of memory. Tried to allocate ",
                     bytes, " bytes");
    void* memory = nullptr;
    if (bytes > 0) {
      TORCH_CHECK(posix_memalign(&memory, 64, bytes) == 0, "the host is out of memory");
      std::memset(memory, 0xFF, bytes);  // what nobody has written is NaN
    }
    take(bytes);
    return {memory, new Block{memory, bytes}, &release, device(-1)};
  }
  at::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};
inline Allocator allocator;

struct PinnedAllocator final : c10::Allocator {
  inline static std::map<uintptr_t, size_t> blocks;
  static void release(void* memory) {
    {
      std::lock_guard<std::mutex> lock(mutex);
      blocks.erase(reinterpret_cast<uintptr_t>(memory));
    }
    std::free(memory);
  }
  at::DataPtr allocate(size_t bytes) override {
    void* memory = nullptr;
    bytes = std::max<size_t>(bytes, 64);
    TORCH_CHECK(posix_memalign(&memory, 64, bytes) == 0, "the host is out of memory");
    std::lock_guard<std::mutex> lock(mutex);
    blocks[reinterpret_cast<uintptr_t>(memory)] = bytes;
    return {memory, memory, &release, at::Device(at::kCPU)};
  }
  at::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
  static bool holds(const void* memory) {
    auto address = reinterpret_cast<uintptr_t>(memory);
    std::lock_guard<std::mutex> lock(mutex);
    auto after = blocks.upper_bound(address);
    return after != blocks.begin() && address < std::prev(after)->first + std::prev(after)->second;
  }
};
inline PinnedAllocator pinned;

// Devices, streams and events: nothing runs beside anything, and a wait is a count ------------------------------------

struct Guard final : c10::impl::DeviceGuardImplInterface {
  using Index = c10::DeviceIndex;
  c10::DeviceType type() const override { return TYPE; }
  c10::Device getDevice() const override { return device(-1); }
  void setDevice(c10::Device to) const override {
    TORCH_CHECK(to.type() == TYPE && to.index() < device_count, "There is no device ", to);
    uncheckedSetDevice(to);
  }
  void uncheckedSetDevice(c10::Device to) const noexcept override { here = to.index() < 0 ? here : to.index(); }
  c10::Device exchangeDevice(c10::Device to) const override {
    auto before = getDevice();
    setDevice(to);
    return before;
  }
  Index deviceCount() const noexcept override { return static_cast<Index>(device_count); }
  static c10::Stream only(c10::Device of) { return c10::Stream(c10::Stream::DEFAULT, device(of.index())); }
  c10::Stream getStream(c10::Device of) const override { return only(of); }
  c10::Stream getDefaultStream(c10::Device of) const override { return only(of); }
  c10::Stream getStreamFromGlobalPool(c10::Device of, bool) const override { return only(of); }
  c10::Stream getNewStream(c10::Device of, int) const override { return only(of); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return only(stream.device()); }
  void record(void** event, const c10::Stream&, const Index, const c10::EventFlag) const override {
    if (*event == nullptr) *event = new char;
  }
  void destroyEvent(void* event, const Index) const noexcept override { delete static_cast<char*>(event); }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override { wait("stream"); }
  void synchronizeEvent(void*) const override { wait("event"); }
  void synchronizeDevice(const Index) const override { wait("device"); }
  double elapsedTime(void*, void*, const Index) const override { return 0; }
};

// Random streams: a device draws what the CPU would, from a state of its own ------------------------------------------

struct Generator final : at::CPUGeneratorImpl {
  explicit Generator(c10::DeviceIndex index) : at::CPUGeneratorImpl(c10::default_rng_seed_val) {
    device_ = sim::device(index);
    key_set_ = c10::DispatchKeySet(c10::DispatchKey::PrivateUse1);
  }
  static c10::DeviceType device_type() { return TYPE; }
};

inline at::Generator new_generator(c10::DeviceIndex index) { return at::make_generator<Generator>(index < 0 ? here : index); }

inline const at::Generator& own_generator(c10::DeviceIndex index) {
  static std::vector<at::Generator> all = [] {
    std::vector<at::Generator> made;
    for (int i = 0; i < MOST; ++i) made.push_back(new_generator(static_cast<c10::DeviceIndex>(i)));
    return made;
  }();
  return all[index < 0 ? here : index];
}

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return Guard().deviceCount(); }
  c10::DeviceIndex getCurrentDevice() const override { return here; }
  void setCurrentDevice(c10::DeviceIndex to) const override { here = to; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex to) const override {
    return Guard().exchangeDevice(c10::Device(TYPE, to)).index();
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex to) const override { return exchangeDevice(to); }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex of) const override { return own_generator(of); }
  at::Generator getNewGenerator(c10::DeviceIndex of) const override { return new_generator(of); }
  at::Device getDeviceFromPtr(void*) const override { return device(-1); }
  bool isPinnedPtr(const void* memory) const override { return PinnedAllocator::holds(memory); }
  at::Allocator* getPinnedMemoryAllocator() const override { return &pinned; }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    auto grown = allocator.allocate(bytes);
    std::memcpy(grown.get(), storage.data(), std::min(bytes, storage.nbytes()));
    storage.set_data_ptr_noswap(std::move(grown));
    storage.set_nbytes(bytes);
  }
};

}  // namespace sim
