"""copy_pages: bitwise, any trailing shape, any strides, all at once."""

import pytest
import torch

import pagedkv
from pagedkv.testing.bits import same_bits, storage_bytes

DTYPES = [torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn, torch.bool, torch.float64]

FORMS = {
    "contiguous": lambda n: torch.empty(n, 3, 4, 5),
    "pages alone": lambda n: torch.empty(n),
    "permuted": lambda n: torch.empty(n, 5, 3, 4).permute(0, 2, 3, 1),
    "page axis inside": lambda n: torch.empty(3, 4, n, 5).permute(2, 0, 1, 3),
    "strided last dim": lambda n: torch.empty(n, 3, 4, 10)[..., ::2],
    "gaps": lambda n: torch.empty(n + 1, 5, 4, 9)[1:, 1:4, :, 2:7],
    "one element": lambda n: torch.empty(n, 1, 1, 1),
    "no element": lambda n: torch.empty(n, 3, 0, 5),
}


@pytest.mark.parametrize("dst_form", FORMS)
@pytest.mark.parametrize("src_form", ["contiguous", "permuted", "strided last dim"])
def test_copy_pages_between_any_strides(src_form, dst_form, any_backend):
    dst_pages = FORMS[dst_form](6)
    src_pages = FORMS[src_form](9)
    if src_pages.shape[1:] != dst_pages.shape[1:]:
        src_pages = torch.empty(9, *dst_pages.shape[1:])
    src_pages.copy_(torch.randn(src_pages.shape))
    src, dst = torch.tensor([8, 0, 8, 3]), torch.tensor([5, 1, 0, 2])
    before, kept = src_pages.clone(), dst_pages.clone()
    outside = storage_bytes(dst_pages)
    pagedkv.copy_pages(src_pages, dst_pages, src, dst, backend=any_backend)
    for source, target in zip(src.tolist(), dst.tolist(), strict=True):
        assert same_bits(dst_pages[target], before[source])
    assert same_bits(dst_pages[3:5], kept[3:5])
    dst_pages.copy_(kept)
    assert torch.equal(storage_bytes(dst_pages), outside), "bytes outside the pages were written"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_copy_pages_within_one_tensor_of_any_dtype(dtype, any_backend):
    pages = torch.randint(0, 2, (7, 2, 5), dtype=torch.int8).to(dtype)
    before = pages.clone()
    pagedkv.copy_pages(pages, pages, torch.tensor([6, 1, 1]), torch.tensor([0, 2, 5]), backend=any_backend)
    assert same_bits(pages, before[torch.tensor([6, 1, 1, 3, 4, 1, 6])])


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("order", ["layer_first", "page_first"])
def test_copy_pages_of_many_bytes_with_any_number_of_threads(order, num_threads, any_backend):
    # Pages of 70 KiB and 5 MiB in all: runs are cut for the threads, and written past the caches.
    torch.set_num_threads(num_threads)
    pages = torch.randn(2, 150, 70 * 128).movedim(1, 0) if order == "layer_first" else torch.randn(150, 2 * 70 * 128)
    before = pages.clone()
    ids = torch.randperm(150)
    pagedkv.copy_pages(pages, pages, ids[:75], ids[75:], backend=any_backend)
    before[ids[75:]] = before[ids[:75]]
    assert same_bits(pages, before)


def test_copy_pages_between_interleaved_views(any_backend):
    both = torch.randn(5, 2, 3, 4)
    before = both.clone()
    pagedkv.copy_pages(both[:, 0], both[:, 1], torch.tensor([0, 3]), torch.tensor([3, 0]), backend=any_backend)
    before[[3, 0], 1] = before[[0, 3], 0]
    assert same_bits(both, before)


def test_copy_pages_between_views_that_share_bytes_reads_all_before_it_writes(any_backend):
    pool = torch.randn(8, 2, 3)
    before = pool.clone()
    # src page i is dst page i - 2: page 4 of the pool is read (as 4) and written (as 2).
    pagedkv.copy_pages(pool, pool[2:], torch.tensor([3, 4, 5]), torch.tensor([2, 3, 0]), backend=any_backend)
    before[[4, 5, 2]] = before[[3, 4, 5]]
    assert same_bits(pool, before)


def test_copy_pages_of_nothing_writes_nothing(any_backend):
    pages = torch.empty(3, 4)
    before = storage_bytes(pages)
    none = torch.zeros(0, dtype=torch.int64)
    pagedkv.copy_pages(pages, pages, none, none, backend=any_backend)
    assert torch.equal(storage_bytes(pages), before)


POOL = torch.zeros(8, 2, 4)
IDS = torch.tensor([0, 1, 2])
REFUSED = {
    "source beyond": (
        {"src": torch.tensor([0, 8, 9])},
        ValueError,
        r"src must be in \[0, 8\) \(the pages of src_pages\), got 8 at entry 1\.",
    ),
    "negative source": (
        {"src": torch.tensor([0, 1, -1])},
        ValueError,
        r"src must be in \[0, 8\) .*, got -1 at entry 2\.",
    ),
    "target beyond": (
        {"dst": torch.tensor([5, 6, 7])},
        ValueError,
        r"dst must be in \[0, 6\) \(the pages of dst_pages\), got 6 at entry 1\.",
    ),
    "negative target": (
        {"dst": torch.tensor([-5, 6, 7])},
        ValueError,
        r"dst must be in \[0, 6\) .*, got -5 at entry 0\.",
    ),
    "a target twice": (
        {"dst": torch.tensor([4, 3, 4])},
        ValueError,
        r"dst must name each page once, got page 4 again at entry 2\.",
    ),
    "source and target in one tensor": (
        {"dst_pages": POOL, "dst": torch.tensor([5, 2, 1])},
        ValueError,
        r"dst must not name a page of src within one tensor, got page 2 in both\.",
    ),
    "more targets": (
        {"dst": torch.arange(4)},
        ValueError,
        r"dst must have shape \[n\] with n = 3 \(set by src\), got \[4\]",
    ),
    "ids int32": ({"src": IDS.int()}, TypeError, r"src must have dtype int64, got int32\."),
    "another trailing shape": (
        {"dst_pages": torch.zeros(6, 4, 2)},
        ValueError,
        r"dst_pages must have shape \[M, \*\[2, 4\]\] \(as src_pages\), got \[6, 4, 2\]\.",
    ),
    "another dtype": (
        {"dst_pages": torch.zeros(6, 2, 4).half()},
        TypeError,
        "dst_pages must have dtype float32, got float16",
    ),
    "no axis": ({"src_pages": torch.zeros(())}, ValueError, r"src_pages must have shape \[N, \.\.\.\], got \[\]"),
    "no tensor": ({"dst_pages": [1]}, TypeError, "dst_pages must be a torch.Tensor, got list"),
    "another device": (
        {"dst_pages": torch.zeros(6, 2, 4, device="meta")},
        ValueError,
        "dst_pages must be on cpu like src_pages, got meta",
    ),
    "expanded target": (
        {"dst_pages": torch.zeros(1, 2, 4).expand(6, 2, 4)},
        ValueError,
        r"dst_pages must not be expanded, got stride 0 in dim 0 of \[6, 2, 4\]",
    ),
    "a gradient": (
        {"src_pages": torch.zeros(8, 2, 4, requires_grad=True)},
        ValueError,
        "src_pages must not require a gradient",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_copy_pages_refuses_before_it_writes(case, any_backend):
    changed, error, message = REFUSED[case]
    arguments = {
        "src_pages": POOL,
        "dst_pages": torch.empty(6, 2, 4),
        "src": IDS,
        "dst": torch.tensor([3, 4, 5]),
        **changed,
    }
    written = arguments["dst_pages"]
    before = written.clone() if isinstance(written, torch.Tensor) and written.device.type == "cpu" else None
    with pytest.raises(error, match=message):
        pagedkv.copy_pages(**arguments, backend=any_backend)
    if before is not None:
        assert same_bits(written, before)


def test_copy_pages_ops_are_registered():
    ids = torch.tensor([0, 1]), torch.tensor([2, 3])
    torch.library.opcheck(
        torch.ops.pagedkv.copy_pages.default, (torch.randn(4, 2, 3), torch.randn(5, 2, 3), *ids, "auto")
    )
    torch.library.opcheck(torch.ops.pagedkv.copy_pages_within.default, (torch.randn(4, 2, 3), *ids, "auto"))


def test_copy_pages_compiles_in_one_graph():
    @torch.compile(backend="aot_eager", fullgraph=True)
    def both(pool, other, src, dst):
        pagedkv.copy_pages(pool, pool, src, dst)
        pagedkv.copy_pages(pool, other, dst, src)

    pool, other = torch.randn(4, 2, 3), torch.randn(5, 2, 3)
    expected = pool.clone()
    expected[[2, 3]] = expected[[0, 1]]
    both(pool, other, torch.tensor([0, 1]), torch.tensor([2, 3]))
    assert same_bits(pool, expected)
    assert same_bits(other[:2], expected[:2])


def test_copy_pages_of_a_pool_runs_between_graphs():
    @torch.compile(backend="aot_eager")
    def fork(pool, src, dst):
        pool.copy_pages(src, dst)
        return dst + 1

    pool = pagedkv.KVPool(pagedkv.KVCacheSpec(2, 2, 8, page_size=4, dtype=torch.float32), num_pages=4)
    pool.buffer.copy_(torch.randn(pool.buffer.shape))
    assert fork(pool, torch.tensor([1]), torch.tensor([3])).tolist() == [4]
    for layer in range(2):
        assert same_bits(pool.key_pages(layer)[3], pool.key_pages(layer)[1])
        assert same_bits(pool.value_pages(layer)[3], pool.value_pages(layer)[1])
