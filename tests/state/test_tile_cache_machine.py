"""Random programs against a model of the tile cache: pages as Python objects, used in one list, named in one dict.

The model says before each call which tiles must go and in which order, what every tile holds afterwards and which beams
share it; so a page handed out twice, a missing copy on write and a wrong order of use show as wrong content or as a
wrong eviction, independently of the books that `TileCache.check` reads.
"""

import copy
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from pagedkv import IntegrityError, OutOfPagesError
from pagedkv.storage.tiles import tile_integrity, tile_use
from pagedkv.storage.tiles.tile_buffers import TileBuffers
from pagedkv.storage.tiles.tile_cache import TileCache
from pagedkv.storage.tiles.tile_ledger import TileLedger
from pagedkv.storage.tiles.tile_page_table import TilePageTable
from pagedkv.storage.tiles.tile_pins import NOBODY
from pagedkv.storage.tiles.tile_use import TileUse


class ModelPage:
    """A tile of one head: what its tokens hold, None for what was never written, 0 for what came with a store.

    holder is the beam that it is pinned for, or "several".
    """

    def __init__(self, head, tile, content):
        self.head, self.tile, self.content = head, tile, content
        self.pins = self.writers = 0
        self.holder = None

    def pin(self, *beams, writes=0):
        for beam in beams:
            self.holder = beam if self.holder in (None, beam) else "several"
        self.pins, self.writers = self.pins + 1, self.writers + writes

    def unpin(self, writes=0):
        self.pins, self.writers = self.pins - 1, self.writers - writes
        if not self.pins:
            self.holder = None

    def is_others(self, beam):
        return self.holder not in (None, beam)


class RefusalError(Exception):
    pass


class TileCacheMachine(RuleBasedStateMachine):
    @initialize(
        num_pages=st.sampled_from([6, 4, 9, 12, 2, 1]),
        tile_size=st.integers(1, 3),
        num_beams=st.sampled_from([3, 2, 4, 1]),
        num_heads=st.integers(1, 2),
        num_tiles=st.sampled_from([3, 2, 4, 1]),
    )
    def start(self, num_pages, tile_size, num_beams, num_heads, num_tiles):
        sizes = {"num_beams": num_beams, "num_heads": num_heads, "num_tiles": num_tiles}
        self.cache = TileCache(num_pages, tile_size, 3, value_dim=1, **sizes, on_evict=self.on_evict)
        self.size, self.shape = tile_size, (num_beams, num_heads, num_tiles)
        self.names, self.order, self.held, self.open, self.saved = {}, [], {}, [], None
        self.announced, self.refusing, self.next_number, self.num_evictions = [], False, 0, 0

    def on_evict(self, beams, head, tile, key, value):
        assert len(beams) == len(set(beams))
        if self.refusing:
            raise RefusalError
        self.announced.append((beams, head, tile, key, value))

    # The model.

    def beams_of(self, page):
        return sorted(beam for (beam, _, _), named in self.names.items() if named is page)

    def touch(self, *pages):
        for page in pages:
            if page in self.order:
                self.order.remove(page)
            self.order.append(page)

    def lacking(self, names):
        lacking = []
        for name in names:
            page = self.names.get(name)
            sharing = 0 if page is None else len(self.beams_of(page))
            in_call = [other for other in names if page is not None and self.names.get(other) is page]
            keepers = [other for other in in_call if not page.is_others(other[0])][: len(in_call) == sharing]
            if page is None or (name not in keepers and (sharing > 1 or page.is_others(name[0]))):
                lacking.append(name)
        return lacking

    def victims(self, names, num_needed):
        """The pages that must go, or None when too few can."""
        kept = [self.names[name] for name in names if name in self.names]
        used = {id(page) for page in self.names.values()} | {id(page) for page in self.order if page.pins}
        free = self.cache.num_pages - len(used)
        may_go = [p for p in self.order if self.beams_of(p) and not p.pins and not any(p is k for k in kept)]
        num_victims = max(0, num_needed - free)
        return may_go[:num_victims] if len(may_go) >= num_victims else None

    def own(self, names, call, content=None):
        """Runs `call`, which must give each name a page of its own; returns what it does, None if it must fail."""
        lacking = self.lacking(names)
        victims = self.victims(names, len(lacking))
        before = self.everything()
        if victims is None or (victims and self.refusing):
            with pytest.raises(OutOfPagesError if victims is None else RefusalError):
                call()
            assert before == self.everything()
            return None
        result = call()
        self.check_announced(victims)
        for page in victims:
            self.names = {name: named for name, named in self.names.items() if named is not page}
        old = {name: self.names.get(name) for name in lacking}
        for name in lacking:
            tokens = [content] * self.size if old[name] is None else list(old[name].content)
            self.names[name] = ModelPage(*name[1:], tokens)
        self.touch(*(self.names[name] for name in names))
        return result

    def check_announced(self, victims):
        assert len(self.announced) == len(victims)
        self.num_evictions += len(victims)
        for (beams, head, tile, key, value), page in zip(self.announced, victims, strict=True):
            assert (beams, head, tile) == (self.beams_of(page), page.head, page.tile)
            self.check_content(page, key, value)
        self.announced.clear()

    def check_content(self, page, key, value):
        for offset, number in enumerate(page.content):
            if number is not None:
                assert key[offset].tolist() == ([number, number + 0.25, number + 0.5] if number else [0, 0, 0])
                assert value[offset].tolist() == [-number]

    def everything(self):
        """All that a call that fails must leave alone, as values that compare."""
        bits = [pages.view(torch.int32).tolist() for pages in (self.cache.key_pages, self.cache.value_pages)]
        ledger = self.cache._ledger
        use = ledger.use.last_used[ledger.num_names > 0].tolist()
        return self.cache.table.host.tolist(), self.cache.stats(), bits, use, list(ledger.free)

    def numbers(self, count):
        self.next_number += count
        return torch.arange(self.next_number - count + 1, self.next_number + 1, dtype=torch.float32)

    def name(self, pick):
        beam, rest = pick % self.shape[0], pick // self.shape[0]
        return beam, rest % self.shape[1], rest // self.shape[1] % self.shape[2]

    picks = st.integers(0, 95)

    # The calls.

    @rule(dice=st.integers(0, 5))
    def refuse(self, dice):
        self.refusing = dice == 5

    @rule(pick=picks)
    def register(self, pick):
        name = self.name(pick)
        if name in self.names:
            assert self.cache.register_tile(*name) == self.cache.table.lookup(*name)
            self.touch(self.names[name])
        else:
            self.own([name], lambda: self.cache.register_tile(*name))

    @rule(beams=st.permutations(range(4)), count=st.integers(0, 4), first=st.integers(0, 11), num=st.integers(0, 7))
    def store_some(self, beams, count, first, num):
        self.store(beams, count, first, num)

    def store(self, beams, count, first, num):
        beams = [beam for beam in beams if beam < self.shape[0]][:count]
        room = self.shape[2] * self.size
        firsts = [(first + 2 * row) % room for row in range(len(beams))]
        num = min([num, *(room - start for start in firsts)])
        numbers = self.numbers(len(beams) * self.shape[1] * num).view(len(beams), self.shape[1], num, 1)
        arguments = torch.cat([numbers, numbers + 0.25, numbers + 0.5], 3), -numbers, torch.tensor(firsts).long()
        names = [
            (beam, head, tile)
            for beam, start in zip(beams, firsts, strict=True)
            for tile in (range(start // self.size, (start + num - 1) // self.size + 1) if num else ())
            for head in range(self.shape[1])
        ]
        if self.own(names, lambda: [self.cache.store(*arguments, torch.tensor(beams).long())], 0) is None:
            return
        for row, (beam, start) in enumerate(zip(beams, firsts, strict=True)):
            for head in range(self.shape[1]):
                for token in range(num):
                    tile, offset = divmod(start + token, self.size)
                    self.names[beam, head, tile].content[offset] = numbers[row, head, token].item()

    @rule(first=st.integers(0, 11), parents=st.lists(st.integers(0, 3), min_size=4, max_size=4))
    def step_and_reorder(self, first, parents):
        """What a beam search does: one token of each beam, then every beam goes on from some beam."""
        self.store(range(4), 4, first, 1)
        self.reorder(parents, True)

    @rule(pick=picks, part=st.sampled_from("kv"))
    def get(self, pick, part):
        name = self.name(pick)
        before = self.cache.stats()
        got = self.cache.get(*name, part)
        after = self.cache.stats()
        assert (got is None) == (name not in self.names)
        assert (after.hits - before.hits, after.misses - before.misses) == (got is not None, got is None)
        if got is not None:
            self.touch(self.names[name])
            got.fill_(-7)  # its own: what the cache holds is compared after every step

    def write(self, page, key, value, offset):
        number = self.numbers(1)
        key[offset] = torch.cat([number, number + 0.25, number + 0.5])
        value[offset] = -number
        page.content[offset] = number.item()

    @rule(pick=picks, offset=st.integers(0, 2))
    def write_for_a_while(self, pick, offset):
        name = self.name(pick)
        views = self.own([name], lambda: [self.cache.get_for_write(*name, "k"), self.cache.get_for_write(*name, "v")])
        if views is not None:
            page = self.names[name]
            for _ in range(2):
                page.pin(name[0], writes=1)
            self.held.setdefault(name, []).extend([(page, True)] * 2)
            self.write(page, *views, offset % self.size)

    @rule(pick=picks, offset=st.integers(0, 2))
    def write_at_once(self, pick, offset):
        name, stack = self.name(pick), ExitStack()
        with stack:
            views = self.own([name], lambda: stack.enter_context(self.cache.writing(*name)))
            if views is not None:
                self.write(self.names[name], *views, offset % self.size)

    @rule(pick=picks)
    def pin(self, pick):
        name = self.name(pick)
        if name not in self.names:
            with pytest.raises(KeyError, match="must be in the cache"):
                self.cache.pin(*name)
            return
        self.cache.pin(*name)
        self.names[name].pin(name[0])
        self.held.setdefault(name, []).append((self.names[name], False))

    @rule(pick=st.integers(0, 100))
    def unpin(self, pick):
        if not self.held:
            with pytest.raises(ValueError, match="must be pinned"):
                self.cache.unpin(0, 0, 0)
            return
        name = sorted(self.held)[pick % len(self.held)]
        self.cache.unpin(*name)
        page, writes = self.held[name].pop()
        page.unpin(writes)
        if not self.held[name]:
            del self.held[name]

    @rule(
        beams=st.lists(st.integers(0, 3), max_size=3),
        counts=st.lists(st.integers(0, 4), min_size=3, max_size=3),
        by_row=st.booleans(),
    )
    def open_pages(self, beams, counts, by_row):
        beams = [beam % self.shape[0] for beam in beams]
        counts = [min(count if by_row else counts[0], self.shape[2]) for count in counts][: len(beams)]
        most, stack = max(counts, default=0), ExitStack()
        num_tiles = torch.tensor(counts).long() if by_row else most
        before = self.cache.stats()
        ids = stack.enter_context(self.cache.pinned_pages(torch.tensor(beams).long(), num_tiles))
        places = [
            (b, h, t if t < n else None)
            for b, n in zip(beams, counts, strict=True)
            for h in range(self.shape[1])
            for t in range(most)
        ]
        assert ids.flatten().tolist() == [-1 if p[2] is None else self.cache.table.lookup(*p) for p in places]
        pages = [self.names[place] for place in places if place in self.names]
        after, num_asked = self.cache.stats(), sum(counts) * self.shape[1]
        assert (after.hits - before.hits, after.misses - before.misses) == (len(pages), num_asked - len(pages))
        self.touch(*pages)
        opened = list({id(page): page for page in pages}.values())
        for page in opened:
            page.pin(*(place[0] for place in places if self.names.get(place) is page))
        seen = [(int(i), self.names[p]) for i, p in zip(ids.flatten(), places, strict=True) if p in self.names]
        self.open.append((stack, opened, seen))

    @rule(pick=st.integers(0, 10))
    def close_pages(self, pick):
        for _ in range(1 + len(self.open) // 2):
            if not self.open:
                return
            stack, pages, _ = self.open.pop(pick % len(self.open))
            stack.close()
            for page in pages:
                page.unpin()

    def gives_on_what_is_written(self, names):
        return any(page.writers and self.names.get(name) is not page for name, page in names.items())

    @rule(src=st.integers(0, 3), dst=st.integers(0, 3))
    def fork(self, src, dst):
        src, dst = src % self.shape[0], dst % self.shape[0]
        copies = {(dst, *name[1:]): page for name, page in self.names.items() if name[0] == src}
        before = self.everything()
        refused = None
        if src == dst:
            refused = "must be another beam"
        elif any(name[0] == dst for name in self.names):
            refused = "must have no tiles"
        elif self.gives_on_what_is_written(copies):
            refused = "must not be shared while it is pinned to be written"
        if refused:
            with pytest.raises(ValueError, match=refused):
                self.cache.fork(src, dst)
            assert before == self.everything()
        else:
            self.cache.fork(src, dst)
            self.names.update(copies)

    @rule(parents=st.lists(st.integers(0, 3), min_size=4, max_size=4))
    def reorder_alone(self, parents):
        self.reorder(parents, False)

    def reorder(self, parents, as_tensor):
        parents = [parent % self.shape[0] for parent in parents[: self.shape[0]]]
        after = {
            (beam, *name[1:]): page
            for beam, parent in enumerate(parents)
            for name, page in self.names.items()
            if name[0] == parent
        }
        given_parents = torch.tensor(parents) if as_tensor else parents
        if self.gives_on_what_is_written(after):
            before = self.everything()
            with pytest.raises(ValueError, match="must not be shared while it is pinned to be written"):
                self.cache.reorder(given_parents)
            assert before == self.everything()
        else:
            self.cache.reorder(given_parents)
            self.names = after

    @rule(pick=picks)
    def remove(self, pick):
        name = self.name(pick)
        assert self.cache.remove(*name) == (self.names.pop(name, None) is not None)

    @rule(beam=st.integers(0, 3))
    def remove_beam(self, beam):
        beam %= self.shape[0]
        removed = self.cache.remove_beam(beam)
        kept = {name: page for name, page in self.names.items() if name[0] != beam}
        assert removed == len(self.names) - len(kept)
        self.names = kept

    @rule(dice=st.integers(0, 9))
    def clear(self, dice):
        if dice == 9:
            self.cache.clear()
            self.names = {}

    @rule()
    def save(self):
        self.cache.save(self.path)
        named = [page for page in self.order if self.beams_of(page)]
        self.saved = copy.deepcopy((self.names, named))

    @rule()
    def load(self):
        if self.saved is None:
            return
        if any(page.pins for page in self.order):
            before = self.everything()
            with pytest.raises(ValueError, match="no page may be pinned while a cache is loaded"):
                self.cache.load(self.path)
            assert before == self.everything()
            return
        self.cache.load(self.path)
        self.names, self.order = copy.deepcopy(self.saved)
        for page in self.order:
            page.pins, page.writers, page.holder = 0, 0, None

    @invariant()
    def agrees(self):
        if not hasattr(self, "cache"):
            return
        self.order = [page for page in self.order if page.pins or self.beams_of(page)]
        self.cache.check()
        table = self.cache.table
        assert torch.equal(table.device_table, table.host)
        assert table.device_table.data_ptr() != table.host.data_ptr()
        page_of = {}
        for name in np.ndindex(*self.shape):
            page, model = int(table.host[name]), self.names.get(name)
            assert (page < 0) == (model is None)
            assert self.cache.contains(*name) == (model is not None)
            if model is not None:
                assert page_of.setdefault(id(model), page) == page
                self.check_content(model, self.cache.key_pages[page], self.cache.value_pages[page])
        assert len(set(page_of.values())) == len(page_of)
        for _, _, seen in self.open:
            for page, model in seen:
                assert page_of.get(id(model), page) == page
                self.check_content(model, self.cache.key_pages[page], self.cache.value_pages[page])
        stats = self.cache.stats()
        assert len(self.cache) == stats.num_used == stats.num_pages - stats.num_free == len(self.order)
        assert stats.num_pinned == sum(page.pins > 0 for page in self.order)
        assert stats.num_shared == sum(len(self.beams_of(page)) > 1 for page in self.order)
        assert stats.evictions == self.num_evictions


def run_programs(tmp_path, num_programs, **options):
    machine = type("Machine", (TileCacheMachine,), {"path": tmp_path / "tiles"})
    checks = list(HealthCheck)
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=num_programs,
            stateful_step_count=40,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=checks,
            **options,
        ),
    )


def test_random_programs(tmp_path):
    run_programs(tmp_path, 80)


def test_random_programs_with_a_short_queue(tmp_path, monkeypatch):
    """Pages beyond the end of the queue are the usual case of a large cache."""
    monkeypatch.setattr(tile_use, "_QUEUE_LENGTH", 1)
    run_programs(tmp_path, 40)


def page_id_from_the_number_of_pages(monkeypatch):
    def take(self, count):
        del self.free[len(self.free) - count :]
        return np.arange(count) + self.num_pages - count

    monkeypatch.setattr(TileLedger, "take", take)


def evict_from_one_beam(monkeypatch):
    def evict(self, pages):
        for page in pages:
            head, tile = divmod(int(self.tile_of[page]), self.table.num_tiles)
            self.table.remove(self.beams_of(page)[0], head, tile)
        self.num_names[pages] = 0
        self._free(pages)

    monkeypatch.setattr(TileLedger, "evict", evict)


def upload_one_entry_less(monkeypatch):
    mark = TilePageTable._mark
    monkeypatch.setattr(TilePageTable, "_mark", lambda self, first, stop: mark(self, first, max(first + 1, stop - 1)))


def mark_the_last_change_alone(monkeypatch):
    def mark(self, first, stop):
        self._dirty = first, stop

    monkeypatch.setattr(TilePageTable, "_mark", mark)


def keep_what_nobody_holds(monkeypatch):
    monkeypatch.setattr(TileLedger, "_free_unheld", lambda self, pages: None)


def free_what_is_pinned(monkeypatch):
    def free(self, pages):
        self._free(pages[self.num_names[pages] == 0])

    monkeypatch.setattr(TileLedger, "_free_unheld", free)


def count_no_names(monkeypatch):
    monkeypatch.setattr(TileLedger, "rename", lambda self, num_names: None)


@pytest.mark.parametrize(
    "plant, sentence",
    [
        (page_id_from_the_number_of_pages, "on the free list once|as many names as|page is of one head and tile"),
        # Whether the books or the model notice first hangs on the programs, which hang on what else is imported.
        (evict_from_one_beam, "as many names as beams|page is of one head and tile|assert"),
        (upload_one_entry_less, "the table on the device is the table on the host"),
        (mark_the_last_change_alone, "the table on the device is the table on the host"),
        (keep_what_nobody_holds, "on the free list once"),
        (free_what_is_pinned, "on the free list once"),
        (count_no_names, "as many names as|on the free list once"),
    ],
    ids=lambda value: getattr(value, "__name__", "found"),
)
def test_planted_defect_of_the_books_is_found(tmp_path, monkeypatch, plant, sentence):
    plant(monkeypatch)
    with pytest.raises((IntegrityError, AssertionError), match=sentence):
        run_programs(tmp_path, 800, phases=[Phase.generate])


def copy_nothing(monkeypatch):
    monkeypatch.setattr(TileBuffers, "copy", lambda self, src, dst: None)


def write_to_shared_pages(monkeypatch):
    def lacking(self, pages, beams):
        return np.flatnonzero(pages < 0)

    monkeypatch.setattr(TileLedger, "lacking", lacking)
    monkeypatch.setattr(TileLedger, "may_write", lambda self, page, beam: True)


def write_to_what_others_hold(monkeypatch):
    pin = TileLedger.pin

    def pin_for_nobody(self, held):
        pin(self, held)
        self.holder[:] = NOBODY

    monkeypatch.setattr(TileLedger, "pin", pin_for_nobody)
    monkeypatch.setattr(tile_integrity, "SEVERAL", NOBODY)


def read_without_use(monkeypatch):
    touch_page = TileUse.touch_page

    def touch_new_alone(self, page):
        if self.last_used[page] < 0:
            touch_page(self, page)

    monkeypatch.setattr(TileUse, "touch_page", touch_new_alone)


def give_views(monkeypatch):
    monkeypatch.setattr(TileBuffers, "read", TileBuffers.view)


@pytest.mark.parametrize(
    "plant",
    [copy_nothing, write_to_shared_pages, write_to_what_others_hold, read_without_use, give_views],
    ids=lambda plant: plant.__name__,
)
def test_planted_defect_is_found_by_content_or_order(tmp_path, monkeypatch, plant):
    """The books agree here; only what the tiles hold, and which of them go, tells."""
    monkeypatch.setattr(tile_use, "_QUEUE_LENGTH", 2)
    plant(monkeypatch)
    with pytest.raises((AssertionError, pytest.fail.Exception), match="assert|DID NOT RAISE"):
        run_programs(tmp_path, 600, phases=[Phase.generate])
