"""Pictures as text: the map and its counts against the books, letters, colours, and what keeps large pools readable."""

import random
import re
import threading

import numpy as np
import pytest

from pagedkv import KVCacheManager, OutOfPagesError, check_integrity
from pagedkv.management.draw import draw
from pagedkv.management.draw_snapshot import PageKind, group_pages, take_picture
from pagedkv.management.draw_text import page_ranges

ESCAPE = re.compile(r"\x1b\[([0-9;]*)m")

TEN_PAGES = """\
10 pages of 4 tokens, 3 sequences

0 ##aBc==...

. free 3   a owned 5   + shared 2   = cached 2   A # ! pinned 3

A 11 tokens, pages 0-2
B 8 tokens, pages 0, 3
C 11 tokens, pages 0-1, 4

prefix cache: 5 pages in 4 nodes, 2 evictable; age 0 was used last
namespace None
├─ 0: 10 11 12 13  3 locks, age N
│  ├─ 1: 14 15 16 17  2 locks, age N
│  └─ 3: 14 15 30 31  1 lock, age N
└─ 5-6: 50 51 52 53 54 55 56 57  age N"""


def opened(manager, tokens, namespace=None):
    seq = manager.open(tokens, namespace)
    if len(tokens) > seq.num_tokens:
        seq.append(len(tokens) - seq.num_tokens)
        seq.commit(tokens)
    return seq


def ten_pages():
    """The world of docs/prefix_caching.md after its chapter on closing."""
    manager = KVCacheManager(10, page_size=4)
    a = opened(manager, range(10, 20))
    b = opened(manager, [10, 11, 12, 13, 14, 15, 30, 31])
    c = a.fork()
    c.append(1)
    a.append(1)
    opened(manager, range(50, 58)).close()
    return manager, a, b, c


def map_of(text):
    """The cells of a picture in one string."""
    section = text.split("\n\n")[1]
    return "".join("".join(line.split(" ")[1:]) for line in (row.lstrip() for row in section.splitlines()))


def legend_of(text):
    return {name: int(number.replace(",", "")) for name, number in re.findall(r"(\w+) ([\d,]+)(?=   |\n)", text)}


def without_ages(text):
    return re.sub(r"age \d+$", "age N", text, flags=re.M)


def test_ten_pages():
    manager, *_ = ten_pages()
    assert without_ages(draw(manager)) == TEN_PAGES


def expected_map(manager):
    """The cells, worked out page by page from what sequences and the cache say."""
    seqs = list(manager.ledger.live.values())
    held = manager.ledger.cache.held_mask(manager.num_pages)
    cells = []
    for page in range(manager.num_pages):
        owners = [number for number, seq in enumerate(seqs) if page in seq.page_ids]
        if not owners:
            cells.append("=" if held[page] else ".")
        elif len(owners) > 1:
            cells.append("#" if held[page] else "+")
        else:
            cells.append(chr(ord("A" if held[page] else "a") + owners[0] % 26))
    return "".join(cells)


@pytest.mark.parametrize("seed", range(4))
def test_map_and_legend_are_the_books(seed):
    """After every one of some hundred random calls."""
    rng = random.Random(seed)
    manager = KVCacheManager(24, page_size=2)
    live = []
    for _ in range(150):
        try:
            call = rng.choice(["open", "open", "append", "fork", "truncate", "close"])
            if call == "open":
                tokens = [rng.randrange(2) for _ in range(rng.randrange(1, 9))]
                live.append(opened(manager, tokens, rng.choice([None, "x"])))
            elif live and call == "append":
                rng.choice(live).append(rng.randrange(1, 4))
            elif live and call == "fork":
                live.append(rng.choice(live).fork())
            elif live and call == "truncate":
                seq = rng.choice(live)
                seq.truncate(rng.randrange(seq.num_tokens + 1))
            elif live and call == "close":
                live.pop(rng.randrange(len(live))).close()
        except OutOfPagesError:
            while live:
                live.pop().close()
        manager.take_copies()
        text, stats = draw(manager), manager.stats()
        assert map_of(text) == expected_map(manager)
        legend = {name: legend_of(text)[name] for name in ("free", "owned", "shared", "cached", "pinned")}
        assert legend == {
            "free": stats.free,
            "owned": stats.owned,
            "shared": stats.shared,
            "cached": stats.cached,
            "pinned": stats.published - stats.evictable,
        }
        assert f"prefix cache: {stats.published} page" in text


def test_drawing_changes_nothing():
    manager, *_ = ten_pages()
    before, stats = draw(manager), manager.stats()
    draw(manager, form="svg", color=True)
    assert (draw(manager), manager.stats()) == (before, stats)
    check_integrity(manager)


def test_cached_page_that_is_locked_without_a_sequence():
    manager = KVCacheManager(4, page_size=2)
    opened(manager, [1, 2, 3, 4]).close()
    manager.ledger.cache.lock(manager.ledger.cache.match([1, 2]).handle)
    text = draw(manager)
    assert map_of(text) == "!=.."
    assert (legend_of(text)["cached"], legend_of(text)["pinned"]) == (2, 1)


def test_pinned_prefix():
    manager = KVCacheManager(4, page_size=2)
    opened(manager, [1, 2, 3, 4]).close()
    with manager.pin([1, 2]):
        assert map_of(draw(manager)) == "!=.."
    assert map_of(draw(manager)) == "==.."


def test_pages_that_a_window_gave_back():
    manager = KVCacheManager(5, page_size=2, prefix_cache=False)
    seq = manager.open([], window=2)
    seq.append(8)
    seq.commit(list(range(8)))
    kept = [page for page in seq.page_ids if page >= 0]
    assert len(kept) < 4
    text = draw(manager)
    assert map_of(text) == "".join("a" if page in kept else "." for page in range(5))
    assert "-1" not in text


def test_reserved_pages():
    manager = KVCacheManager(6, page_size=2, num_reserved_pages=2)
    opened(manager, [1, 2, 3])
    text = draw(manager)
    assert map_of(text) == "??Aa.."
    assert f"? reserved {manager.stats().reserved}\n" in text
    assert "reserved" not in draw(KVCacheManager(4, page_size=2))


def test_page_that_waits_to_be_copied_from():
    manager = KVCacheManager(4, page_size=2)
    a = manager.open([])
    a.append(1)
    b = a.fork()
    b.append(1)
    a.close()
    text = draw(manager)
    assert map_of(text) == "!a.."
    assert legend_of(text)["cached"] == manager.stats().cached == 1
    manager.take_copies()
    assert map_of(draw(manager)) == ".a.."


@pytest.mark.parametrize("options", [{"prefix_cache": "hashed"}, {"namespace_limits": {"x": 8}}])
def test_other_caches(options):
    manager = KVCacheManager(12, page_size=2, **options)
    seq = opened(manager, [1, 2, 3, 4], "x")
    opened(manager, [1, 2, 5, 6], "x").close()
    opened(manager, [1, 2]).close()
    text = draw(manager)
    assert map_of(text) == "AA==........"
    assert re.findall(r"^namespace .*", text, re.M) == ["namespace 'x'", "namespace None"]
    assert "─ 0: 1 2  1 lock, age" in text
    seq.close()
    assert "lock" not in draw(manager)


def test_without_prefix_cache():
    manager = KVCacheManager(4, page_size=2, prefix_cache=False)
    opened(manager, [1, 2, 3])
    assert map_of(draw(manager)) == "aa.."
    assert draw(manager).endswith("\n\nno prefix cache")
    assert "prefix cache" not in draw(manager, tree=False)


@pytest.mark.parametrize("width", [40, 80, 132])
def test_colours_stand_on_top_of_the_letters(width):
    manager, *_ = ten_pages()
    plain, colored = draw(manager, width=width), draw(manager, width=width, color=True)
    assert ESCAPE.sub("", colored) == plain
    assert "\x1b" not in plain
    styles = ESCAPE.findall(colored)
    assert styles[1::2] == ["0"] * (len(styles) // 2), "every span is closed before the next one"
    assert "0" not in styles[::2]


def test_each_sequence_has_its_colour():
    manager, *_ = ten_pages()
    spans = re.findall(r"\x1b\[([0-9;]*)m(\S+?)\x1b\[0m", draw(manager, color=True))
    assert [symbols for _, symbols in spans] == ["##", "a", "B", "c", "==", "...", "A", "B", "C"]
    styles = [style.removeprefix("1;") for style, _ in spans]
    assert styles[1:4] == styles[6:9], "the list of sequences has the colours of the map"
    assert len(set(styles)) == 6


def test_names_give_letters():
    manager, a, b, c = ten_pages()
    text = draw(manager, names={a: "q", b: "x the second", c: "chat\n7"})
    assert map_of(text) == "##qXa==..."
    assert "\nQ 11 tokens, pages 0-2\nX the second: 8 tokens, pages 0, 3\nA chat\\n7: 11 tokens" in text


def test_letter_that_a_name_has_is_not_given_again():
    manager, _, b, _ = ten_pages()
    assert map_of(draw(manager, names={b: "A"})) == "##bAc==..."


def test_letters_repeat_after_the_alphabet():
    manager = KVCacheManager(40, page_size=1)
    for token in range(30):
        opened(manager, [token])
    text = draw(manager)
    assert map_of(text) == "ABCDEFGHIJKLMNOPQRSTUVWXYZABCD" + "." * 10
    assert "\nZ 1 token, page 25\nand 4 more sequences; letters repeat\n" in text


def test_sequence_without_pages():
    manager = KVCacheManager(4, page_size=2)
    manager.open([1, 2])
    assert "\nA 0 tokens, no pages\n" in draw(manager)


def test_rows_begin_with_the_number_of_their_page():
    manager = KVCacheManager(130, page_size=1, prefix_cache=False)
    manager.open([1]).append(125)
    assert draw(manager, width=60, tree=False).split("\n\n")[1].splitlines() == [
        "  0 " + " ".join(["a" * 10] * 5),
        " 50 " + " ".join(["a" * 10] * 5),
        "100 " + " ".join(["a" * 10] * 2 + ["a" * 5 + "." * 5]),
    ]


def test_large_pool_is_readable():
    """100,000 pages, 300 sequences, a tree of 10,000 nodes."""
    manager = KVCacheManager(100_000, page_size=16)
    rng = np.random.default_rng(0)
    for _ in range(300):
        opened(manager, np.concatenate([np.arange(160), rng.integers(0, 50_000, 1600)]))
    for number in range(10_000):
        opened(manager, [number + 50_000] * 16).close()
    for width in (40, 80, 200):
        lines = draw(manager, width=width).splitlines()
        assert max(map(len, lines)) <= width
        assert len(lines) < 130
        assert any(re.fullmatch(r"a cell is [\d,]+ pages .*", line) for line in lines)
        assert re.fullmatch(r"and 10,2\d\d more nodes", lines[-1])
    assert legend_of(draw(manager))["free"] == manager.stats().free == 100_000 - 10 - 300 * 100 - 10_000


@pytest.mark.parametrize("num_pages, per_cell", [(10, 1), (11, 2), (50, 5), (51, 10), (101, 20), (999, 100)])
def test_cells_are_round_numbers_of_pages(num_pages, per_cell):
    picture = take_picture(KVCacheManager(num_pages, page_size=1), names=None, max_rows=1)
    cells = group_pages(picture, 10)
    assert cells.pages_per_cell == per_cell
    assert len(cells.kinds) == -(-num_pages // per_cell) <= 10


def test_cell_of_several_pages_shows_what_most_of_them_are():
    manager = KVCacheManager(25, page_size=1, prefix_cache=False)
    for num_pages in (1, 6, 5, 2, 2, 2):
        manager.open([]).append(num_pages)
    # abbbb bbccc ccdde eff.. .....
    cells = group_pages(take_picture(manager, names=None, max_rows=1), 5)
    assert cells.pages_per_cell == 5
    assert cells.kinds.tolist() == [PageKind.OWNED] * 4 + [PageKind.FREE]
    assert cells.owners.tolist()[:4] == [1, 2, 2, 5]


def test_rows_of_such_cells_begin_with_the_number_of_a_page():
    manager = KVCacheManager(1000, page_size=1, prefix_cache=False)
    manager.open([]).append(250)
    lines = draw(manager, width=60, max_rows=2, tree=False).splitlines()
    assert lines[2] == "a cell is 10 pages and shows what most of them are"
    assert lines[3] == "  0 aaaaaaaaaa aaaaaaaaaa aaaaa..... .......... .........."
    assert lines[4].startswith("500 ")


@pytest.mark.parametrize(
    "pages, text", [([], ""), ([7], "7"), ([0, 1, 2], "0-2"), ([2, 1, 0], "2, 1, 0"), ([4, 5, 9, 0, 1], "4-5, 9, 0-1")]
)
def test_page_ranges(pages, text):
    assert page_ranges(np.array(pages, np.int32)) == text


def test_page_ranges_of_scattered_pages_end_early():
    assert page_ranges(np.arange(0, 100_000, 2, dtype=np.int32)).endswith(", 118, …")


def test_decode_is_called_without_the_lock():
    manager, *_ = ten_pages()

    def decode(ids):
        other = threading.Thread(target=manager.stats, daemon=True)
        other.start()
        other.join(timeout=5)
        assert not other.is_alive()
        return str(len(ids))

    assert '"8"' in draw(manager, decode=decode)


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ({"form": "png"}, ValueError, "form must be 'text' or 'svg', got 'png'"),
        ({"width": 39}, ValueError, "width must be at least 40, got 39"),
        ({"form": "svg", "width": 80}, ValueError, "width must be at least 400, got 80"),
        ({"width": 80.0}, TypeError, "width must be an int, got float"),
        ({"max_rows": 0}, ValueError, "max_rows must be at least 1, got 0"),
        ({"decode": "gpt2"}, TypeError, "decode must be a function of a list of ids, got str"),
        ({"names": ["a"]}, TypeError, "names must map sequences to text, got list"),
    ],
)
def test_misuse_is_refused(arguments, error, words):
    with pytest.raises(error, match=words):
        draw(ten_pages()[0], **arguments)


def test_manager_must_be_one():
    with pytest.raises(TypeError, match="manager must be a KVCacheManager, got dict"):
        draw({})
