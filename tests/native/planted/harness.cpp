// Runs the planted kernels on tiny shapes against float64 and says what is wrong. No torch, so that every sanitizer
// can watch. Arguments: which kernel, thread order (0 forward, 1 reverse, 2 random), seed, poison byte.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "block_sum.cu"
#include "histogram.cu"
#include "matmul.cu"

namespace {
int wrong = 0;

bool launched(int code) {
  if (code != 0) {
    std::printf("refused: %s\n", emu::last_error());
    wrong++;
  }
  return code == 0;
}

void compare(const char* what, double got, double expected, double tolerance) {
  if (std::fabs(got - expected) <= tolerance * (1 + std::fabs(expected))) return;
  if (wrong++ == 0) std::printf("wrong value: %s: %g instead of %g\n", what, got, expected);
}

void run_block_sum() {
  const int rows = 3, columns = 301;
  std::mt19937 generator(1);
  std::vector<float> in(rows * columns), out(rows);
  for (float& v : in) v = static_cast<float>(generator() % 1000) / 100.0f;
  if (!launched(DATAFLEX_LAUNCH(block_sum, dim3(rows), dim3(128), 0, nullptr, in.data(), out.data(), columns))) return;
  for (int r = 0; r < rows; r++) {
    double sum = 0;
    for (int i = 0; i < columns; i++) sum += in[r * columns + i];
    compare("row sum", out[r], sum, 1e-6);
  }
}

void run_histogram() {
  const int n = 1000, bins = 7;
  std::mt19937 generator(2);
  std::vector<float> in(n), sums(bins), expected_sums(bins);
  std::vector<unsigned> counts(bins), expected(bins);
  for (float& v : in) v = static_cast<float>(generator() >> 8) / 16777216.0f;
  in[0] = 1.0f;
  for (float v : in) expected[std::min(static_cast<int>(v * bins), bins - 1)]++;
  if (!launched(DATAFLEX_LAUNCH(histogram, dim3(4), dim3(128), bins * 8, nullptr, in.data(), n, bins, counts.data(),
                                sums.data())))
    return;
  for (int i = 0; i < bins; i++) compare("count", counts[i], expected[i], 0);
}

template <bool BF16>
void run_matmul() {
  const int m = 32, n = 16, k = 64;
  std::mt19937 generator(3);
  std::vector<uint16_t> a(m * k), b(n * k);
  std::vector<float> c(m * n, NAN);
  const auto draw = [&](uint16_t& bits) {
    const float v = static_cast<float>(generator() % 64) / 16.0f - 2.0f;
    bits = BF16 ? __bfloat16_as_ushort(__nv_bfloat16(v)) : __half_as_ushort(__half(v));
  };
  const auto value = [](uint16_t bits) {
    return BF16 ? __bfloat162float(__ushort_as_bfloat16(bits)) : __half2float(__ushort_as_half(bits));
  };
  for (auto& v : a) draw(v);
  for (auto& v : b) draw(v);
  if (!launched(DATAFLEX_LAUNCH((matmul<BF16>), dim3(n / 8, m / 16), dim3(32), 0, nullptr, a.data(), b.data(), c.data(),
                                n, k)))
    return;
  for (int i = 0; i < m; i++)
    for (int j = 0; j < n; j++) {
      double sum = 0;
      for (int q = 0; q < k; q++) sum += double(value(a[i * k + q])) * value(b[j * k + q]);
      compare("product", c[i * n + j], sum, 1e-6);
    }
}

void run_tf32() {
  const int m = 16, n = 16, k = 24;
  std::mt19937 generator(4);
  std::vector<float> a(m * k), b(n * k), c(m * n, NAN);
  for (float& v : a) v = static_cast<float>(generator() % 2048) / 1024.0f - 1.0f;  // 10 bits of mantissa: exact
  for (float& v : b) v = static_cast<float>(generator() % 2048) / 1024.0f - 1.0f;
  if (!launched(DATAFLEX_LAUNCH(matmul_tf32, dim3(n / 8, m / 16), dim3(32), 0, nullptr, a.data(), b.data(), c.data(), n,
                                k)))
    return;
  for (int i = 0; i < m; i++)
    for (int j = 0; j < n; j++) {
      double sum = 0;
      for (int q = 0; q < k; q++) sum += double(a[i * k + q]) * b[j * k + q];
      compare("tf32 product", c[i * n + j], sum, 1e-6);
    }
}

void run_transpose() {
  std::vector<uint16_t> in(64), out(64);
  for (int i = 0; i < 64; i++) in[i] = static_cast<uint16_t>(i);
  if (!launched(DATAFLEX_LAUNCH(transpose, dim3(1), dim3(32), 0, nullptr, in.data(), out.data()))) return;
  for (int i = 0; i < 64; i++) compare("transposed", out[i], in[i % 8 * 8 + i / 8], 0);
}
}  // namespace

int main(int argc, char** argv) {
  if (argc != 5) return 2;
  emu::Settings settings;
  settings.order = static_cast<emu::Order>(std::atoi(argv[2]));
  settings.seed = std::strtoull(argv[3], nullptr, 10);
  settings.poison = static_cast<unsigned char>(std::atoi(argv[4]));
  emu::configure(settings);
  const bool all = !std::strcmp(argv[1], "all");
  if (all || !std::strcmp(argv[1], "block_sum")) run_block_sum();
  if (all || !std::strcmp(argv[1], "histogram")) run_histogram();
  if (all || !std::strcmp(argv[1], "matmul")) {
    run_matmul<true>();
    run_matmul<false>();
    run_tf32();
    run_transpose();
  }
  std::printf(wrong ? "found\n" : "good\n");
  return wrong != 0;
}
