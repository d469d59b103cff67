// Attention in float32 on a CPU, forward and backward ("FlashAttention", arXiv 2205.14135): the XLA custom calls of native.py.
//
// A query sees the keys first <= s < end. A block of 64 queries loops over tiles of 384 keys, whose scores stay in the L2 cache.
// Scores are computed for six queries at a time, and only for vectors of keys of which at least one of the six sees a key.
// Every product is `product`, whose inner loop keeps 6 rows by 4 vectors of sums in registers, as many as AVX-512 has. Keys, and
// in the backward pass values too, come transposed, in panels of 64 keys: [B, K, panels, H, 64], padded with zeros.

#include "native.h"

namespace {

constexpr int PANEL = 64, QUERIES = 64, KEYS = 384;
constexpr int STRIDE = KEYS + 16;  // of a row of scores: rows a power of two apart would share few sets of the cache

// ---- Blocks and tiles

struct Sizes {  // batch, query heads, key/value heads, queries, keys, head size
  int64_t B, N, K, T, S, H;
  int64_t groups() const { return N / K; }
  int64_t blocks() const { return (T + QUERIES - 1) / QUERIES; }
  int64_t padded() const { return (S + PANEL - 1) / PANEL * PANEL; }
};

struct Range {
  int from, to;
};

struct Tile {  // keys from `first` on: `keys` of them, of whole panels, of which the sequence has `real`
  int64_t first;
  int keys, real;
  Range seen[(QUERIES + ROWS - 1) / ROWS];  // for each ROWS queries: the keys that at least one of them sees, widened to whole vectors
};

struct Block {  // queries from `start` on of a sequence, and what they see: keys from `begin`, the start of a panel, to `end`
  int64_t start, begin, end, S;
  int queries;
  const int32_t *firsts, *ends;

  Block(const Sizes& z, int64_t b, int64_t index, const int32_t* first_BT, const int32_t* end_BT) {
    start = index * QUERIES, queries = std::min<int64_t>(QUERIES, z.T - start), S = z.S;
    firsts = first_BT + b * z.T + start, ends = end_BT + b * z.T + start;
    begin = S, end = 0;
    for (int i = 0; i < queries; i++)
      if (firsts[i] < ends[i]) begin = std::min<int64_t>(begin, firsts[i]), end = std::max<int64_t>(end, ends[i]);
    begin = begin / PANEL * PANEL;
  }
  Tile tile(int64_t first) const {
    int keys = std::min<int64_t>(KEYS, (end - first + PANEL - 1) / PANEL * PANEL);
    Tile t{first, keys, (int)std::min<int64_t>(keys, S - first)};
    for (int i = 0; i < queries; i += ROWS) {
      Range all{keys, 0};
      for (int query = i; query < std::min(i + ROWS, queries); query++) {
        auto [from, to] = visible(t, query, {0, keys});
        if (from < to) all = {std::min(all.from, from), std::max(all.to, to)};
      }
      t.seen[i / ROWS] = {std::min(all.from, all.to) / LANES * LANES, (all.to + LANES - 1) / LANES * LANES};
    }
    return t;
  }
  Range visible(const Tile& t, int query, Range within) const {
    int from = std::clamp<int64_t>(firsts[query] - t.first, within.from, within.to);
    return {from, (int)std::clamp<int64_t>(ends[query] - t.first, from, within.to)};
  }
  // Scores of one head, `panels` those of its keys (or of its values, for the gradients of probabilities).
  void scores(const Tile& t, const float* rows, const float* panels, int H, float* s) const {
    for (int j = 0; j < t.keys; j += PANEL)
      for (int i = 0; i < queries; i += ROWS) {
        int from = std::max(j, t.seen[i / ROWS].from), to = std::min(j + PANEL, t.seen[i / ROWS].to);
        if (from < to)
          product<false>({rows + i * H, H, 1}, panels + (t.first + j) * H + from - j, PANEL, s + i * STRIDE + from, STRIDE,
                         std::min(ROWS, queries - i), to - from, H);
      }
  }
  void mask(const Tile& t, int query, float* s) const {
    auto [first, last] = t.seen[query / ROWS];
    auto [from, to] = visible(t, query, {first, last});
    std::fill(s + first, s + from, -INFINITY), std::fill(s + to, s + last, -INFINITY);
  }
  // sums[queries, H] += s[queries, keys] x[keys, H]
  void add(const Tile& t, const float* s, const float* x, int H, float* sums) const {
    for (int i = 0; i < queries; i += ROWS) {
      auto [from, to] = t.seen[i / ROWS];
      product<true>({s + i * STRIDE + from, STRIDE, 1}, x + from * H, H, sums + i * H, H, std::min(ROWS, queries - i), H,
                    std::min(to, t.real) - from);
    }
  }
};

// ---- Forward

struct Forward {
  Sizes z;
  float scale;
  const float *q_BNTH, *panels, *v_BKSH;
  const int32_t *first_BT, *end_BT;
  float *o_BNTH, *lse_BNT;

  // The online softmax of a query: its scores become probabilities times 2^-max; sum and o are those of all tiles so far.
  void softmax(float* s, int keys, float* max, float* sum, float* o) const {
    if (keys == 0) return;
    float before = *max, now = std::max(before, scale * LOG2E * largest(s, keys));
    if (now == -INFINITY) return std::fill(s, s + keys, 0.f);
    Vector total{};
    for (int j = 0; j < keys; j += LANES) {
      Vector p = exp2(load(s + j) * (scale * LOG2E) - now);
      total += p, store(s + j, p);
    }
    float decay = std::exp2(before - now);
    *max = now, *sum = decay * *sum + sum_of(total);
    if (decay != 1.f) multiply(o, z.H, decay);
  }

  void operator()(int64_t task) const {  // the queries of a block in all heads that share a key/value head; the last block first
    int64_t bk = task / z.blocks(), first_head = bk * z.groups();
    Block block(z, bk / z.K, z.blocks() - 1 - task % z.blocks(), first_BT, end_BT);
    std::vector<float> s(QUERIES * STRIDE), max(z.groups() * QUERIES, -INFINITY), sum(z.groups() * QUERIES);
    auto row = [&](int64_t g, int i) { return (first_head + g) * z.T + block.start + i; };
    for (int64_t g = 0; g < z.groups(); g++) std::fill_n(o_BNTH + row(g, 0) * z.H, block.queries * z.H, 0.f);
    for (int64_t first = block.begin; first < block.end; first += KEYS) {
      Tile t = block.tile(first);
      const float* v = v_BKSH + (bk * z.S + first) * z.H;
      for (int64_t g = 0; g < z.groups(); g++) {
        float* o = o_BNTH + row(g, 0) * z.H;
        block.scores(t, q_BNTH + row(g, 0) * z.H, panels + bk * z.padded() * z.H, z.H, s.data());
        for (int i = 0; i < block.queries; i++) {
          auto [from, to] = t.seen[i / ROWS];
          block.mask(t, i, &s[i * STRIDE]);
          softmax(&s[i * STRIDE + from], to - from, &max[g * QUERIES + i], &sum[g * QUERIES + i], o + i * z.H);
        }
        block.add(t, s.data(), v, z.H, o);
      }
    }
    for (int64_t g = 0; g < z.groups(); g++)
      for (int i = 0; i < block.queries; i++) {
        float total = sum[g * QUERIES + i];
        lse_BNT[row(g, i)] = total > 0 ? max[g * QUERIES + i] / LOG2E + std::log(total) : -INFINITY;
        if (total > 0) multiply(o_BNTH + row(g, i) * z.H, z.H, 1 / total);
      }
  }
};

// ---- Backward

struct Backward {
  Sizes z;
  int64_t parts;
  float scale;
  const float *q_BNTH, *k_BKSH, *k_panels, *v_panels, *do_BNTH, *lse_BNT, *shift_BNT;
  const int32_t *first_BT, *end_BT;
  float *dq_BNTH, *dk_BKSH, *dv_BKSH, *more;  // `more`: dk, then dv, of the heads of each part after the first

  int64_t size() const { return z.B * z.K * z.S * z.H; }
  float* sums_of(int64_t part, bool of_v) const {
    return part ? more + (2 * (part - 1) + of_v) * size() : of_v ? dv_BKSH : dk_BKSH;
  }

  void gradients(const Block& block, const Tile& t, int64_t head, int64_t bk, float* dk, float* dv, float* s, float* ds) const {
    int64_t row = head * z.T + block.start, panels = bk * z.padded() * z.H;
    const float *q = q_BNTH + row * z.H, *dout = do_BNTH + row * z.H, *k = k_BKSH + (bk * z.S + t.first) * z.H;
    block.scores(t, q, k_panels + panels, z.H, s);
    block.scores(t, dout, v_panels + panels, z.H, ds);
    for (int i = 0; i < block.queries; i++) {
      float *p = s + i * STRIDE, *dp = ds + i * STRIDE, lse = LOG2E * lse_BNT[row + i], shift = shift_BNT[row + i];
      auto [from, to] = t.seen[i / ROWS];
      block.mask(t, i, p);
      for (float* x : {p, dp}) std::fill(x, x + from, 0.f), std::fill(x + to, x + t.keys, 0.f);
      for (int j = from; j < to; j += LANES) {
        Vector x = exp2(load(p + j) * (scale * LOG2E) - (std::isfinite(lse) ? lse : 0.f));
        store(p + j, x), store(dp + j, scale * x * (load(dp + j) - shift));
      }
    }
    product<true>({s, 1, STRIDE}, dout, z.H, dv, z.H, t.real, z.H, block.queries);
    product<true>({ds, 1, STRIDE}, q, z.H, dk, z.H, t.real, z.H, block.queries);
    block.add(t, ds, k, z.H, dq_BNTH + row * z.H);
  }

  void operator()(int64_t task) const {  // every so many blocks of the heads that share a key/value head
    int64_t part = task / (z.B * z.K), bk = task % (z.B * z.K), keys = bk * z.S * z.H;
    float *dk = sums_of(part, false) + keys, *dv = sums_of(part, true) + keys;
    std::fill_n(dk, z.S * z.H, 0.f), std::fill_n(dv, z.S * z.H, 0.f);
    std::vector<float> s(QUERIES * STRIDE), ds(QUERIES * STRIDE);
    for (int64_t index = part; index < z.blocks(); index += parts) {
      Block block(z, bk / z.K, index, first_BT, end_BT);
      for (int64_t head = bk * z.groups(); head < (bk + 1) * z.groups(); head++) {
        std::fill_n(dq_BNTH + (head * z.T + block.start) * z.H, block.queries * z.H, 0.f);
        for (int64_t first = block.begin; first < block.end; first += KEYS)
          gradients(block, block.tile(first), head, bk, dk + first * z.H, dv + first * z.H, s.data(), ds.data());
      }
    }
  }

  void add_parts() const {
    for (int64_t part = 1; part < parts; part++)
      for (bool of_v : {false, true})
        for (int64_t i = 0; i < size(); i++) sums_of(0, of_v)[i] += sums_of(part, of_v)[i];
  }
};

// ---- Custom calls

Sizes sizes(const Floats& q_BNTH, const Floats& x_BKSH) {
  auto q = q_BNTH.dimensions(), x = x_BKSH.dimensions();
  return {q[0], q[1], x[1], q[2], x[2], q[3]};
}

ffi::Error forward(ffi::ThreadPool pool, float scale, Floats q, Floats k_panels, Floats v, Indices first, Indices end, Result o,
                   Result lse) {
  Sizes z = sizes(q, v);
  parallel(pool, z.B * z.K * z.blocks(),
           Forward{z, scale, q.typed_data(), k_panels.typed_data(), v.typed_data(), first.typed_data(), end.typed_data(),
                   o->typed_data(), lse->typed_data()});
  return ffi::Error::Success();
}

ffi::Error backward(ffi::ThreadPool pool, float scale, Floats q, Floats k, Floats k_panels, Floats v_panels, Floats dout,
                    Floats lse, Floats shift, Indices first, Indices end, Result dq, Result dk, Result dv) {
  Sizes z = sizes(q, k);
  int64_t heads = z.B * z.K, parts = std::clamp<int64_t>((pool.num_threads() + heads - 1) / std::max<int64_t>(heads, 1), 1, z.blocks());
  std::vector<float> more(2 * (parts - 1) * heads * z.S * z.H);
  Backward work{z, parts, scale, q.typed_data(), k.typed_data(), k_panels.typed_data(), v_panels.typed_data(), dout.typed_data(),
                lse.typed_data(), shift.typed_data(), first.typed_data(), end.typed_data(), dq->typed_data(), dk->typed_data(),
                dv->typed_data(), more.data()};
  parallel(pool, heads * parts, work);
  work.add_parts();
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(attention_forward, forward,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Attr<float>("scale").Arg<Floats>().Arg<Floats>()
                                  .Arg<Floats>().Arg<Indices>().Arg<Indices>().Ret<Floats>().Ret<Floats>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(attention_backward, backward,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Attr<float>("scale").Arg<Floats>().Arg<Floats>()
                                  .Arg<Floats>().Arg<Floats>().Arg<Floats>().Arg<Floats>().Arg<Floats>().Arg<Indices>()
                                  .Arg<Indices>().Ret<Floats>().Ret<Floats>().Ret<Floats>());

// Whether the processor has the instructions that this file was compiled to.
extern "C" bool attention_runs_here() {
#if defined(__AVX512F__)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#elif defined(__AVX2__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return true;
#endif
}
