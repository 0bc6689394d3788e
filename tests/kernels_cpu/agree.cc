// One instruction set's kernels against the portable ones, without Python or XLA: for machines that
// are emulated. SOURCE is the file of the instruction set, VECTOR its vector type.
#include SOURCE

#include <cstdio>
#include <random>

namespace lowbit {
namespace {

struct Data {
  std::vector<int32_t> words[kMaxPlanes];
  std::vector<float> scale, table, x;
  std::vector<uint8_t> zero_point, int_table;
};

Problem Random(int bits, int64_t k, int64_t n, int64_t m, int64_t group, bool table, bool zeros,
               std::mt19937& random, Data& data) {
  static constexpr int kWidths[9][3] = {{}, {1}, {2}, {2, 1}, {4}, {4, 1}, {4, 2}, {4, 2, 1}, {8}};
  Problem p = {};
  p.m = m, p.n = n, p.k = k, p.k_padded = (k + 31) / 32 * 32, p.n_padded = (n + 15) / 16 * 16;
  p.bits = bits, p.step = 1, p.low = table ? 0 : -1.5f, p.int_shift = 1, p.int_low = -3, p.int_unit = 0.5f;
  int shift = 0;
  for (; p.planes < kMaxPlanes && kWidths[bits][p.planes]; ++p.planes) {
    const int width = kWidths[bits][p.planes];
    auto& words = data.words[p.planes];
    for (int64_t i = 0; i < p.k_padded * width / 32 * p.n_padded; ++i)
      words.push_back(static_cast<int32_t>(random()));
    p.plane[p.planes] = {words.data(), width, shift, kPanel, p.n_padded};
    shift += width;
  }
  const int64_t groups = group ? k / group : 1;
  for (int64_t g = 0; g < groups; ++g)
    p.chunks.push_back({g * group, g + 1 == groups ? p.k_padded : (g + 1) * group, g});
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < groups * p.n_padded; ++i) {
    data.scale.push_back(normal(random));
    data.zero_point.push_back(static_cast<uint8_t>(random() % (1 << bits)));
  }
  for (int64_t i = 0; i < m * k; ++i) data.x.push_back(normal(random));
  for (int i = 0; i < (1 << bits); ++i) data.table.push_back(static_cast<float>(i * i));
  for (int i = 0; i < 16; ++i) data.int_table.push_back(static_cast<uint8_t>(random() % 65));
  p.scale = data.scale.data(), p.x = data.x.data();
  p.zero_point = zeros && !table ? data.zero_point.data() : nullptr;
  p.table = table ? data.table.data() : nullptr;
  p.int_table = table && bits == 4 ? data.int_table.data() : nullptr;
  p.int_max = 64, p.smallest_scale = 1e-38f;
  return p;
}

std::vector<float> Run(Problem p, const Kernels& kernels, bool integer) {
  std::vector<float> y(p.m * p.n, -1);
  p.y = y.data();
  const int64_t panels = p.n_padded / kPanel;
  if (!integer) {
    kernels.float_panels(p, 0, panels);
    return y;
  }
  Quantized q;
  q.rows.resize(p.m * p.k_padded);
  q.sums.resize(p.m * p.chunks.size());
  q.scales.resize(p.m);
  for (auto& words : q.words) words.resize(p.m * p.k_padded / 4);
  for (int64_t row = 0; row < p.m; ++row) kernels.quantize_row(p, row, q);
  kernels.integer_panels(p, q, 0, panels);
  return y;
}

int Main() {
  static constexpr Kernels kHere = MakeKernels<VECTOR>("here");
  std::mt19937 random(0);
  int cases = 0, wrong = 0;
  for (int bits = 1; bits <= 8; ++bits)
    for (const int64_t m : {1, 2, 3, 4, 7})
      for (const int64_t n : {16, 19})
        for (const int64_t k : {33, 96})
          for (const bool table : {false, true})
            for (const bool integer : {false, true}) {
              if (integer && table && bits != 4) continue;
              Data data;
              const int64_t group = k == 96 ? 32 : 0;
              const bool zeros = random() % 2;
              const Problem p = Random(bits, k, n, m, group, table, zeros, random, data);
              const auto ours = Run(p, kHere, integer), theirs = Run(p, *PortableKernels(), integer);
              float largest = 0, error = 0;
              for (size_t i = 0; i < ours.size(); ++i) {
                largest = std::max(largest, std::fabs(theirs[i]));
                error = std::max(error, std::fabs(ours[i] - theirs[i]));
              }
              ++cases;
              // Sums of at most 96 products, some with the rounding of a product and some without.
              if (!(error <= 96 * 1.2e-7f * largest)) {
                ++wrong;
                std::printf("bits %d m %d n %d k %d table %d integer %d: error %g of %g\n", bits,
                            int(m), int(n), int(k), table, integer, error, largest);
              }
            }
  std::printf("%d cases, %d wrong\n", cases, wrong);
  return wrong != 0;
}

}  // namespace
}  // namespace lowbit

int main() { return lowbit::Main(); }
