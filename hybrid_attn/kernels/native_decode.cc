// Attention of one query for each request to a cache, in float32 on a CPU: an XLA custom call of native.py.
//
// The time is that of reading the cache. A task reads a part of the slots of a key/value head once, for all of its query heads;
// the results of the parts are merged by their largest scores.

#include "native.h"

namespace {

constexpr int SLOTS = 64, PART = 2048;  // of a tile, whose keys stay in the L1 cache, and of a task

struct Decode {
  int64_t K, G, S, H;  // key/value heads, query heads of each, slots, head size
  int64_t visible_heads;  // 1, or K
  float scale;
  const float *q_BKGH, *k_BKSH, *v_BKSH;
  const bool* visible_BKS;
  float *o_PGH, *max_PG, *sum_PG;  // of each task

  int64_t parts() const { return (S + PART - 1) / PART; }

  void operator()(int64_t task) const {
    int64_t bk = task / parts(), first = task % parts() * PART, end = std::min(first + PART, S);
    const bool* visible = visible_BKS + (visible_heads == 1 ? bk / K : bk) * S;
    float *o = o_PGH + task * G * H, *max = max_PG + task * G, *sum = sum_PG + task * G;
    std::fill_n(o, G * H, 0.f), std::fill_n(max, G, -INFINITY), std::fill_n(sum, G, 0.f);
    std::vector<float> s(G * SLOTS);
    for (int64_t slot = first; slot < end; slot += SLOTS) {
      int slots = std::min<int64_t>(SLOTS, end - slot);
      if (std::none_of(visible + slot, visible + slot + slots, [](bool x) { return x; })) continue;
      scores(q_BKGH + bk * G * H, k_BKSH + (bk * S + slot) * H, visible + slot, slots, s.data());
      for (int64_t g = 0; g < G; g++) softmax(&s[g * SLOTS], &max[g], &sum[g], o + g * H);
      product<true>({s.data(), SLOTS, 1}, v_BKSH + (bk * S + slot) * H, H, o, H, G, H, slots);
    }
  }

  void scores(const float* q, const float* k, const bool* visible, int slots, float* s) const {
    for (int64_t g = 0; g < G; g++)
      for (int i = 0; i < SLOTS; i++) {
        Vector sums{};
        if (i < slots && visible[i])
          for (int64_t h = 0; h < H; h += LANES) sums += load(q + g * H + h) * load(k + i * H + h);
        s[g * SLOTS + i] = i < slots && visible[i] ? scale * LOG2E * sum_of(sums) : -INFINITY;
      }
  }

  void softmax(float* s, float* max, float* sum, float* o) const {
    float before = *max, now = std::max(before, largest(s, SLOTS)), decay = std::exp2(before - now);
    Vector total{};
    for (int i = 0; i < SLOTS; i += LANES) {
      Vector p = exp2(load(s + i) - now);
      total += p, store(s + i, p);
    }
    *max = now, *sum = decay * *sum + sum_of(total);
    if (decay != 1.f) multiply(o, H, decay);
  }

  // The parts of a query head as one: its output and its log-sum-exp, zeros and -infinity where it sees nothing.
  void merge(int64_t bkg, float* o_BKGH, float* lse_BKG) const {
    int64_t bk = bkg / G, g = bkg % G;
    float *o = o_BKGH + bkg * H, most = -INFINITY, total = 0;
    auto row = [&](int64_t part) { return (bk * parts() + part) * G + g; };
    for (int64_t part = 0; part < parts(); part++) most = std::max(most, max_PG[row(part)]);
    std::fill_n(o, H, 0.f);
    for (int64_t part = 0; part < parts() && most > -INFINITY; part++) {
      float share = std::exp2(max_PG[row(part)] - most);
      total += share * sum_PG[row(part)];
      for (int64_t h = 0; h < H; h++) o[h] += share * o_PGH[row(part) * H + h];
    }
    lse_BKG[bkg] = total > 0 ? most / LOG2E + std::log(total) : -INFINITY;
    if (total > 0) multiply(o, H, 1 / total);
  }
};

ffi::Error decode(ffi::ThreadPool pool, float scale, Floats q, Floats k, Floats v, ffi::Buffer<ffi::PRED> visible, Result o,
                  Result lse) {
  auto z = k.dimensions();
  int64_t heads = z[0] * z[1], G = q.dimensions()[2], H = z[3];
  Decode work{z[1], G, z[2], H, visible.dimensions()[1], scale, q.typed_data(), k.typed_data(), v.typed_data(), visible.typed_data()};
  int64_t tasks = heads * work.parts();
  std::vector<float> partial(tasks * G * (H + 2));
  work.o_PGH = partial.data(), work.max_PG = work.o_PGH + tasks * G * H, work.sum_PG = work.max_PG + tasks * G;
  parallel(pool, tasks, work);
  for (int64_t bkg = 0; bkg < heads * G; bkg++) work.merge(bkg, o->typed_data(), lse->typed_data());
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(attention_decode, decode,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Attr<float>("scale").Arg<Floats>().Arg<Floats>()
                                  .Arg<Floats>().Arg<ffi::Buffer<ffi::PRED>>().Ret<Floats>().Ret<Floats>());
