"""Which keys a sequence of a HostTileCache has, after any number of puts and evictions."""

import random

from pagedkv.storage.tiles.host_sequences import KeysBySequence


def key_of(number):
    return (number % 5, 0, number // 5, "k")


def kept_by(index):
    return sum(map(len, index._new)) + sum(map(len, index._sorted.values()))


def expected(order, sequence):
    return [key for key in order if key[0] == sequence]


def test_keys_that_went_are_passed_over_and_those_that_came_again_stand_last():
    by_key = {}
    index = KeysBySequence(by_key)
    by_key.update({key_of(number): number for number in (0, 5, 10, 1)})
    index.add([key_of(number) for number in (0, 5, 10, 1)])
    assert index.of_sequence(0) == [key_of(0), key_of(5), key_of(10)]
    del by_key[key_of(5)]
    assert index.of_sequence(0) == [key_of(0), key_of(10)]
    by_key[key_of(0)] = by_key.pop(key_of(0))
    index.add([key_of(0)])
    assert index.of_sequence(0) == [key_of(10), key_of(0)]
    assert index.of_sequence(1) == [key_of(1)]
    assert index.of_sequence(4) == []


def test_it_agrees_with_a_list_and_stays_small():
    source = random.Random(0)
    by_key, order = {}, []
    index = KeysBySequence(by_key)
    for _ in range(400):
        new = [key for key in {key_of(source.randrange(900)) for _ in range(60)} if key not in by_key]
        by_key.update(dict.fromkeys(new, 0))
        order += new
        index.add(new)
        gone = set(order[:50]) if source.random() < 0.5 else set(source.sample(order, min(50, len(order))))
        for key in gone:
            del by_key[key]
        order = [key for key in order if key not in gone]
        if source.random() < 0.2:
            sequence = source.randrange(5)
            assert index.of_sequence(sequence) == expected(order, sequence)
        assert kept_by(index) <= 2 * 900 + 1024
    assert [index.of_sequence(sequence) for sequence in range(5)] == [expected(order, s) for s in range(5)]


def test_the_same_keys_put_and_removed_for_ever_cost_no_more():
    by_key = {}
    index = KeysBySequence(by_key)
    keys = [key_of(number) for number in range(100)]
    for _ in range(1000):
        by_key.update(dict.fromkeys(keys, 0))
        index.add(keys)
        by_key.clear()
    assert kept_by(index) <= 2 * 100 + 1024 + 100
