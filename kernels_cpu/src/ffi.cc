// The entry through XLA's foreign function interface: checks what it is given, shares the work out.
#include <atomic>
#include <condition_variable>
#include <limits>
#include <memory>
#include <mutex>
#include <string>

#include "problem.h"
#include "xla/ffi/api/ffi.h"

namespace lowbit {
namespace {

namespace ffi = xla::ffi;

const Kernels* Choose(std::string_view name) {
  for (const Kernels* kernels : {Avx512Kernels(), Avx2Kernels(), NeonKernels(), PortableKernels()})
    if (kernels != nullptr && (name.empty() || name == kernels->name)) return kernels;
  return nullptr;
}

// Work that threads of a pool take from, the caller among them. The caller returns when all that
// was taken is done: a task that a busy pool starts later finds nothing left.
class Shared {
 public:
  Shared(int64_t count, const std::function<void(int64_t)>& f) : count_(count), f_(f) {}

  void Work() {
    for (;;) {
      const int64_t i = next_.fetch_add(1);
      if (i >= count_) return;
      f_(i);
      if (done_.fetch_add(1) + 1 == count_) {
        const std::lock_guard<std::mutex> lock(mutex_);
        finished_.notify_all();
      }
    }
  }

  void Wait() {
    // The others are nearly done: looking is faster than sleeping, for some microseconds.
    for (int i = 0; i < 2000; ++i)
      if (done_.load() == count_) return;
    std::unique_lock<std::mutex> lock(mutex_);
    finished_.wait(lock, [this] { return done_.load() == count_; });
  }

 private:
  const int64_t count_;
  const std::function<void(int64_t)>& f_;
  std::atomic<int64_t> next_{0}, done_{0};
  std::mutex mutex_;
  std::condition_variable finished_;
};

void RunOn(ffi::ThreadPool& pool, int64_t count, const std::function<void(int64_t)>& f) {
  if (count == 0) return;
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), count) - 1;
  const auto shared = std::make_shared<Shared>(count, f);
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([shared] { shared->Work(); });
  shared->Work();
  shared->Wait();
}

ffi::Error Bad(const std::string& what) {
  return ffi::Error::InvalidArgument("lowbit_cpu_matmul: " + what);
}

ffi::Error Matmul(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> scale,
                  ffi::Buffer<ffi::U8> zero_point, ffi::RemainingArgs planes,
                  ffi::Result<ffi::Buffer<ffi::F32>> y, int64_t bits, int64_t group, float step,
                  float low, int64_t int_shift, int64_t int_low, float int_unit,
                  ffi::Span<const float> table, ffi::Span<const int32_t> int_table, bool integer,
                  std::string_view instruction_set) {
  static constexpr int kWidths[9][3] = {{}, {1}, {2}, {2, 1}, {4}, {4, 1}, {4, 2}, {4, 2, 1}, {8}};
  const Kernels* kernels = Choose(instruction_set);
  if (kernels == nullptr) {
    return Bad("no instruction set " + std::string(instruction_set) + " on this machine.");
  }
  if (bits < 1 || bits > 8) return Bad("bits=" + std::to_string(bits) + " is not in 1..8.");
  if (x.dimensions().size() != 2 || y->dimensions().size() != 2 || scale.dimensions().size() != 2)
    return Bad("x, y and scale are matrices.");
  Problem p = {};
  p.m = x.dimensions()[0], p.k = x.dimensions()[1], p.n = y->dimensions()[1];
  p.k_padded = (p.k + 31) / 32 * 32, p.n_padded = scale.dimensions()[1];
  p.bits = static_cast<int>(bits);
  if (y->dimensions()[0] != p.m) return Bad("x and y differ in rows.");
  if (p.n_padded % kPanel || p.n_padded < p.n) return Bad("scale has to have N padded to 16.");
  int shift = 0;
  for (; p.planes < kMaxPlanes && kWidths[bits][p.planes]; ++p.planes) {
    const int width = kWidths[bits][p.planes];
    const auto words = planes.get<ffi::Buffer<ffi::S32>>(p.planes);
    if (!words.has_value()) return Bad("too few planes of words.");
    const auto shape = words->dimensions();
    const int64_t rows = p.k_padded * width / 32;
    Plane& plane = p.plane[p.planes];
    plane = {words->typed_data(), width, shift, 0, 0};
    shift += width;
    if (shape.size() == 2 && shape[0] == rows && shape[1] == p.n_padded) {
      plane.panel_stride = kPanel, plane.row_stride = p.n_padded;
    } else if (shape.size() == 3 && shape[0] == p.n_padded / kPanel && shape[1] == rows &&
               shape[2] == kPanel) {
      plane.panel_stride = rows * kPanel, plane.row_stride = kPanel;
    } else {
      return Bad("words of plane " + std::to_string(p.planes) + " do not fit x and scale.");
    }
  }
  const int64_t groups = scale.dimensions()[0];
  const int64_t length = group > 0 ? group : p.k_padded;
  if ((group == 0 && groups != 1) || (group > 0 && groups * group != p.k))
    return Bad(std::to_string(groups) + " scales along K do not fit groups of " +
               std::to_string(group) + " and K=" + std::to_string(p.k) + ".");
  for (int i = 0; i < p.planes; ++i)
    if (length % (32 / p.plane[i].width)) return Bad("groups straddle words.");
  // Sums of 8-bit codes times activations, twice, of this many fit 31 bits.
  constexpr int64_t kLongest = 8192;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t last = g + 1 == groups ? p.k_padded : (g + 1) * length;
    for (int64_t begin = g * length; begin < last; begin += kLongest)
      p.chunks.push_back({begin, std::min(begin + kLongest, last), g});
  }
  p.scale = scale.typed_data();
  if (zero_point.element_count() != 0) {
    if (zero_point.element_count() != scale.element_count()) return Bad("zero points do not fit.");
    p.zero_point = zero_point.typed_data();
  }
  p.step = step, p.low = low;
  if (table.size() != 0) {
    if (table.size() != (size_t{1} << bits)) return Bad("a table has 2**bits values.");
    p.table = table.begin();
  }
  uint8_t looked_up[16] = {};
  if (int_table.size() != 0) {
    if (int_table.size() != 16 || bits != 4) return Bad("a table of integers has 16 values.");
    for (int i = 0; i < 16; ++i) {
      if (int_table[i] < 0 || int_table[i] > 64) return Bad("integers of a table are 0..64.");
      looked_up[i] = static_cast<uint8_t>(int_table[i]);
      p.int_max = std::max(p.int_max, int_table[i]);
    }
    p.int_table = looked_up;
  }
  p.int_shift = static_cast<int32_t>(int_shift), p.int_low = static_cast<int32_t>(int_low);
  p.int_unit = int_unit;
  p.smallest_scale = std::numeric_limits<float>::min();
  p.x = x.typed_data(), p.y = y->typed_data();
  if (p.m == 0 || p.n == 0) return ffi::Error::Success();

  const int64_t panels = p.n_padded / kPanel;
  // Some parts for every thread, so that one that starts late does less; not so small that starting
  // a part is what takes the time.
  constexpr int64_t kSmallest = 1 << 16;
  const int64_t bytes = p.k_padded * p.n_padded / 8 * bits * ((p.m + kRows - 1) / kRows);
  const int64_t most = std::max<int64_t>(1, std::min(panels, bytes / kSmallest));
  const int64_t parts = std::min(most, 8 * std::max<int64_t>(1, pool.num_threads()));
  const auto first = [&](int64_t part) { return panels * part / parts; };
  if (!integer) {
    RunOn(pool, parts, [&](int64_t i) { kernels->float_panels(p, first(i), first(i + 1)); });
    return ffi::Error::Success();
  }
  Quantized q;
  q.rows.resize(p.m * p.k_padded);
  q.sums.resize(p.m * p.chunks.size());
  q.scales.resize(p.m);
  for (int i = 0; i < p.planes; ++i) {
    q.words[Log2(p.plane[i].width)].resize(p.m * p.k_padded / 4);
  }
  if (p.m <= kRows) {  // too little to share
    for (int64_t row = 0; row < p.m; ++row) kernels->quantize_row(p, row, q);
  } else {
    RunOn(pool, p.m, [&](int64_t row) { kernels->quantize_row(p, row, q); });
  }
  RunOn(pool, parts, [&](int64_t i) { kernels->integer_panels(p, q, first(i), first(i + 1)); });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace lowbit

#pragma GCC visibility push(default)

XLA_FFI_DEFINE_HANDLER_SYMBOL(LowbitCpuMatmul, lowbit::Matmul,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::U8>>()
                                  .RemainingArgs()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Attr<int64_t>("bits")
                                  .Attr<int64_t>("group")
                                  .Attr<float>("step")
                                  .Attr<float>("low")
                                  .Attr<int64_t>("int_shift")
                                  .Attr<int64_t>("int_low")
                                  .Attr<float>("int_unit")
                                  .Attr<xla::ffi::Span<const float>>("table")
                                  .Attr<xla::ffi::Span<const int32_t>>("int_table")
                                  .Attr<bool>("integer")
                                  .Attr<std::string_view>("instruction_set"));

// The instruction set that an empty name stands for.
extern "C" const char* LowbitCpuInstructionSet() { return lowbit::Choose("")->name; }

#pragma GCC visibility pop
