#pragma once

#include "../attention_call.h"

namespace pagedkv {

/// c * tanh(logit / c): logits stay within (-c, c).
struct SoftCap {
  static bool used(const Call& call) { return call.rule.soft_cap > 0; }

  SoftCap(const Call& call, const RowAt&) : cap_(broadcast(call.rule.soft_cap)) {}

  Vec operator()(Vec logit, int) const { return mul(cap_, tanh(div(logit, cap_))); }

 private:
  Vec cap_;
};

}  // namespace pagedkv
