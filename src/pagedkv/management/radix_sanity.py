"""Proves that a radix tree agrees with itself, from its nodes, not from its counters.

The sentences, in the order they are checked; an IntegrityError quotes the first that does not hold:

    every namespace has one root
    a node has whole pages, and its parent files it under its first page
    a node knows how many pages are before it
    no page is at two positions of the tree
    a node is locked as often as handles name it and lock its children
    a node is not used later than its parent
    the queue holds the evictable nodes and no others
    the counters say what the nodes hold
"""

from __future__ import annotations

from ..errors import IntegrityError
from .prefix_cache import namespace_key
from .radix_node import RadixNode
from .radix_tree import RadixTree

__all__ = ["check_radix_tree"]


def check_radix_tree(tree: RadixTree, page_size: int) -> None:
    """Returns when every sentence above holds. Cost: a walk of the tree, all its tokens included."""
    nodes = list(tree.nodes())
    _check_roots(tree, [node for node in nodes if node.parent is None])
    for node in nodes:
        _check_run(node, page_size)
        _check_links(node)
    _check_pages(tree, nodes)
    defect = tree.defect()
    _require(not defect, defect, "the native core says so")


def _require(holds: bool, sentence: str, evidence: str) -> None:
    if not holds:
        raise IntegrityError(f"broken: {sentence}: {evidence}.")


def _check_roots(tree: RadixTree, roots: list[RadixNode]) -> None:
    known, found = tree.roots.keys(), {namespace_key(root.namespace) for root in roots}
    num_lost = len(found - known)
    holds = not num_lost and len(found) == len(roots)
    _require(
        holds, "every namespace has one root", f"{len(roots)} roots of {len(found)} namespaces, {num_lost} unknown"
    )


def _check_run(node: RadixNode, page_size: int) -> None:
    sentence = "a node has whole pages, and its parent files it under its first page"
    num_pages, num_tokens = node.pages.size, node.tokens.size
    fits = num_pages == node.num_pages and num_tokens == num_pages * page_size
    _require(fits, sentence, f"a node of {node.num_pages} pages holds {num_pages} pages and {num_tokens} tokens")
    _require(num_pages > 0 or node.parent is None, sentence, "a node has no pages")
    for key, child in node.children.items():
        is_filed = key == child.child_key == child.first_page_key() and child.parent is node
        _require(is_filed, sentence, f"{_name(child)} is filed wrongly")


def _check_links(node: RadixNode) -> None:
    if node.parent is None:
        return
    num_before = node.parent.num_before + node.parent.num_pages
    _require(
        node.num_before == num_before,
        "a node knows how many pages are before it",
        f"{_name(node)} says {node.num_before}, {num_before} are",
    )
    locks = node.anchors + sum(child.locks for child in node.children.values())
    _require(
        node.locks == locks and node.anchors >= 0,
        "a node is locked as often as handles name it and lock its children",
        f"{_name(node)} has {node.locks} locks, {node.anchors} of them by name, and should have {locks}",
    )
    _require(
        node.last_access <= node.parent.last_access,
        "a node is not used later than its parent",
        f"{_name(node)} is, at {node.last_access}",
    )
    _require(
        node.is_evictable == (node.queued_serial is not None),
        "the queue holds the evictable nodes and no others",
        f"{_name(node)} is {'not ' if node.is_evictable else ''}in it",
    )


def _check_pages(tree: RadixTree, nodes: list[RadixNode]) -> None:
    pages = [page for node in nodes for page in node.pages.tolist()]
    repeated = len(pages) - len(set(pages))
    _require(not repeated, "no page is at two positions of the tree", f"{repeated} are")
    sentence = "the counters say what the nodes hold"
    num_evictable = sum(node.num_pages for node in nodes if node.locks == 0)
    _require(tree.num_cached_pages == len(pages), sentence, f"{tree.num_cached_pages} pages counted, {len(pages)} held")
    counted = tree.num_evictable_pages
    _require(counted == num_evictable, sentence, f"{counted} pages counted as evictable, {num_evictable} are")
    marked = tree.held_mask(max(pages, default=-1) + 1)
    num_marked = int(marked.sum())
    agrees = num_marked == len(pages) and bool(marked[pages].all())
    _require(agrees, sentence, f"{num_marked} pages are marked as held, {len(pages)} are")


def _name(node: RadixNode) -> str:
    return f"the node of pages {node.pages[:8].tolist()}{'...' if node.num_pages > 8 else ''}"
