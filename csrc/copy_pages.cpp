#include "moves.h"

#include <vector>

namespace pagedkv {
namespace {

/// One axis inside a page, strides in bytes.
struct Axis {
  int64_t size, src_stride, dst_stride;
};

/// How to walk one page: `axes` outermost first, and under them runs of contiguous bytes on both sides.
struct PageWalk {
  std::vector<Axis> axes;
  int64_t run_bytes;
};

/// The fewest axes and longest runs that the strides of both sides allow, whatever order the dims are in.
PageWalk collapse(std::vector<Axis> axes, int64_t item) {
  axes.erase(std::remove_if(axes.begin(), axes.end(), [](const Axis& axis) { return axis.size == 1; }), axes.end());
  std::stable_sort(axes.begin(), axes.end(), [](const Axis& a, const Axis& b) { return a.dst_stride > b.dst_stride; });
  PageWalk walk{{}, item};
  for (size_t i = axes.size(); i-- > 0;) {
    const Axis& axis = axes[i];
    if (walk.axes.empty() && axis.src_stride == walk.run_bytes && axis.dst_stride == walk.run_bytes) {
      walk.run_bytes *= axis.size;
      continue;
    }
    if (!walk.axes.empty()) {
      Axis& inner = walk.axes.front();
      if (axis.src_stride == inner.size * inner.src_stride && axis.dst_stride == inner.size * inner.dst_stride) {
        inner.size *= axis.size;
        continue;
      }
    }
    walk.axes.insert(walk.axes.begin(), axis);
  }
  // Long runs become pieces, so that threads share one big page too.
  constexpr int64_t kPiece = int64_t{1} << 16;
  if (walk.axes.empty() && walk.run_bytes > kPiece && walk.run_bytes % kPiece == 0) {
    walk.axes.push_back({walk.run_bytes / kPiece, kPiece, kPiece});
    walk.run_bytes = kPiece;
  }
  return walk;
}

void copy_axes(char* dst, const char* src, const Axis* axis, const Axis* end, int64_t run_bytes, bool streamed) {
  if (axis == end) {
    copy_run(dst, src, run_bytes, streamed);
    return;
  }
  for (int64_t i = 0; i < axis->size; ++i) {
    copy_axes(dst + i * axis->dst_stride, src + i * axis->src_stride, axis + 1, end, run_bytes, streamed);
  }
}

/// Where page number i of the work is on one side.
struct PageAddress {
  char* start;
  int64_t page_stride;
  const Indices* ids;  // none: pages lie in order

  char* at(int64_t i) const { return start + (ids == nullptr ? i : (*ids)[i]) * page_stride; }
};

void copy_all(const PageAddress& dst, const PageAddress& src, int64_t count, int64_t page_bytes, const PageWalk& walk,
              int64_t num_threads) {
  const int64_t num_bytes = count * page_bytes;
  const bool streamed = num_bytes >= kStreamedBytes;
  // Threads share (page, index of the outermost axis).
  const Axis outer = walk.axes.empty() ? Axis{1, 0, 0} : walk.axes.front();
  const Axis* end = walk.axes.data() + walk.axes.size();
  const Axis* inner = walk.axes.empty() ? end : walk.axes.data() + 1;
#pragma omp parallel num_threads(num_workers(num_bytes, num_threads))
  {
#pragma omp for schedule(static)
    for (int64_t unit = 0; unit < count * outer.size; ++unit) {
      const int64_t i = unit / outer.size, j = unit - i * outer.size;
      copy_axes(dst.at(i) + j * outer.dst_stride, src.at(i) + j * outer.src_stride, inner, end, walk.run_bytes, streamed);
    }
    end_stream(streamed);
  }
}

void check_range(const char* name, const Indices& ids, int64_t num_pages, const char* owner) {
  for (int64_t i = 0; i < ids.count; ++i) {
    if (ids[i] >= 0 && ids[i] < num_pages) continue;
    TVM_FFI_THROW(ValueError) << name << " must be in [0, " << num_pages << ") (the pages of " << owner << "), got "
                              << ids[i] << " at entry " << i << ".";
  }
}

/// Refuses what has no order: a page named twice in dst, or, within one tensor, in dst and in src.
void check_order(const Indices& src, const Indices& dst, bool one_tensor) {
  std::vector<std::pair<int64_t, int64_t>> written(static_cast<size_t>(dst.count));
  for (int64_t i = 0; i < dst.count; ++i) written[i] = {dst[i], i};
  std::sort(written.begin(), written.end());
  int64_t twice = -1;  // the earliest entry that repeats one before it, as a reader would find it
  for (int64_t i = 1; i < dst.count; ++i) {
    if (written[i].first == written[i - 1].first && (twice < 0 || written[i].second < twice)) twice = written[i].second;
  }
  if (twice >= 0) {
    TVM_FFI_THROW(ValueError) << "dst must name each page once, got page " << dst[twice] << " again at entry " << twice << ".";
  }
  if (!one_tensor) return;
  std::vector<int64_t> read(static_cast<size_t>(src.count));
  for (int64_t i = 0; i < src.count; ++i) read[i] = src[i];
  std::sort(read.begin(), read.end());
  for (int64_t i = 0; i < dst.count; ++i) {
    if (!std::binary_search(read.begin(), read.end(), dst[i])) continue;
    TVM_FFI_THROW(ValueError) << "dst must not name a page of src within one tensor, got page " << dst[i] << " in both.";
  }
}

bool is_same_memory(const TensorView& a, const TensorView& b) {
  if (a.numel() == 0 || data<char>(a) != data<char>(b)) return false;  // all empty tensors share the null address
  for (int dim = 0; dim < a.ndim(); ++dim) {
    if (a.strides()[dim] != b.strides()[dim]) return false;
  }
  return true;
}

}  // namespace

/// Copies page src[i] of [N, ...] over page dst[i] of [M, ...] of any strides; checks every id first.
void copy_pages(TensorView src_pages, TensorView dst_pages, TensorView src_ids, TensorView dst_ids, int64_t num_threads) {
  const Indices src(src_ids), dst(dst_ids);
  const bool one_tensor = is_same_memory(src_pages, dst_pages);
  check_range("src", src, src_pages.size(0), "src_pages");
  check_range("dst", dst, dst_pages.size(0), "dst_pages");
  check_order(src, dst, one_tensor);

  std::vector<Axis> axes;
  const int64_t item = item_bytes(src_pages);
  int64_t page_bytes = item;
  for (int dim = 1; dim < src_pages.ndim(); ++dim) {
    axes.push_back({src_pages.size(dim), stride_bytes(src_pages, dim), stride_bytes(dst_pages, dim)});
    page_bytes *= src_pages.size(dim);
  }
  if (dst.count == 0 || page_bytes == 0) return;
  const PageAddress from{data<char>(src_pages), stride_bytes(src_pages, 0), &src};
  const PageAddress to{data<char>(dst_pages), stride_bytes(dst_pages, 0), &dst};
  if (one_tensor || !ranges_meet(src_pages, dst_pages)) {
    copy_all(to, from, dst.count, page_bytes, collapse(std::move(axes), item), num_threads);
    return;
  }
  // Two views of one buffer may share bytes: read all, then write all.
  std::vector<char> staging(static_cast<size_t>(dst.count * page_bytes));
  const PageAddress between{staging.data(), page_bytes, nullptr};
  std::vector<Axis> in(axes), out(axes);
  int64_t stride = item;
  for (size_t i = axes.size(); i-- > 0; stride *= axes[i].size) in[i].dst_stride = out[i].src_stride = stride;
  copy_all(between, from, dst.count, page_bytes, collapse(std::move(in), item), num_threads);
  copy_all(to, between, dst.count, page_bytes, collapse(std::move(out), item), num_threads);
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(copy_pages, copy_pages);

}  // namespace pagedkv
