// What the kernels of this folder share: vectors, products of matrices, threads, and what XLA calls them with.

#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

#if defined(__AVX512F__)
constexpr int LANES = 16, VECTORS = 4;
#elif defined(__AVX__)
constexpr int LANES = 8, VECTORS = 2;
#else
constexpr int LANES = 4, VECTORS = 4;
#endif
constexpr int ROWS = 6;
constexpr float LOG2E = 1.44269504088896341f;

typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES), aligned(4)));

inline Vector load(const float* x) { return *reinterpret_cast<const Vector*>(x); }
inline void store(float* x, Vector v) { *reinterpret_cast<Vector*>(x) = v; }

// ---- Products

struct Matrix {  // element (i, j) is data[i * row + j * column]
  const float* data;
  int64_t row, column;
};

// c[R, V vectors] += a[R, L] b[L, V vectors], or = without ADD.
template <int R, int V, bool ADD>
inline void product_of_registers(Matrix a, const float* b, int64_t b_row, float* c, int64_t c_row, int L) {
  Vector sum[R][V];
#pragma GCC unroll 8
  for (int i = 0; i < R; i++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) sum[i][v] = ADD ? load(c + i * c_row + v * LANES) : Vector{};
  for (int l = 0; l < L; l++) {
    Vector factor[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) factor[v] = load(b + l * b_row + v * LANES);
#pragma GCC unroll 8
    for (int i = 0; i < R; i++)
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) sum[i][v] += a.data[i * a.row + l * a.column] * factor[v];
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; i++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) store(c + i * c_row + v * LANES, sum[i][v]);
}

template <int V, bool ADD>
void product_of_columns(Matrix a, const float* b, int64_t b_row, float* c, int64_t c_row, int I, int L) {
  int i = 0;
  auto from = [&](int i) { return Matrix{a.data + i * a.row, a.row, a.column}; };
  for (; i + ROWS <= I; i += ROWS) product_of_registers<ROWS, V, ADD>(from(i), b, b_row, c + i * c_row, c_row, L);
  for (; i + 4 <= I; i += 4) product_of_registers<4, V, ADD>(from(i), b, b_row, c + i * c_row, c_row, L);
  for (; i < I; i++) product_of_registers<1, V, ADD>(from(i), b, b_row, c + i * c_row, c_row, L);
}

// c[I, J] += a[I, L] b[L, J], or = without ADD; J is a multiple of LANES.
template <bool ADD>
void product(Matrix a, const float* b, int64_t b_row, float* c, int64_t c_row, int I, int J, int L) {
  int j = 0;
  for (; j + VECTORS * LANES <= J; j += VECTORS * LANES)
    product_of_columns<VECTORS, ADD>(a, b + j, b_row, c + j, c_row, I, L);
  for (; j < J; j += LANES) product_of_columns<1, ADD>(a, b + j, b_row, c + j, c_row, I, L);
}

// ---- Vectors

// 2^x for x < 127, within 2e-9 of its rounding; 0 below 2^-126. The polynomial is the least-squares fit of degree 6.
inline Vector exp2(Vector x) {
  const Vector magic = Vector{} + 12582912.f;  // 1.5 * 2^23: the sum has no bits below one
  Vector rounded = x + magic, f = x - (rounded - magic), p = f * 0.0001533757683f + 0.001339986036f;
  p = p * f + 0.009618519534f;
  p = p * f + 0.05550328998f;
  p = p * f + 0.2402264661f;
  p = p * f + 0.6931472056f;
  p = p * f + 1.f;
  Ints scaled = (Ints)p + ((Ints)rounded << 23), normal = x >= -126.f;
  return (Vector)(scaled & normal);
}

float largest(const float* x, int size) {
  Vector most = load(x);
  for (int j = LANES; j < size; j += LANES) {
    Vector y = load(x + j);
    most = y > most ? y : most;
  }
  float result = most[0];
  for (int i = 1; i < LANES; i++) result = std::max(result, most[i]);
  return result;
}

float sum_of(Vector v) {
  float sum = v[0];
  for (int i = 1; i < LANES; i++) sum += v[i];
  return sum;
}

void multiply(float* x, int size, float factor) {
  for (int j = 0; j < size; j += LANES) store(x + j, load(x + j) * factor);
}

// ---- Threads

// Calls work(task) for each task, here and in threads of the pool. Only tasks that have begun are waited for.
template <typename Work>
void parallel(ffi::ThreadPool& pool, int64_t tasks, Work work) {
  struct State {
    std::atomic<int64_t> next{0}, done{0};
    std::mutex mutex;
    std::condition_variable all;
  };
  auto state = std::make_shared<State>();
  auto run = [state, tasks, work] {
    for (int64_t i; (i = state->next++) < tasks;) {
      work(i);
      if (++state->done == tasks) {
        std::lock_guard<std::mutex> lock(state->mutex);
        state->all.notify_all();
      }
    }
  };
  int64_t helpers = std::min<int64_t>(pool.num_threads(), tasks) - 1;
  for (int64_t i = 0; i < helpers; i++) pool.Schedule([run] { run(); });
  run();
  std::unique_lock<std::mutex> lock(state->mutex);
  state->all.wait(lock, [&] { return state->done == tasks; });
}

// ---- Custom calls

using Floats = ffi::Buffer<ffi::F32>;
using Indices = ffi::Buffer<ffi::S32>;
using Result = ffi::ResultBuffer<ffi::F32>;

}  // namespace
