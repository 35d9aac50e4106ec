// A CUDA device that is host memory. Every operator of the device gets one boxed kernel. It makes the CUDA tensors among
// its arguments CPU tensors in place, as their memory is the host's anyway, calls the CPU kernel, and changes them back;
// what the kernel made becomes CUDA tensors. Views, resizing and aliases between arguments and results need nothing more.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/_scaled_dot_product_attention_math.h>
#include <c10/core/CPUAllocator.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/Generator.h>
#include <unistd.h>

#include <map>
#include <mutex>
#include <set>

namespace {

using c10::DispatchKey;
using c10::IValue;
using torch::jit::Stack;
namespace py = pybind11;

const c10::Device kHost(c10::kCPU);
const c10::Device kDevice(c10::kCUDA, 0);

pid_t owner = 0; // the process that installed the device
py::object* listener = nullptr; // called with (kind, operator, detail)

void report(const char* kind, const std::string& operation, const std::string& detail) {
  py::gil_scoped_acquire gil;
  (*listener)(kind, operation, detail);
}

// ---- Changing the device of a tensor or generator in place: the members are protected

struct TensorAccess : c10::TensorImpl {
  static constexpr auto device = &TensorAccess::device_opt_;
  static constexpr auto keys = &TensorAccess::key_set_;
};

struct GeneratorAccess : c10::GeneratorImpl {
  static constexpr auto device = &GeneratorAccess::device_;
};

void move_storage(const c10::Storage& storage, c10::Device to) {
  storage.unsafeGetStorageImpl()->_mutable_data_ptr_no_checks().unsafe_set_device(to);
}

void move_tensor(const at::Tensor& tensor, c10::Device to) {
  auto* impl = tensor.unsafeGetTensorImpl();
  const bool down = to == kHost;
  const auto keys = impl->key_set()
                        .remove_backend(down ? c10::BackendComponent::CUDABit : c10::BackendComponent::CPUBit)
                        .remove(down ? DispatchKey::AutocastCUDA : DispatchKey::AutocastCPU);
  impl->*TensorAccess::keys = keys | c10::DispatchKeySet(down ? c10::BackendComponent::CPUBit : c10::BackendComponent::CUDABit)
      | c10::DispatchKeySet(down ? DispatchKey::AutocastCPU : DispatchKey::AutocastCUDA);
  impl->*TensorAccess::device = to;
  if (tensor.has_storage()) move_storage(tensor.storage(), to);
}

template <class Visitor>
void each_tensor(const IValue& value, const Visitor& visit) {
  if (value.isTensor()) {
    if (value.toTensor().defined()) visit(value.toTensor());
  } else if (value.isList()) {
    for (const IValue& item : value.toListRef()) each_tensor(item, visit);
  }
}

// The CUDA tensors, storages and generators of a call; on the host for as long as this lives
class OnHost {
 public:
  explicit OnHost(const Stack& arguments) {
    for (const IValue& value : arguments) {
      each_tensor(value, [&](const at::Tensor& t) {
        if (t.is_cuda()) move(t);
        else if (t.has_storage()) host_storages_.insert(t.storage().unsafeGetStorageImpl());
      });
      if (value.isStorage() && value.toStorage().device().is_cuda()) {
        storages_.push_back(value.toStorage());
        move_storage(storages_.back(), kHost);
      }
      if (value.isGenerator() && value.toGenerator().device().is_cuda()) {
        generators_.push_back(value.toGenerator());
        generators_.back().unsafeGetGeneratorImpl()->*GeneratorAccess::device = kHost;
      }
    }
  }
  ~OnHost() {
    for (const auto& t : tensors_) move_tensor(t, kDevice);
    for (const auto& s : storages_) move_storage(s, kDevice);
    for (const auto& g : generators_) g.unsafeGetGeneratorImpl()->*GeneratorAccess::device = kDevice;
  }
  // Whether a result is new, rather than an argument or a view of one from the host
  bool made(const at::Tensor& t) const {
    return t.device() == kHost && !(t.has_storage() && host_storages_.count(t.storage().unsafeGetStorageImpl()));
  }

 private:
  void move(const at::Tensor& t) {
    tensors_.push_back(t);
    move_tensor(t, kHost);
  }
  std::vector<at::Tensor> tensors_;
  std::vector<c10::Storage> storages_;
  std::vector<at::Generator> generators_;
  std::set<c10::StorageImpl*> host_storages_;
};

at::Generator new_generator() {
  auto generator = at::make_generator<at::CPUGeneratorImpl>(c10::default_rng_seed_val);
  generator.unsafeGetGeneratorImpl()->*GeneratorAccess::device = kDevice;
  return generator;
}

at::Generator& default_generator() {
  static at::Generator generator = new_generator();
  return generator;
}

// ---- What torch asks of a device

struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    void* memory = c10::GetCPUAllocator()->raw_allocate(size);
    std::lock_guard<std::mutex> lock(mutex());
    ranges()[static_cast<const char*>(memory)] = size;
    return {memory, memory, &release, kHost};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t count) const override { default_copy_data(to, from, count); }

  static bool owns(const void* address) {
    std::lock_guard<std::mutex> lock(mutex());
    auto next = ranges().upper_bound(static_cast<const char*>(address));
    if (address == nullptr || next == ranges().begin()) return false;
    --next;
    return static_cast<const char*>(address) < next->first + next->second;
  }

 private:
  static void release(void* memory) {
    {
      std::lock_guard<std::mutex> lock(mutex());
      ranges().erase(static_cast<const char*>(memory));
    }
    c10::GetCPUAllocator()->raw_deallocate(memory);
  }
  static std::mutex& mutex() {
    static auto* mutex = new std::mutex; // tensors may outlive static variables
    return *mutex;
  }
  static std::map<const char*, size_t>& ranges() {
    static auto* ranges = new std::map<const char*, size_t>;
    return *ranges;
  }
};

struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  c10::Device getDevice() const override { return kDevice; }
  c10::Stream getStream(c10::Device) const noexcept override { return stream(); }
  c10::Stream getNewStream(c10::Device, int) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return stream(); }
  static c10::Stream stream() { return c10::Stream(c10::Stream::DEFAULT, kDevice); }
};

struct PretendedCudaHooks final : at::CUDAHooksInterface {
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  int getNumGPUs() const override { return 1; }
  c10::DeviceIndex current_device() const override { return 0; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  void deviceSynchronize(c10::DeviceIndex) const override { report("wait", "deviceSynchronize", ""); }
  bool isPinnedPtr(const void* address) const override { return PinnedAllocator::owns(address); }
  c10::Allocator* getPinnedMemoryAllocator() const override {
    static PinnedAllocator allocator;
    return &allocator;
  }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return default_generator(); }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return new_generator(); }
};

// ---- Where the host waits

// Operators whose result, or its size, the host reads from the device
const std::set<std::string> kWaiting = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::bincount",
    "aten::_unique", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "aten::unique_dim_consecutive",
    "aten::histc", "aten::linalg_inv_ex", "aten::linalg_qr", "aten::_linalg_eigh", "aten::_linalg_svd", "torchvision::nms"};

// Beside those tagged as pointwise, operators on CUDA tensors that take CPU tensors without dimensions
const std::set<std::string> kTakeNumbers = {
    "aten::fill_", "aten::masked_fill", "aten::masked_fill_", "aten::where", "aten::index_fill", "aten::index_fill_",
    "aten::lerp", "aten::lerp_", "aten::linspace", "aten::clamp", "aten::floor_divide", "aten::floor_divide_"};

const std::set<std::string> kIndexing = {
    "aten::index", "aten::_unsafe_index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_",
    "aten::_unsafe_index_put"};

std::string describe(const at::Tensor& t) {
  return c10::str(t.dtype().name(), " ", t.sizes(), " on ", t.device());
}

// The last number that became a tensor of the device. Kept, so that no other tensor gets its memory
at::Tensor& last_number() {
  static auto* number = new at::Tensor;
  return *number;
}

struct Call { // what a kernel is asked for
  const c10::OperatorHandle& op;
  const Stack& arguments;
  std::string name;
  std::vector<std::pair<at::Tensor, size_t>> tensors; // with the position of the argument
  bool indexing;

  Call(const c10::OperatorHandle& op, const Stack& arguments)
      : op(op), arguments(arguments), name(op.schema().name()), indexing(kIndexing.count(name)) {
    for (size_t i = 0; i < arguments.size(); ++i)
      each_tensor(arguments[i], [&](const at::Tensor& t) { tensors.emplace_back(t, i); });
  }

  void check_devices() const {
    if (name == "aten::copy_") return;
    const auto on_device = std::find_if(tensors.begin(), tensors.end(), [](auto& t) { return t.first.is_cuda(); });
    if (on_device == tensors.end()) return;
    for (const auto& [t, position] : tensors) {
      if (!t.device().is_cpu() || t.unsafeGetTensorImpl()->is_wrapped_number()) continue;
      if (indexing && position == 1 && tensors[0].first.is_cuda()) continue; // an index is copied
      if (t.dim() == 0 && (indexing || kTakeNumbers.count(name) || op.hasTag(at::Tag::pointwise))) continue;
      TORCH_CHECK(
          false, "mixed devices: ", name, " gets ", describe(on_device->first), ", but its argument '",
          op.schema().arguments()[position].name(), "' is ", describe(t));
    }
    for (const IValue& value : arguments)
      TORCH_CHECK(
          !value.isGenerator() || value.toGenerator().device().is_cuda(), "mixed devices: ", name,
          " works on the device, but its generator is the host's");
  }

  // A boolean mask becomes indices, whose number the host must know, unless it only has a number filled in
  bool masks() const { return has_mask() && !fills(); }

  // What is put is a number of the host, as in `x[index, other] = 1`: it is copied first, unless filled in at a mask.
  // torch 2.15 makes it a tensor of the device at once, but 2.11 one of the host
  bool copies_value() const {
    if (arguments.size() < 3 || !tensors[0].first.is_cuda() || fills()) return false;
    const at::Tensor& values = arguments[2].toTensor();
    return values.device().is_cpu() || (last_number().defined() && values.is_alias_of(last_number()));
  }

  bool has_mask() const {
    return std::any_of(tensors.begin(), tensors.end(), [](auto& x) { return x.second == 1 && is_mask(x.first); });
  }

  // One mask, which a number of the host is put at
  bool fills() const {
    const auto indices = std::count_if(tensors.begin(), tensors.end(), [](auto& x) { return x.second == 1; });
    if (!has_mask() || indices != 1 || arguments.size() < 3) return false;
    const at::Tensor& values = arguments[2].toTensor();
    const bool accumulates = arguments.size() > 3 && arguments[3].toBool();
    return values.numel() == 1 && values.device().is_cpu() && !accumulates;
  }

  static bool is_mask(const at::Tensor& t) {
    return t.is_cuda() && (t.scalar_type() == at::kBool || t.scalar_type() == at::kByte);
  }

  void report_transfers() const {
    if (name == "aten::copy_") {
      const at::Tensor &to = arguments[0].toTensor(), &from = arguments[1].toTensor();
      if (to.device() == from.device() || to.numel() == 0) return;
      const at::Tensor& on_host = to.is_cuda() ? from : to;
      const bool async = arguments[2].toBool() && on_host.has_storage() && PinnedAllocator::owns(on_host.storage().data());
      if (to.is_cuda()) happens(async ? "async_upload" : "upload", describe(from));
      else happens(async ? "async_download" : "wait", describe(from));
    } else if (indexing) {
      for (const auto& [t, position] : tensors)
        if (position == 1 && t.device().is_cpu() && tensors[0].first.is_cuda() && t.numel() > 0)
          happens("upload", "index " + describe(t));
      if (copies_value()) happens("upload", "value " + describe(arguments[2].toTensor()));
      if (masks()) happens("wait", "boolean index");
    } else if (name == "aten::where") {
      for (const auto& [t, position] : tensors)
        if (t.device().is_cpu() && tensors[0].first.is_cuda()) happens("upload", describe(t));
    } else if (kWaiting.count(name) || (name == "aten::repeat_interleave" && arguments.back().isNone())) {
      happens("wait", tensors.empty() ? "" : describe(tensors[0].first));
    }
  }

  void happens(const char* kind, const std::string& detail) const;
};

// ---- CUDA graphs: the calls between the beginning and the end of a capture, made again on the same tensors

struct Recorded {
  c10::OperatorHandle op;
  Stack arguments, results;
};
struct Graph {
  std::vector<Recorded> calls;
};
std::shared_ptr<Graph> capturing;

void Call::happens(const char* kind, const std::string& detail) const {
  report(kind, name, detail);
  TORCH_CHECK(
      !capturing || std::string(kind).rfind("async", 0) == 0, "operation not permitted when stream is capturing: ", name,
      " (", kind, ", ", detail, ")");
}

// ---- The kernel

const std::set<std::string> kSoftmax = {"aten::_softmax", "aten::_log_softmax"};
const std::set<std::string> kSoftmaxBackward = {"aten::_softmax_backward_data", "aten::_log_softmax_backward_data"};

// CUDA's softmax can read half precision and write float32, which the CPU's cannot
void call_on_host(const c10::OperatorHandle& op, Stack& stack) {
  const std::string& name = op.schema().name();
  std::optional<at::ScalarType> narrow;
  if (kSoftmax.count(name) && stack[2].toBool()) {
    stack[0] = stack[0].toTensor().to(at::kFloat);
    stack[2] = false;
  } else if (kSoftmaxBackward.count(name) && stack[0].toTensor().scalar_type() != stack[3].toScalarType()) {
    narrow = stack[3].toScalarType();
    stack[3] = stack[0].toTensor().scalar_type();
  }
  op.callBoxed(&stack);
  if (narrow) stack[0] = stack[0].toTensor().to(*narrow);
}

Stack execute(const c10::OperatorHandle& op, Stack stack) {
  const OnHost moved(stack);
  for (IValue& value : stack)
    if (value.isDevice() && value.toDevice().is_cuda()) value = kHost;
  call_on_host(op, stack);
  for (const IValue& value : stack)
    each_tensor(value, [&](const at::Tensor& t) {
      if (moved.made(t)) move_tensor(t, kDevice);
    });
  return stack;
}

void kernel(const c10::OperatorHandle& op, c10::DispatchKeySet, Stack* stack) {
  TORCH_CHECK(
      getpid() == owner, "Cannot re-initialize CUDA in forked subprocess: ", op.schema().name(),
      ". To use CUDA with multiprocessing, you must use the 'spawn' start method");
  const at::AutoDispatchBelowADInplaceOrView below;
  const auto& declared = op.schema().arguments();
  Stack arguments = torch::jit::pop(*stack, declared.size());
  for (size_t i = 0; i < arguments.size(); ++i)
    if (arguments[i].isNone() && declared[i].name() == "generator") arguments[i] = default_generator();
  {
    const Call call(op, arguments);
    call.check_devices();
    call.report_transfers();
  }
  Stack results = execute(op, arguments);
  if (op.schema().name() == "aten::scalar_tensor") last_number() = results[0].toTensor();
  if (capturing) capturing->calls.push_back({op, arguments, results});
  stack->insert(stack->end(), results.begin(), results.end());
}

void replay(const Graph& graph) {
  const at::AutoDispatchBelowADInplaceOrView below;
  const at::NoGradGuard no_grad;
  for (const auto& [op, arguments, results] : graph.calls) {
    const std::string& name = op.schema().name();
    if (name.rfind("aten::empty", 0) == 0 || name.rfind("aten::new_empty", 0) == 0) continue; // the memory stays
    std::vector<at::Tensor> before, after;
    for (const IValue& value : results) each_tensor(value, [&](const at::Tensor& t) { before.push_back(t); });
    for (const IValue& value : execute(op, arguments))
      each_tensor(value, [&](const at::Tensor& t) { after.push_back(t); });
    for (size_t i = 0; i < before.size(); ++i)
      if (!before[i].is_alias_of(after[i])) {
        const OnHost moved({before[i], after[i]});
        before[i].copy_(after[i]);
      }
  }
}

// The choice between CUDA's attention kernels is not an operator
at::Tensor attention(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const std::optional<at::Tensor>& mask,
    double dropout, bool causal, std::optional<double> scale, bool grouped) {
  return std::get<0>(
      at::_scaled_dot_product_attention_math(query, key, value, mask, dropout, causal, {}, scale, grouped));
}

std::vector<c10::RegistrationHandleRAII>& registrations() {
  static auto* handles = new std::vector<c10::RegistrationHandleRAII>; // never undone
  return *handles;
}

void replace(const c10::OperatorName& name, c10::KernelFunction function, DispatchKey key = DispatchKey::CUDA) {
  registrations().push_back(
      c10::Dispatcher::singleton().registerImpl(name, key, std::move(function), std::nullopt, nullptr, "pretend_cuda"));
}

void install(py::object on_event) {
  listener = new py::object(std::move(on_event));
  owner = getpid();
  // torch has asked for the object long before: the same place gets another one
  static_assert(sizeof(PretendedCudaHooks) == sizeof(at::CUDAHooksInterface), "an object without members");
  new (const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks())) PretendedCudaHooks;
  static Guard guard;
  c10::impl::DeviceGuardImplRegistrar(c10::DeviceType::CUDA, &guard);

  auto& dispatcher = c10::Dispatcher::singleton();
  for (const auto& name : dispatcher.getAllOpNames()) {
    const auto op = dispatcher.findOp(name);
    const bool ours = name.name.rfind("aten::", 0) == 0 || name.name.rfind("torchvision::", 0) == 0;
    if (ours && op && op->hasKernelForDispatchKey(DispatchKey::CUDA) && op->hasComputedKernelForDispatchKey(DispatchKey::CPU))
      replace(name, c10::KernelFunction::makeFromBoxedFunction<&kernel>());
  }
  // Not operators of CUDA, but they choose a kernel by the device, or are to be known
  for (const char* name : {"aten::convolution", "aten::convolution_backward", "aten::copy_", "aten::scalar_tensor"})
    replace({name, ""}, c10::KernelFunction::makeFromBoxedFunction<&kernel>());
  for (const auto key : {DispatchKey::CUDA, DispatchKey::AutogradCUDA})
    replace(
        {"aten::scaled_dot_product_attention", ""}, c10::KernelFunction::makeFromUnboxedRuntimeFunction(&attention), key);
}

} // namespace

PYBIND11_MODULE(host_device, module) {
  module.def("install", &install, "Put the device in place; events are given to a function");
  module.def("adopt", [](const std::string& name) {
    replace({name, ""}, c10::KernelFunction::makeFromBoxedFunction<&kernel>());
  }, "Serve an operator that has a CPU kernel");
  module.def("default_generator", [] {
    return py::reinterpret_steal<py::object>(THPGenerator_initDefaultGenerator(default_generator()));
  });
  py::class_<Graph, std::shared_ptr<Graph>>(module, "Graph").def("replay", &replay);
  module.def("begin_capture", [] { capturing = std::make_shared<Graph>(); });
  module.def("is_capturing", [] { return capturing != nullptr; });
  module.def("end_capture", [] { return std::exchange(capturing, nullptr); });
}
