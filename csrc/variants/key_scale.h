#pragma once

#include "../attention_call.h"

namespace pagedkv {

/// Keys stored as integers or small floats: the product with a key is multiplied by the key's own scale.
struct KeyScale {
  static bool used(const Call& call) { return call.key_scales.start != nullptr; }

  KeyScale(const Call&, const RowAt& row) : scales_(row.key_scales) {}

  Vec operator()(Vec logit, int token) const { return mul(logit, load(scales_ + token)); }

 private:
  const float* scales_;
};

}  // namespace pagedkv
