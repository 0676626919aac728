#pragma once

#include "attention_call.h"
#include "variants/alibi.h"
#include "variants/key_scale.h"
#include "variants/soft_cap.h"

#include <algorithm>
#include <array>
#include <tuple>
#include <utility>

/// From the dot products of one row and chunk to weights, through the variants in use: what a logit is besides scale * q.k.
namespace pagedkv {

/// All variants, in the order in which they change a logit. A new one is a file in variants/ and a name here.
using Variants = std::tuple<KeyScale, SoftCap, Alibi>;
constexpr size_t kNumVariants = std::tuple_size_v<Variants>;

/// One variant, switched at compile time.
template <typename Variant, bool kUsed>
struct Switched : Variant {
  using Variant::Variant;
};
template <typename Variant>
struct Switched<Variant, false> {
  Switched(const Call&, const RowAt&) {}
  Vec operator()(Vec logit, int) const { return logit; }
};

template <unsigned kUsed, size_t... kNth>
inline auto switched_variants(const Call& call, const RowAt& row, std::index_sequence<kNth...>) {
  return std::make_tuple(Switched<std::tuple_element_t<kNth, Variants>, (kUsed >> kNth & 1) != 0>(call, row)...);
}

/// Turns the dot products of a chunk into weights exp(logit - highest), in place; tokens not visible get no defined weight.
/// `row.value_scales` multiply the weights but not their sum. The sum adds lane by lane in steps from token 0 of the chunk, so
/// it does not depend on which tokens were computed beside. Bit n of kUsed switches the n-th variant on, the bit above them the
/// table of exponentials.
template <unsigned kUsed>
RowState softmax_chunk(float* scores, const Call& call, const RowView& view, const RowAt& row) {
  constexpr int W = Vec::kLanes;
  if (view.first >= view.last) return {};
  const auto variants = switched_variants<kUsed>(call, row, std::make_index_sequence<kNumVariants>{});
  const int first = view.first & ~(W - 1);
  const Vec scale = broadcast(call.rule.scale), none = broadcast(kNoKey);
  Vec top = none;
  for (int t = first; t < view.last; t += W) {
    Vec x = mul(load(scores + t), scale);
    std::apply([&](const auto&... variant) { ((x = variant(x, t)), ...); }, variants);
    if (t < view.first || t + W > view.last) x = where_lanes(view.first - t, view.last - t, x, none);
    store(scores + t, x);
    if (view.mask) {
      for (int i = std::max(t, view.first); i < std::min(t + W, view.last); ++i)
        if (!view.mask[i]) scores[i] = kNoKey;
      x = load(scores + t);
    }
    top = max(x, top);
  }
  const float highest = reduce_max(top);
  const Vec base = broadcast(highest == kNoKey ? 0.0f : highest);
  Vec sum = zero();
  for (int t = first; t < view.last; t += W) {
    const Vec logit = sub(load(scores + t), base);
    Vec weight;
    if constexpr ((kUsed >> kNumVariants & 1) != 0) {
      weight = exp_by_table(call.exp_table, logit);
    } else {
      weight = exp(logit);
    }
    store(scores + t, row.value_scales ? mul(weight, load(row.value_scales + t)) : weight);
    sum = add(sum, weight);
  }
  return {highest, reduce_add(sum)};
}

using Softmax = RowState (*)(float* scores, const Call& call, const RowView& view, const RowAt& row);

template <unsigned... kUsed>
constexpr std::array<Softmax, sizeof...(kUsed)> all_softmaxes(std::integer_sequence<unsigned, kUsed...>) {
  return {softmax_chunk<kUsed>...};
}

template <size_t... kNth>
inline unsigned variants_in_use(const Call& call, std::index_sequence<kNth...>) {
  return (0u | ... | (std::tuple_element_t<kNth, Variants>::used(call) ? 1u << kNth : 0u));
}

/// The softmax with just the variants that a call uses.
inline Softmax softmax_of(const Call& call) {
  static constexpr auto kAll = all_softmaxes(std::make_integer_sequence<unsigned, 2u << kNumVariants>{});
  const unsigned table = call.exp_table.num_steps > 0 ? 1u << kNumVariants : 0u;
  return kAll[variants_in_use(call, std::make_index_sequence<kNumVariants>{}) | table];
}

}  // namespace pagedkv
