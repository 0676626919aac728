#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/map.h>
#include <tvm/ffi/function.h>

#include <algorithm>
#include <atomic>

#include "radix_tree.h"
#include "tensor.h"

namespace pagedkv {
namespace {

using tvm::ffi::Array;
using tvm::ffi::Function;
using tvm::ffi::Map;
using tvm::ffi::Optional;
using tvm::ffi::String;

/// Where calls leave what is more than one number; native_radix_tree.py names the same places.
enum State { kNumCached, kNumEvictable, kEmptyRoot, kNode, kVersion, kNumTokens, kParentPage, kRoot, kStateSize };

/// What a call gives for arrays that Python must look at: it converts what can be, and says what is wrong with the rest.
constexpr int64_t kOdd = -1;

/// Columns of `describe`; native_radix_tree.py names them too.
constexpr int64_t kNumColumns = 12;

struct Tree {
  RadixTree tree;
  int64_t* state;
  std::vector<int32_t> pages;
  std::atomic<bool> is_busy{false};

  void leave(RadixTreeHandle handle) {
    state[kNode] = handle.node;
    state[kVersion] = handle.version;
    state[kNumTokens] = handle.num_tokens;
  }
};

/// One call: nobody else is in the tree, and the counters are right at its end.
class Turn {
 public:
  explicit Turn(Tree& tree) : tree_(tree) {
    if (tree.is_busy.exchange(true))
      TVM_FFI_THROW(RuntimeError) << "a RadixCache must be used by one thread at a time, got a call during another. "
                                     "Hold a lock.";
  }
  ~Turn() {
    tree_.state[kNumCached] = tree_.tree.num_cached();
    tree_.state[kNumEvictable] = tree_.tree.num_evictable();
    tree_.state[kEmptyRoot] = tree_.tree.empty_root();
    tree_.is_busy = false;
  }

 private:
  Tree& tree_;
};

/// Whether a tensor is a plain array of 32 or 64 bit integers in memory that can be read as it lies.
bool is_plain(const TensorView& tensor) {
  if (tensor.ndim() != 1 || tensor.device().device_type != kDLCPU) return false;
  if (!is_dtype(tensor, kDLInt, 32) && !is_dtype(tensor, kDLInt, 64)) return false;
  if (tensor.numel() == 0) return true;
  if (tensor.numel() > 1 && tensor.strides()[0] != 1) return false;
  return reinterpret_cast<uintptr_t>(data<char>(tensor)) % static_cast<uintptr_t>(item_bytes(tensor)) == 0;
}

TokenSpan checked_tokens(const TensorView& tensor) {
  const TokenSpan span{data<char>(tensor), is_dtype(tensor, kDLInt, 64), tensor.numel()};
  with_tokens(span.start, span.is_wide, [&](const auto* ids) {
    std::remove_cv_t<std::remove_reference_t<decltype(*ids)>> bits = 0;
    for (int64_t i = 0; i < span.count; ++i) bits |= ids[i];
    for (int64_t i = 0; bits < 0; ++i) {
      if (ids[i] < 0) TVM_FFI_THROW(ValueError) << "token_ids must be 0 or more, got " << ids[i] << " at position " << i << ".";
    }
  });
  return span;
}

const int32_t* checked_pages(Tree& self, const TensorView& tensor, int64_t num_tokens) {
  const int64_t count = num_tokens / self.tree.page_size();
  if (tensor.numel() != count)
    TVM_FFI_THROW(ValueError) << "pages must have shape [" << count << "] for " << num_tokens << " tokens (page_size "
                              << self.tree.page_size() << "), got [" << tensor.numel() << "].";
  if (count == 0) return nullptr;
  return with_tokens(data<char>(tensor), is_dtype(tensor, kDLInt, 64), [&](const auto* pages) -> const int32_t* {
    auto least = pages[0], most = pages[0];
    for (int64_t i = 1; i < count; ++i) {
      least = std::min(least, pages[i]);
      most = std::max(most, pages[i]);
    }
    if (least < 0 || most >= INT32_MAX)
      TVM_FFI_THROW(ValueError) << "pages must be in 0..2**31 - 2, got " << least << ".." << most << ".";
    if constexpr (sizeof(*pages) == 4) {
      return pages;
    } else {
      self.pages.assign(pages, pages + count);
      return self.pages.data();
    }
  });
}

int64_t leave_growth(Tree& self, const RadixTreeGrowth& growth) {
  self.leave(growth.handle);
  self.state[kParentPage] = growth.parent_page;
  self.state[kRoot] = growth.root;
  return growth.num_cached_pages * self.tree.page_size();
}

int64_t match(Tree& self, int64_t root, const TensorView& ids, const TensorView& pages) {
  const Turn turn(self);
  if (!is_plain(ids)) return kOdd;
  const TokenSpan span = checked_tokens(ids);
  if (pages.numel() < span.count / self.tree.page_size()) TVM_FFI_THROW(ValueError) << "pages must have room for all tokens.";
  const RadixTreeHandle handle = self.tree.match(root, span, data<int32_t>(pages));
  self.leave(handle);
  return handle.num_tokens;
}

int64_t insert(Tree& self, int64_t root, const TensorView& ids, const TensorView& pages, bool only_new, int64_t priority) {
  const Turn turn(self);
  if (!is_plain(ids) || !is_plain(pages)) return kOdd;
  const TokenSpan span = checked_tokens(ids);
  return leave_growth(self, self.tree.insert(root, span, checked_pages(self, pages, span.count), only_new, priority));
}

int64_t extend(Tree& self, int64_t node, int64_t version, int64_t num_tokens, const TensorView& ids, const TensorView& pages,
               bool only_new, int64_t priority) {
  const Turn turn(self);
  if (!is_plain(ids) || !is_plain(pages)) return kOdd;
  const TokenSpan span = checked_tokens(ids);
  const int32_t* checked = checked_pages(self, pages, span.count);
  return leave_growth(self, self.tree.extend({node, version, num_tokens}, span, checked, only_new, priority));
}

/// Extends each prefix that ends with a leaf which can grow, and says of each whether it did: those of other prefixes, and of
/// pages that the tree refuses, are left as they are. Shapes: handles [n, 3] int64; tokens, pages: rows of all prefixes, of which
/// the i-th one's begin at token_starts[i], page_starts[i] and have counts[i] pages; priorities [n] int64; grown [n] bool.
void extend_leaves(Tree& self, const TensorView& handles, const TensorView& tokens, const TensorView& token_starts,
                   const TensorView& pages, const TensorView& page_starts, const TensorView& counts,
                   const TensorView& priorities, const TensorView& grown) {
  const Turn turn(self);
  const bool is_wide = is_dtype(tokens, kDLInt, 64);
  const int64_t page_size = self.tree.page_size();
  struct Row {
    int64_t token, page, num_pages;
  };
  const auto row_of = [&](int64_t i) -> Row {
    return {data<int64_t>(token_starts)[i], data<int64_t>(page_starts)[i], data<int64_t>(counts)[i]};
  };
  // All rows before the first leaf grows.
  for (int64_t i = 0; i < counts.numel(); ++i) {
    const auto [token, page, num_pages] = row_of(i);
    if (num_pages < 0 || token < 0 || token + num_pages * page_size > tokens.numel() || page < 0 ||
        page + num_pages > pages.numel())
      TVM_FFI_THROW(ValueError) << "rows must lie in tokens and pages, got row " << i << " of " << num_pages << " pages.";
  }
  for (int64_t i = 0; i < counts.numel(); ++i) {
    const auto [token, page, num_pages] = row_of(i);
    const int64_t* handle_row = data<int64_t>(handles) + 3 * i;
    const RadixTreeHandle handle{handle_row[0], handle_row[1], handle_row[2]};
    data<bool>(grown)[i] = false;
    if (!self.tree.ends_growing_leaf(handle)) continue;
    const TokenSpan span{data<char>(tokens) + token * item_bytes(tokens), is_wide, num_pages * page_size};
    try {
      self.tree.extend(handle, span, data<int32_t>(pages) + page, true, data<int64_t>(priorities)[i]);
      data<bool>(grown)[i] = true;
    } catch (const tvm::ffi::Error&) {
      // Whoever extends this one alone is told why.
    }
  }
}

/// One row a node: its numbers in the order of kNumColumns columns.
void describe(Tree& self, const TensorView& rows) {
  int64_t* row = data<int64_t>(rows);
  for (int32_t id : self.tree.nodes()) {
    const RadixTreeNode& node = self.tree.node(id);
    const int64_t columns[kNumColumns] = {id,           node.parent,      node.run.num_pages(), node.locks,    node.anchors,
                                          node.version, node.created,     node.last_access,     node.num_hits, node.priority,
                                          self.tree.queued_serial(id), node.run.num_bytes(self.tree.page_size())};
    row = std::copy(columns, columns + kNumColumns, row);
  }
}

void copy_run(Tree& self, int64_t id, const TensorView& tokens, const TensorView& pages) {
  const PageRun& run = self.tree.node(id).run;
  std::copy(run.pages(), run.pages() + run.num_pages(), data<int32_t>(pages));
  with_tokens(run.tokens(), run.is_wide(), [&](const auto* ids) {
    std::copy(ids, ids + run.num_pages() * self.tree.page_size(), data<int64_t>(tokens));
  });
}

RadixTree::LongRank long_rank(const Optional<Function>& function) {
  if (!function.has_value()) return nullptr;
  return [rank = function.value()](int64_t num_pages, int64_t created, int64_t last_access, int64_t num_hits,
                                   int64_t priority) {
    std::vector<double> numbers;
    try {
      const auto answer = rank(num_pages, created, last_access, num_hits, priority).cast<Array<double>>();
      numbers.assign(answer.begin(), answer.end());
    } catch (...) {
      // The function keeps what it raised; the tree goes on without an answer, so that no call stops halfway.
    }
    return numbers;
  };
}

template <typename F>
void add_call(Map<String, Function>& calls, const char* name, F call) {
  calls.Set(name, Function::FromTyped(std::move(call)));
}

}  // namespace

/// A radix tree as the functions on it, which keep it alive: pages of `page_size` tokens, evicted in the order of that number.
/// long_rank is called by the last of them alone. What is more than one number is left in `state`. Handles have versions of
/// `first_version` or more.
Map<String, Function> make_radix_tree(int64_t page_size, int64_t order, Optional<Function> long_rank_function,
                                      int64_t first_version, TensorView state) {
  if (state.numel() != kStateSize) TVM_FFI_THROW(ValueError) << "state must have shape [" << int(kStateSize) << "].";
  const std::shared_ptr<Tree> self(
      new Tree{{page_size, static_cast<EvictionOrder>(order), long_rank(long_rank_function), first_version},
               data<int64_t>(state),
               {}});
  Map<String, Function> calls;
  add_call(calls, "match", [self](int64_t root, TensorView ids, TensorView pages) { return match(*self, root, ids, pages); });
  add_call(calls, "insert", [self](int64_t root, TensorView ids, TensorView pages, bool only_new, int64_t priority) {
    return insert(*self, root, ids, pages, only_new, priority);
  });
  add_call(calls, "extend", [self](int64_t node, int64_t version, int64_t num_tokens, TensorView ids, TensorView pages,
                                   bool only_new, int64_t priority) {
    return extend(*self, node, version, num_tokens, ids, pages, only_new, priority);
  });
  add_call(calls, "extend_leaves",
           [self](TensorView handles, TensorView tokens, TensorView token_starts, TensorView pages, TensorView page_starts,
                  TensorView counts, TensorView priorities, TensorView grown) {
             extend_leaves(*self, handles, tokens, token_starts, pages, page_starts, counts, priorities, grown);
           });
  add_call(calls, "lock", [self](int64_t node, int64_t version, int64_t num_tokens) {
    const Turn turn(*self);
    self->tree.lock({node, version, num_tokens});
  });
  add_call(calls, "unlock", [self](int64_t node, int64_t version, int64_t num_tokens) {
    const Turn turn(*self);
    self->tree.unlock({node, version, num_tokens});
  });
  add_call(calls, "ancestor", [self](int64_t node, int64_t version, int64_t num_tokens, int64_t wanted) {
    const Turn turn(*self);
    self->leave(self->tree.ancestor({node, version, num_tokens}, wanted));
  });
  add_call(calls, "copy_tokens", [self](int64_t node, int64_t version, int64_t num_tokens, int64_t start, TensorView tokens) {
    const Turn turn(*self);
    self->tree.copy_tokens({node, version, num_tokens}, start, data<int64_t>(tokens), tokens.numel());
  });
  add_call(calls, "evict", [self](TensorView pages) {
    const Turn turn(*self);
    return self->tree.evict(pages.numel(), data<int32_t>(pages));
  });
  add_call(calls, "held_pages", [self](TensorView pages) {
    if (pages.numel() < self->tree.num_cached()) TVM_FFI_THROW(ValueError) << "pages must have room for all of them.";
    self->tree.held_pages(data<int32_t>(pages));
  });
  add_call(calls, "holds", [self](TensorView pages, TensorView answers) {
    for (int64_t i = 0; i < pages.numel(); ++i) data<bool>(answers)[i] = self->tree.holds(data<int64_t>(pages)[i]);
  });
  add_call(calls, "held_mask", [self](TensorView answers) {
    for (int64_t i = 0; i < answers.numel(); ++i) data<bool>(answers)[i] = self->tree.holds(i);
  });
  add_call(calls, "add_root", [self]() {
    const Turn turn(*self);
    return int64_t{self->tree.add_root()};
  });
  add_call(calls, "drop_root", [self](int64_t root) {
    const Turn turn(*self);
    self->tree.drop_root(root);
  });
  add_call(calls, "num_nodes", [self]() { return static_cast<int64_t>(self->tree.nodes().size()); });
  add_call(calls, "num_bytes", [self]() { return self->tree.num_bytes(); });
  add_call(calls, "describe", [self](TensorView rows) { describe(*self, rows); });
  add_call(calls, "copy_run", [self](int64_t id, TensorView tokens, TensorView pages) { copy_run(*self, id, tokens, pages); });
  add_call(calls, "defect", [self]() { return String(self->tree.defect()); });
  return calls;
}

/// How many leading tokens of two arrays are equal, or kOdd for arrays that Python must look at.
int64_t common_prefix_len(TensorView a, TensorView b) {
  if (!is_plain(a) || !is_plain(b) || item_bytes(a) != item_bytes(b)) return kOdd;
  const int64_t count = std::min(a.numel(), b.numel());
  return with_tokens(data<char>(a), is_dtype(a, kDLInt, 64), [&](const auto* left) {
    return common_prefix(left, reinterpret_cast<decltype(left)>(data<char>(b)), count);
  });
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(make_radix_tree, make_radix_tree);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(common_prefix_len, common_prefix_len);

}  // namespace pagedkv
