import numpy as np

from pagedkv.management.radix_node import RadixNode


def make_node(num_pages=4, page_size=2):
    root = RadixNode(None, np.empty(0, np.int64), np.empty(0, np.int32), page_size, time=0)
    tokens, pages = np.arange(num_pages * page_size), np.arange(10, 10 + num_pages, dtype=np.int32)
    node = RadixNode(root, tokens, pages, page_size, time=3)
    root.children[node.child_key] = node
    return root, node


def test_split_keeps_the_end_and_files_both_parts_anew():
    root, node = make_node()
    node.locks, node.anchors, node.num_hits, node.last_access, node.priority = 2, 1, 5, 9, 3
    prefix = node.split(1)
    assert (prefix.tokens.tolist(), prefix.pages.tolist()) == ([0, 1], [10])
    assert (node.tokens.tolist(), node.pages.tolist()) == ([2, 3, 4, 5, 6, 7], [11, 12, 13])
    assert (prefix.locks, prefix.anchors, prefix.num_hits, prefix.last_access, prefix.created) == (2, 0, 5, 9, 3)
    assert (node.locks, node.anchors, node.version, prefix.priority) == (2, 1, 0, 3)
    assert root.children == {np.array([0, 1]).tobytes(): prefix}
    assert prefix.children == {np.array([2, 3]).tobytes(): node}
    assert (prefix.parent, node.parent) == (root, prefix)


def test_parts_of_a_split_own_their_memory():
    _, node = make_node(num_pages=1000)
    prefix = node.split(1)
    assert prefix.num_bytes == 8 * 2 + 4
    assert not np.shares_memory(prefix.tokens, node.tokens)


def test_trim_returns_the_last_pages():
    _, node = make_node()
    assert node.trim(3).tolist() == [11, 12, 13]
    assert (node.tokens.tolist(), node.num_pages, node.version) == ([0, 1], 1, 1)


def test_only_an_unlocked_leaf_is_evictable():
    root, node = make_node()
    assert node.is_evictable
    assert not root.is_evictable
    node.locks = 1
    assert not node.is_evictable
    node.locks = 0
    assert not node.split(2).is_evictable
    assert node.is_evictable
    node.detach()
    assert not node.is_evictable
