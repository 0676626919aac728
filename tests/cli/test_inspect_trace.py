"""The lines of a trace: what is refused and in which words, and how sequences get and keep their letters."""

import json

import pytest

from pagedkv.cli.inspect_trace import Replay, parse_trace

POOL = '{"op": "pool", "num_pages": 8, "page_size": 2}'


def steps_of(*lines):
    return parse_trace("t.jsonl", [POOL, *lines])


def replayed(*lines):
    """A replay after all steps, and what it said."""
    pool, *steps = steps_of(*(line if isinstance(line, str) else json.dumps(line) for line in lines))
    replay = Replay(pool)
    return replay, [replay.run(step) for step in steps]


@pytest.mark.parametrize(
    "line, words",
    [
        ("[1, 2]", r"t.jsonl, line 2 must be a JSON object, got \[1, 2\]\."),
        ('{"op": "close"', r"line 2 must be a JSON object, got .* at column 15\)"),
        ("nonsense " * 20, "line 2 must be a JSON object, got nonsense nonsense nonsense nonsense non…"),
        ("[" * 100_000, r"line 2 must be a JSON object, got \[\[\[.*…"),
        ("{}", "line 2: op must be pool, open, append, commit, fork, truncate, close or evict, got None"),
        ('{"op": ["open"]}', r"line 2: op must be .*, got \['open'\]"),
        ('{"op": "opne", "seq": "a"}', "line 2: op must be .*, got 'opne'"),
        ('{"op": "close"}', r"line 2: close must have the key seq \(text\), got none"),
        ('{"op": "close", "seq": 3}', "line 2: seq must be text, got 3"),
        ('{"op": "append", "seq": "a", "num_tokens": true}', "line 2: num_tokens must be a whole number, got True"),
        ('{"op": "append", "seq": "a", "num_tokens": 1.5}', "line 2: num_tokens must be a whole number, got 1.5"),
        ('{"op": "open", "seq": "a", "tokens": 7}', "line 2: tokens must be a list of token ids, got 7"),
        ('{"op": "close", "seq": "a", "token": 3}', "the keys of close must be seq or note, got 'token'"),
        ('{"op": "evict", "note": 3}', "line 2: note must be text, got 3"),
        (POOL, "line 2 must not be the op pool again, got pool"),
    ],
)
def test_line_that_is_no_step(line, words):
    with pytest.raises(ValueError, match=words):
        steps_of(line)


def test_empty_trace():
    with pytest.raises(ValueError, match=r"t.jsonl must have at least one line, got nothing. Begin with the op pool."):
        parse_trace("t.jsonl", ["", "  \n"])


def test_trace_without_a_pool():
    with pytest.raises(ValueError, match="t.jsonl, line 3 must be the op pool, got close"):
        parse_trace("t.jsonl", ["", "", '{"op": "close", "seq": "a"}'])


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"num_pages": 0, "page_size": 2}, "t.jsonl, line 1: num_pages must be at least 1, got 0"),
        ({"num_pages": 4, "page_size": 0}, "line 1: page_size must be at least 1, got 0"),
        ({"num_pages": 4, "page_size": 2, "eviction": "best"}, "line 1: .*'best'"),
        ({"num_pages": 2**40, "page_size": 2}, "line 1: num_pages must be below"),
    ],
)
def test_pool_that_cannot_be(keys, words):
    (pool,) = parse_trace("t.jsonl", [json.dumps({"op": "pool", **keys})])
    with pytest.raises(ValueError, match=words):
        Replay(pool)


OPEN = {"op": "open", "seq": "a", "tokens": [1, 2, 3]}


@pytest.mark.parametrize(
    "step, words",
    [
        ({"op": "close", "seq": "b"}, "line 3: seq must be an open sequence, got 'b'. Open it first."),
        (OPEN, "line 3: seq must be a name that is not open, got 'a'. Close it first."),
        ({"op": "fork", "seq": "a", "to": "a"}, "line 3: to must be a name that is not open, got 'a'"),
        ({"op": "fork", "seq": "x", "to": "y"}, "line 3: seq must be an open sequence, got 'x'"),
        ({"op": "append", "seq": "a", "num_tokens": 0}, "line 3: num_tokens must be at least 1, got 0"),
        ({"op": "truncate", "seq": "a", "num_tokens": 9}, "line 3: num_tokens must be at most 0"),
        ({"op": "commit", "seq": "a", "tokens": [1]}, "line 3: token_ids must be no more ids"),
        ({"op": "commit", "seq": "a", "tokens": [[1], 2]}, "line 3: token_ids must be a flat list of ints"),
        ({"op": "open", "seq": "b", "tokens": ["x"]}, "line 3: token_ids must be ints, got str"),
        ({"op": "open", "seq": "b", "tokens": [2**70]}, "line 3: token_ids must be below"),
        ({"op": "open", "seq": "b", "tokens": [], "namespace": {}}, "line 3: namespace must be None, a str"),
    ],
)
def test_step_that_cannot_be_done(step, words):
    with pytest.raises(ValueError, match=words):
        replayed(OPEN, step)


def test_what_steps_say():
    _, said = replayed(
        OPEN,
        {"op": "append", "seq": "a", "num_tokens": 3},
        {"op": "commit", "seq": "a", "tokens": [1, 2, 3]},
        {"op": "fork", "seq": "a", "to": "b"},
        {"op": "append", "seq": "b", "num_tokens": 2},
        {"op": "append", "seq": "b", "num_tokens": 1},
        {"op": "truncate", "seq": "b", "num_tokens": 3},
        {"op": "truncate", "seq": "b", "num_tokens": 1},
        {"op": "close", "seq": "a"},
        {"op": "close", "seq": "b"},
        {"op": "open", "seq": "c", "tokens": [1, 2, 3]},
        {"op": "close", "seq": "c"},
        {"op": "evict", "num_pages": 5},
    )
    assert said == [
        "open a, 3 tokens: 0 cached",
        "append 3 tokens to a: new pages 0-1",
        "commit 3 tokens of a: 1 page published",
        "fork a to b",
        "append 2 tokens to b: page 1 copied to 2, new page 3",
        "append 1 token to b: room in its last page",
        "truncate b to 3 tokens: gives back page 3",
        "truncate b to 1 token: gives back page 2",
        "close a",
        "close b",
        "open c, 3 tokens: 2 cached",
        "close c",
        "evict: 1 page freed",
    ]


def names(replay):
    return sorted(replay.names.values())


def test_letters_stay_for_the_whole_trace():
    def opened(name):
        return {"op": "open", "seq": name, "tokens": []}

    steps = [opened("chat 1"), opened("chat 2"), {"op": "close", "seq": "chat 1"}, opened("chat 3")]
    assert names(replayed(*steps)[0]) == ["B chat 2", "C chat 3"]
    assert names(replayed(*steps, opened("chat 1"))[0]) == ["A chat 1", "B chat 2", "C chat 3"]
    assert names(replayed(opened("q"), opened("Q"), opened("é"))[0]) == ["A Q", "B é", "Q"]


def test_letters_repeat_when_they_run_out():
    replay, _ = replayed(*({"op": "open", "seq": f"s{number}", "tokens": []} for number in range(30)))
    assert sorted(name.split()[0] for name in replay.names.values()) == sorted([*map(chr, range(65, 91)), *"ABCD"])
