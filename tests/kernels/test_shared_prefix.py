"""Pages that sequences share are read once for all of them, and nobody can tell from the result."""

import dataclasses
import itertools
import random

import pytest
import torch

from pagedkv import PageTable, RotaryEmbedding, plan_attention
from pagedkv.testing.attention_batch import AttentionBatch
from pagedkv.testing.attention_work import CHUNK_TOKENS, assert_covers_once, read_work
from pagedkv.testing.mla_batch import mla_batch
from pagedkv.testing.numeric import assert_attention_close
from pagedkv.testing.poison import owned_slots

F32, F16, BF16, INT8, E4M3 = torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn


@dataclasses.dataclass
class Sequences:
    """Page ids, keys and new tokens of each sequence, over a pool of `num_pages` pages."""

    page_size: int
    rows: list
    kv_lens: list
    q_lens: list

    @property
    def num_pages(self):
        return max(itertools.chain([0], *self.rows)) + 2

    def copied(self):
        """The same on pages that no two sequences share, and the old page of each new one."""
        ids = itertools.count()
        rows = [[next(ids) for _ in row] for row in self.rows]
        return dataclasses.replace(self, rows=rows), list(itertools.chain(*self.rows))

    def one(self, sequence):
        return Sequences(self.page_size, *([part[sequence]] for part in (self.rows, self.kv_lens, self.q_lens)))


def int32(values):
    return torch.tensor(values, dtype=torch.int32)


def branches(page_size, *counts, own_tokens=5, q_len=1):
    """A tree of prefixes: counts are (branches, tokens) a level; each leaf has tokens on pages of its own."""
    ids = itertools.count()
    prefixes = [[]]
    for num_branches, num_tokens in counts:
        prefixes = [
            [*prefix, *(next(ids) for _ in range(num_tokens // page_size))]
            for prefix in prefixes
            for _ in range(num_branches)
        ]
    own = -(-own_tokens // page_size)
    rows = [[*prefix, *(next(ids) for _ in range(own))] for prefix in prefixes]
    kv_lens = [(len(row) - own) * page_size + own_tokens for row in rows]
    return Sequences(page_size, rows, kv_lens, [q_len] * len(rows))


def forest(page_size):
    """Random prefixes of prefixes, cut anywhere, in random order; some sequences are empty or have no new tokens."""
    ids = itertools.count()
    rows, kv_lens, q_lens = [], [], []

    def grow(prefix, depth):
        for _ in range(random.randint(1, 3)):
            row = [*prefix, *(next(ids) for _ in range(random.randint(0, max(1, 500 // page_size))))]
            if depth and random.random() < 0.7:
                grow(row, depth - 1)
            else:
                rows.append([*row, *(next(ids) for _ in range(random.randint(0, 60 // page_size + 1)))])

    for _ in range(random.randint(1, 2)):
        grow([], 3)
    random.shuffle(rows)
    rows = rows[:24]
    for row in rows:
        kv_lens.append(max(0, len(row) * page_size - random.randrange(page_size)))
        q_lens.append(random.choice([0, 1, 1, 1, 2, 5]))
    return Sequences(page_size, rows, kv_lens, q_lens)


def make_batch(
    sequences,
    *,
    num_kv_heads=2,
    group=2,
    head_dim=16,
    value_dim=None,
    dtype=F32,
    query_dtype=None,
    layout="NHD",
    mask=False,
    num_threads=2,
    plan_options=None,
    **options,
):
    """A batch over random pages; where no sequence has a token, NaN, or the largest int8 and a NaN scale."""
    value_dim = value_dim or head_dim
    table = PageTable.from_rows(sequences.rows, sequences.kv_lens, sequences.page_size)
    unused = ~owned_slots(table, sequences.num_pages)
    pages = []
    for name, dim in (("key_scales", head_dim), ("value_scales", value_dim)):
        tokens = torch.randn(sequences.num_pages, sequences.page_size, num_kv_heads, dim)
        if dtype in (INT8, E4M3):
            tokens = tokens * 30
            scales = torch.rand(sequences.num_pages, num_kv_heads, sequences.page_size) / 30
            options[name] = scales.masked_fill(unused[:, None], torch.nan)
            tokens = tokens.clamp(-127, 127).to(dtype)
            tokens.view(INT8)[unused] = 127
        else:
            tokens = tokens.to(dtype)
            tokens[unused] = torch.nan
        pages.append(tokens.transpose(1, 2).contiguous() if layout == "HND" else tokens)
    query = torch.randn(sum(sequences.q_lens), num_kv_heads * group, head_dim)
    query = query.to(query_dtype or (F32 if dtype in (INT8, E4M3) else dtype))
    plan_options = dict(plan_options or {})
    if mask:
        plan_options["custom_mask"] = torch.rand(sum(map(int.__mul__, sequences.q_lens, sequences.kv_lens))) < 0.8
    # The cut alone is for so many threads; more than the machine has would only make the runs slow.
    torch.set_num_threads(num_threads)
    plan = plan_attention(
        int32([0, *itertools.accumulate(sequences.q_lens)]),
        table,
        num_q_heads=num_kv_heads * group,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        value_dim=value_dim,
        **plan_options,
    )
    torch.set_num_threads(2)
    return AttentionBatch(query, *pages, table, plan, layout, options)


def planned_anew(batch, sequences, rows=slice(None), mask=None):
    """Rows of the same batch under a plan for these sequences."""
    table = PageTable.from_rows(sequences.rows, sequences.kv_lens, sequences.page_size)
    old = batch.plan
    plan = plan_attention(
        int32([0, *itertools.accumulate(sequences.q_lens)]),
        table,
        num_q_heads=old.num_q_heads,
        num_kv_heads=old.num_kv_heads,
        head_dim=old.head_dim,
        value_dim=old.value_dim,
        causal=old.causal,
        window_left=old.window_left,
        custom_mask=mask,
    )
    return dataclasses.replace(batch, query=batch.query[rows], table=table, plan=plan)


def apart(batch, sequences):
    """The same batch on copied pages: nothing is shared, and what is not the sequence's own is NaN again."""
    copied, old_pages = sequences.copied()
    other = planned_anew(batch, copied, mask=batch.plan.custom_mask)
    unused = ~owned_slots(other.table, len(old_pages))
    moved = []
    for pages in (batch.key_pages, batch.value_pages):
        pages = pages.view(INT8)[old_pages].view(pages.dtype)
        in_slot_order = pages.transpose(1, 2) if batch.layout == "HND" else pages
        if pages.dtype in (INT8, E4M3):
            in_slot_order.view(INT8)[unused] = 127
        else:
            in_slot_order[unused] = torch.nan
        moved.append(pages)
    options = dict(batch.options)
    for name in {"key_scales", "value_scales"} & set(options):
        options[name] = options[name][old_pages].masked_fill(unused[:, None], torch.nan)
    return dataclasses.replace(other, key_pages=moved[0], value_pages=moved[1], options=options)


def assert_same(state, expected, rows=slice(None)):
    assert torch.equal(state.out, expected.out[rows])
    assert torch.equal(state.lse, expected.lse[rows])


def assert_sharing_changes_nothing(batch, sequences):
    together = batch.run(backend="cpu")
    assert not together.out.isnan().any()
    copied = apart(batch, sequences)
    assert not read_work(copied.plan).shared_items
    assert_covers_once(copied.plan)
    assert_same(copied.run(backend="cpu"), together)
    starts = [0, *itertools.accumulate(sequences.q_lens)]
    for sequence in random.sample(range(len(sequences.rows)), min(len(sequences.rows), 12)):
        rows, mask = slice(*starts[sequence : sequence + 2]), None
        if batch.plan.custom_mask is not None:
            mask = batch.plan.custom_mask[slice(*batch.plan.mask_indptr[sequence : sequence + 2].tolist())]
        alone = planned_anew(batch, sequences.one(sequence), rows, mask)
        assert_same(alone.run(backend="cpu"), together, rows)
    return together


def keys_read(plan):
    """Keys that the items read, of one KV head."""
    work, total = read_work(plan), 0
    for item in work.items:
        if item.head_first:
            continue
        total += (item.chunk_last - item.chunk_first - 1) * CHUNK_TOKENS
        tails = [
            min(CHUNK_TOKENS, int(plan.seq_lens[work.tiles[member].sequence]) - (item.chunk_last - 1) * CHUNK_TOKENS)
            for member in work.members_of(item)
        ]
        common = min(item.shared_tokens, max(tails))
        total += common + sum(max(0, tail - common) for tail in tails)
    return total


ROPE = RotaryEmbedding(8, interleaved=True)
FORESTS = {
    "P1": (1, {}),
    "P3-bf16-G4": (3, {"dtype": BF16, "group": 4}),
    "P3-G12-window": (3, {"group": 12, "num_kv_heads": 1, "plan_options": {"window_left": 300}}),
    "P16-f16-G1-HND": (16, {"dtype": F16, "group": 1, "layout": "HND", "value_dim": 8}),
    "P16-mask": (16, {"mask": True, "group": 3}),
    "P16-full-mask-window": (16, {"mask": True, "plan_options": {"causal": False, "window_left": 100}}),
    "P16-soft-cap-sinks": (16, {"soft_cap": 2.0, "sinks": torch.ones(4)}),
    "P16-alibi-bf16": (16, {"dtype": BF16, "alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.01])}),
    "P16-int8": (16, {"dtype": INT8, "group": 4}),
    "P3-int8-rope-bf16": (3, {"dtype": INT8, "query_dtype": BF16, "rope": ROPE}),
    "P16-e4m3-HND": (16, {"dtype": E4M3, "layout": "HND", "out_dtype": BF16}),
    "P64-rope": (64, {"rope": ROPE, "num_kv_heads": 3}),
    "P64-G5-D128": (64, {"group": 5, "head_dim": 128, "dtype": BF16}),
    "P512": (512, {"group": 8}),
    "P512-int8-window": (512, {"dtype": INT8, "plan_options": {"window_left": 100}}),
}


@pytest.mark.parametrize("num_threads", [1, 2, 8])
@pytest.mark.parametrize("name", FORESTS)
def test_a_forest_of_prefixes(name, num_threads):
    page_size, settings = FORESTS[name]
    for _ in range(3):
        sequences = forest(page_size)
        batch = make_batch(sequences, num_threads=num_threads, **settings)
        assert_covers_once(batch.plan)
        assert_sharing_changes_nothing(batch, sequences)


def shared_prefix(page_size, num_tokens, num_seqs=3, own_tokens=20, **rest):
    return branches(page_size, (1, num_tokens), (num_seqs, 0), own_tokens=own_tokens, **rest)


@pytest.mark.parametrize(
    "page_size, num_tokens, expected",
    [
        # One page before a chunk boundary, on it, and one after; with the item of the prefix: (chunks, shared tokens).
        (16, 240, [((0, 1), 240)]),
        (16, 256, [((0, 1), 256)]),
        (16, 272, [((0, 1), 256)]),
        (16, 288, [((0, 1), 256), ((1, 2), 32)]),
        (1, 255, [((0, 1), 255)]),
        (1, 257, [((0, 1), 256)]),
        # Fewer than 32 tokens of a chunk are not worth an item.
        (1, 31, []),
        (1, 32, [((0, 1), 32)]),
        (1, 287, [((0, 1), 256)]),
        (1, 288, [((0, 1), 256), ((1, 2), 32)]),
        (512, 512, [((0, 2), 256)]),
        (300, 600, [((0, 2), 256), ((2, 3), 88)]),
        (1024, 1024, [((0, 4), 256)]),
    ],
)
def test_a_prefix_that_ends_anywhere(page_size, num_tokens, expected):
    sequences = shared_prefix(page_size, num_tokens)
    batch = make_batch(sequences, num_threads=1)
    items = sorted(read_work(batch.plan).shared_items, key=lambda item: item.chunk_first)
    first_head = [item for item in items if not item.head_first]
    assert [((item.chunk_first, item.chunk_last), item.shared_tokens) for item in first_head] == expected
    assert_covers_once(batch.plan)
    assert_sharing_changes_nothing(batch, sequences)


@pytest.mark.parametrize("q_len, group", [(1, 1), (1, 8), (1, 64), (2, 4), (5, 12)])
@pytest.mark.parametrize("num_threads", [1, 2, 8])
def test_a_common_prefix_is_read_once(q_len, group, num_threads):
    sequences = shared_prefix(16, 1536, num_seqs=2, q_len=q_len)
    batch = make_batch(sequences, group=group, num_kv_heads=1, head_dim=8, num_threads=num_threads)
    assert keys_read(batch.plan) == 1536 + 2 * 20
    assert_covers_once(batch.plan)
    state = assert_sharing_changes_nothing(batch, sequences)
    assert_attention_close(state, batch.query, batch.key_pages, batch.value_pages, batch.plan)


def test_prefixes_of_prefixes_are_read_once_each():
    sequences = branches(16, (2, 512), (3, 256), (2, 1024), own_tokens=1)
    batch = make_batch(sequences)
    assert keys_read(batch.plan) == 2 * 512 + 6 * 256 + 12 * 1024 + 12
    assert_covers_once(batch.plan)
    assert_sharing_changes_nothing(batch, sequences)


def test_branchings_within_one_chunk_are_read_in_the_cheapest_groups():
    # All agree in 48 tokens, each half of them in 192 more: one item a half reads 240 keys for all its sequences.
    sequences = branches(16, (1, 48), (2, 192), (4, 0), own_tokens=16)
    batch = make_batch(sequences)
    assert keys_read(batch.plan) == 2 * 240 + 8 * 16
    assert_covers_once(batch.plan)
    assert_sharing_changes_nothing(batch, sequences)


def test_many_sequences_share_in_items_of_at_most_192_rows():
    sequences = shared_prefix(64, 512, num_seqs=300, own_tokens=1)
    batch = make_batch(sequences, group=3, head_dim=8)
    work = read_work(batch.plan)
    assert max(map(work.rows_of, work.items)) <= 192
    assert keys_read(batch.plan) == -(-300 // (192 // 3)) * 512 + 300
    assert_covers_once(batch.plan)
    assert_sharing_changes_nothing(batch, sequences)


def test_a_chain_of_forks_forty_deep():
    forks = [[*range(7 * depth), 1000 + depth] for depth in range(1, 41)]
    sequences = Sequences(16, forks, [len(row) * 16 - 3 for row in forks], [1] * 40)
    batch = make_batch(sequences)
    assert keys_read(batch.plan) < keys_read(apart(batch, sequences).plan) / 2
    assert_covers_once(batch.plan)
    assert_sharing_changes_nothing(batch, sequences)


PAGES = list(range(40))
ADVERSARIAL = {
    "identical": Sequences(16, [PAGES] * 5, [640] * 5, [1] * 5),
    "identical-of-many-rows": Sequences(16, [PAGES] * 3, [633] * 3, [5] * 3),
    "same-pages-other-lengths": Sequences(16, [PAGES] * 6, [640, 639, 625, 630, 626, 640], [1, 2, 5, 1, 0, 3]),
    "prefixes-of-each-other": Sequences(
        16, [PAGES[:n] for n in (40, 1, 16, 17, 32, 39)], [637, 3, 256, 260, 512, 624], [1] * 6
    ),
    "one-ends-within-the-last-shared-page": Sequences(16, [PAGES[:5], PAGES[:4], PAGES[:4]], [80, 50, 64], [1, 1, 2]),
    "one-page-again-and-again": Sequences(16, [[3] * 40, [3] * 40, [3] * 20], [640, 630, 320], [1, 2, 1]),
    "a-page-twice": Sequences(16, [[0, *PAGES, 7], [0, *PAGES, 8], [0, *PAGES[::-1]]], [672, 665, 650], [1] * 3),
    "the-same-pages-elsewhere": Sequences(16, [PAGES, PAGES[1:], [50, *PAGES[1:]]], [640, 624, 640], [1] * 3),
    "more-rows-than-keys": Sequences(16, [PAGES[:3]] * 3, [33, 2, 48], [5, 5, 5]),
    "without-new-tokens": Sequences(16, [PAGES, PAGES, PAGES[:20]], [640, 640, 320], [0, 1, 0]),
    "with-empty-ones": Sequences(16, [[], PAGES, [], PAGES, []], [0, 640, 0, 634, 0], [1, 1, 0, 1, 5]),
    "a-prompt-among-them": Sequences(16, [PAGES] * 3, [640, 633, 640], [1, 200, 1]),
    "none": Sequences(16, [], [], []),
}


@pytest.mark.parametrize("window_left", [-1, 0, 40, 300])
@pytest.mark.parametrize("name", ADVERSARIAL)
def test_adversarial_sequences(name, window_left):
    sequences = ADVERSARIAL[name]
    batch = make_batch(sequences, plan_options={"window_left": window_left})
    assert_covers_once(batch.plan)
    assert_sharing_changes_nothing(batch, sequences)


@pytest.mark.parametrize(
    "name", ["identical", "prefixes-of-each-other", "one-page-again-and-again", "a-prompt-among-them"]
)
def test_adversarial_sequences_share_what_they_can(name):
    batch = make_batch(ADVERSARIAL[name])
    assert keys_read(batch.plan) < keys_read(apart(batch, ADVERSARIAL[name]).plan)


def test_the_same_pages_elsewhere_are_not_shared():
    assert not read_work(make_batch(ADVERSARIAL["the-same-pages-elsewhere"]).plan).shared_items


@pytest.mark.parametrize("dtype", [F32, INT8], ids=str)
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("masked", [False, True])
def test_what_one_sequence_must_not_see_never_reaches_it(dtype, layout, masked):
    """The longest sequence, or the only one whose mask shows it, sees a NaN; those it shares the page with do not."""
    lengths = [640, 640, 640] if masked else [640, 630, 600]
    sequences = Sequences(16, [PAGES] * 3, lengths, [1] * 3)
    mask = torch.ones(sum(lengths), dtype=torch.bool)
    if masked:
        mask[[640 + 635, 2 * 640 + 635]] = False
    batch = make_batch(sequences, dtype=dtype, layout=layout, plan_options={"custom_mask": mask})
    assert read_work(batch.plan).shared_items
    expected = batch.run(backend="cpu")
    if dtype == INT8:
        for name in ("key_scales", "value_scales"):
            batch.options[name][39, :, 11] = torch.nan
    else:
        for pages in (batch.key_pages, batch.value_pages):
            (pages.transpose(1, 2) if layout == "HND" else pages)[39, 11] = torch.nan
    state = batch.run(backend="cpu")
    assert state.out[0].isnan().all()
    assert state.lse[0].isnan().all()
    assert_same(state._replace(out=state.out[1:], lse=state.lse[1:]), expected, slice(1, None))


@pytest.mark.parametrize("num_heads, q_len", [(1, 3), (16, 1), (16, 3), (64, 1), (128, 1)])
@pytest.mark.parametrize("rope_dim", [0, 16])
def test_latents_that_sequences_share(num_heads, q_len, rope_dim):
    whole = mla_batch([q_len] * 4, [640, 600, 583, 300], num_heads=num_heads, rope_dim=rope_dim, dtype=BF16)
    rows = [row[row >= 0].tolist() for row in whole.table.to_dense()]
    forked = [rows[0], rows[0][:33] + rows[1][33:], rows[0][:20] + rows[2][20:], rows[0][:19]]
    results = {}
    for shared in (True, False):
        plan_rows = forked
        pages = [whole.latent_pages, whole.rope_pages]
        if not shared:
            ids = list(itertools.chain(*forked))
            pages = [None if page is None else page[ids] for page in pages]
            counts = iter(range(len(ids)))
            plan_rows = [[next(counts) for _ in row] for row in forked]
        old = whole.plan
        plan = plan_attention(
            old.query_indptr,
            PageTable.from_rows(plan_rows, old.seq_lens.tolist(), 16),
            num_q_heads=num_heads,
            num_kv_heads=1,
            head_dim=old.head_dim,
            value_dim=old.value_dim,
        )
        assert_covers_once(plan)
        assert bool(read_work(plan).shared_items) == (shared and num_heads * q_len <= 64)
        batch = dataclasses.replace(whole, latent_pages=pages[0], rope_pages=pages[1], plan=plan)
        results[shared] = batch.run(backend="cpu")
    assert_same(results[True], results[False])
