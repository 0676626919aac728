#pragma once

#include "../attention_call.h"

namespace pagedkv {

/// Adds slope * (key position - row position); each query head has its slope.
struct Alibi {
  static bool used(const Call& call) { return call.alibi_slopes != nullptr; }

  Alibi(const Call& call, const RowAt& row)
      : slope_(broadcast(call.alibi_slopes[row.query_head])), start_(static_cast<float>(row.chunk_start - row.position)) {
    float lanes[Vec::kLanes];
    for (int i = 0; i < Vec::kLanes; ++i) lanes[i] = static_cast<float>(i);
    lanes_ = load(lanes);
  }

  Vec operator()(Vec logit, int token) const {
    const Vec distance = add(lanes_, broadcast(start_ + static_cast<float>(token)));
    return add(logit, mul(slope_, distance));
  }

 private:
  Vec slope_, lanes_;
  float start_;
};

}  // namespace pagedkv
