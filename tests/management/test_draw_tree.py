"""The prefix cache's tree in a picture: order, branches, ages, tokens or their text, and what is left out."""

import re

import pytest

from pagedkv import KVCacheManager
from pagedkv.management.draw import draw


def publish(manager, tokens, namespace=None):
    with manager.open(tokens, namespace) as seq:
        seq.append(len(tokens) - seq.num_tokens)
        seq.commit(tokens)


def tree_of(manager, **options):
    """The lines below the summary, ages left out."""
    lines = draw(manager, **options).split("\n\n")[-1].splitlines()
    return [re.sub(r"  age \d+$", "", line) for line in lines[1:]]


def test_siblings_stand_in_the_order_of_their_pages():
    manager = KVCacheManager(16, page_size=2)
    for last in (9, 5, 7):
        publish(manager, [1, 2, last, last])
    assert tree_of(manager) == [
        "namespace None",
        "└─ 0: 1 2",
        "   ├─ 1: 9 9",
        "   ├─ 2: 5 5",
        "   └─ 3: 7 7",
    ]


def test_only_child_is_not_indented():
    manager = KVCacheManager(16, page_size=1)
    publish(manager, [1, 2, 3])
    held = manager.open([1])
    child = manager.open([1, 2, 3, 4])
    assert held.num_cached_tokens == 1
    assert child.num_cached_tokens == 3
    assert [line.rpartition("  ")[0] or line for line in tree_of(manager)] == [
        "namespace None",
        "└─ 0: 1",
        "   ↳ 1-2: 2 3",
    ]


def test_namespaces_are_told_apart():
    manager = KVCacheManager(16, page_size=1)
    for namespace in (None, "", 0, b"x", ("lora", 3), ("lora",), ()):
        publish(manager, [1], namespace)
    roots = [line for line in tree_of(manager) if line.startswith("namespace")]
    names = ["''", "('lora', 3)", "('lora',)", "()", "0", "None", "b'x'"]
    assert roots == [f"namespace {name}" for name in names]


def test_namespace_is_one_line():
    manager = KVCacheManager(4, page_size=1)
    publish(manager, [1], "line\nbreak \x1b[31m" + "x" * 200)
    lines = tree_of(manager)
    assert lines[0].startswith(r"namespace 'line\nbreak \x1b[31mxxx")
    assert len(lines[0]) == 80


def test_age_counts_from_the_last_use():
    manager = KVCacheManager(16, page_size=1)
    for token in (1, 2, 3):
        publish(manager, [token])
    manager.open([2]).close()
    found = dict(re.findall(r"─ \d: (\d)  age (\d+)$", draw(manager), re.M))
    assert found["2"] == "0"
    assert int(found["1"]) > int(found["3"]) > 0


def test_locks_are_counted():
    manager = KVCacheManager(16, page_size=1)
    publish(manager, [1, 2])
    live = [manager.open([1, 2]), manager.open([1])]
    assert re.search(r"─ 0: 1  2 locks, age \d+\n   ↳ 1: 2  1 lock, age \d+$", draw(manager))
    for seq in live:
        seq.close()
    assert "lock" not in tree_of(manager)[1]


def test_long_runs_are_abbreviated():
    manager = KVCacheManager(100, page_size=10)
    publish(manager, list(range(1000, 1990)))
    for width in (40, 60, 80, 150):
        line = draw(manager, width=width).splitlines()[-1]
        assert len(line) <= width
        assert re.fullmatch(r"└─ 0-98: (1000( \d+)* … 1989 )?\(990 tokens\)  age 0", line), line
    assert "1000 1001 1002 1003 1004" in draw(manager)


def test_decoded_text_is_one_line_and_bounded():
    manager = KVCacheManager(100, page_size=1)
    publish(manager, [65, 10, 27, 66])
    given = []

    def decode(ids):
        given.append(ids)
        return "".join(map(chr, ids)) + "\ud800"

    assert tree_of(manager, decode=decode) == ["namespace None", r'└─ 0-3: "A\n\x1bB\ud800"']
    assert given == [[65, 10, 27, 66]]
    assert type(given[0][0]) is int


def test_decode_gets_the_beginning_of_a_long_run():
    manager = KVCacheManager(1000, page_size=1)
    publish(manager, list(range(1000)))
    lengths = []
    line = tree_of(manager, decode=lambda ids: lengths.append(len(ids)) or "x" * 500)[-1]
    assert lengths[0] < 100
    assert len(line) <= 80
    assert line.endswith("x…")


def test_error_of_decode_is_the_callers():
    manager = KVCacheManager(4, page_size=1)
    publish(manager, [7])
    with pytest.raises(KeyError, match="7"):
        draw(manager, decode=lambda ids: {}[ids[0]])


@pytest.mark.parametrize("max_rows, left", [(1, "and 4 more nodes"), (4, "and 1 more node"), (5, None)])
def test_more_nodes_than_rows_are_counted(max_rows, left):
    manager = KVCacheManager(8, page_size=1)
    for token in range(5):
        publish(manager, [token])
    lines = tree_of(manager, max_rows=max_rows)
    assert sum("─ " in line for line in lines) == max_rows
    assert (lines[-1] == left) if left else ("more" not in lines[-1])


def test_deep_tree_stays_within_the_width():
    """Two continuations a turn, fifty turns."""
    manager = KVCacheManager(200, page_size=1)
    history = []
    for turn in range(50):
        publish(manager, [*history, 1000 + turn])
        history.append(turn)
        publish(manager, history)
    for form_width in (40, 80):
        lines = tree_of(manager, width=form_width, max_rows=200)
        assert max(map(len, lines)) <= form_width
        assert sum(": " in line for line in lines) == 100


def test_long_chain_needs_no_room():
    manager = KVCacheManager(300, page_size=1)
    live = []
    for length in range(1, 200):
        publish(manager, list(range(length)))
        live.append(manager.open(list(range(length))))
    lines = tree_of(manager, max_rows=300)
    assert max(map(len, lines)) < 40
    assert len(lines) == 200


def test_empty_cache():
    assert draw(KVCacheManager(4, page_size=1)).endswith(
        "\n\nprefix cache: 0 pages in 0 nodes, 0 evictable; age 0 was used last"
    )
