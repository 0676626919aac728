"""Pictures as SVG: one document that an XML parser reads, that refers to nothing, and that stays within its bounds."""

import re
import xml.etree.ElementTree as ET

import pytest

from pagedkv import KVCacheManager
from pagedkv.management.draw import draw

NAMESPACE = "{http://www.w3.org/2000/svg}"
CHAR = 7.3


def publish(manager, tokens, namespace=None):
    seq = manager.open(tokens, namespace)
    seq.append(len(tokens) - seq.num_tokens)
    seq.commit(tokens)
    return seq


def ten_pages():
    manager = KVCacheManager(10, page_size=4)
    a = publish(manager, list(range(10, 20)))
    b = publish(manager, [10, 11, 12, 13, 14, 15, 30, 31])
    c = a.fork()
    c.append(1)
    publish(manager, list(range(50, 58))).close()
    return manager, a, b, c


def parsed(manager, **options):
    return ET.fromstring(draw(manager, form="svg", **options).encode("utf-8"))


def elements(root, tag):
    return [element for element in root if element.tag == NAMESPACE + tag]


def texts(root):
    return [element.text for element in elements(root, "text")]


def number(element, name):
    return float(element.get(name, "0"))


def test_document_is_of_svg_alone():
    document = draw(ten_pages()[0], form="svg")
    root = ET.fromstring(document)
    assert root.tag == f"{NAMESPACE}svg"
    assert {element.tag for element in root} == {NAMESPACE + tag for tag in ("rect", "text", "path")}
    assert re.findall(r"https?://[^\"]*", document) == ["http://www.w3.org/2000/svg"]
    for word in ("href", "url(", "<script", "<style", "<!", "@import"):
        assert word not in document, word
    assert not re.search(r"\son\w+=", document)


def test_symbols_and_counts_are_those_of_the_text():
    manager, *_ = ten_pages()
    found = texts(parsed(manager))
    assert [text for text in found if len(text) == 1 and not text.isdigit()] == [*"##aBc==", *"ABC"]
    for item in (". free 3", "a owned 5", "+ shared 2", "= cached 2", "A # ! pinned 3"):
        assert item in found
    assert "8 tokens, pages 0, 3" in found


def test_pinned_pages_have_a_frame_and_shared_ones_stripes():
    manager, *_ = ten_pages()
    rects = elements(parsed(manager, tree=False), "rect")
    frames = [rect for rect in rects if rect.get("fill") == "none"]
    assert len(frames) == manager.stats().published - manager.stats().evictable == 3
    first = [rect.get("fill") for rect in rects[1:4]]
    second = [rect.get("fill") for rect in rects[5:7]]
    assert len(set(first)) == 3, "page 0 has the colours of a, b and c"
    assert second == [first[0], first[2]]


@pytest.mark.parametrize("name", ["<b>&amp;\"'", "a\x00\x1b\x0bb", "\ud800 ]]>", "x" * 1000])
def test_hostile_text_is_escaped(name):
    manager, a, *_ = ten_pages()
    publish(manager, [1, 2, 3, 4], namespace=name).close()
    found = " ".join(texts(parsed(manager, names={a: name}, decode=lambda ids: name)))
    assert ("<b>&amp;\"'" in found) == (name == "<b>&amp;\"'")
    assert "\x1b" not in found
    assert max(map(len, texts(parsed(manager, decode=lambda ids: name)))) < 120


def assert_within_bounds(root):
    width, height = number(root, "width"), number(root, "height")
    assert root.get("viewBox") == f"0 0 {width:g} {height:g}"
    for rect in elements(root, "rect"):
        x, y = number(rect, "x"), number(rect, "y")
        assert min(x, y) >= 0
        assert x + number(rect, "width") <= width
        assert y + number(rect, "height") <= height
    for text in elements(root, "text"):
        taken = len(text.text) * CHAR
        start = number(text, "x") - {"middle": taken / 2, "end": taken}.get(text.get("text-anchor"), 0)
        assert start >= 0
        assert start + taken <= width, text.text
        assert 0 < number(text, "y") <= height


@pytest.mark.parametrize("width", [400, 800, 1600])
@pytest.mark.parametrize("num_pages", [1, 64, 1000, 100_000])
def test_everything_is_within_the_sheet(width, num_pages):
    manager = KVCacheManager(num_pages, page_size=1)
    history = []
    for turn in range(min(num_pages // 2, 60)):
        publish(manager, [*history, 10_000_000 + turn], "tenant " * 30)
        history.append(turn)
    root = parsed(manager, width=width, max_rows=200)
    assert number(root, "width") == width
    assert_within_bounds(root)


def test_large_pool_is_a_small_document():
    manager = KVCacheManager(100_000, page_size=16)
    for first in range(3000):
        seq = publish(manager, [first] * 16 * 20)
        if first % 3:
            seq.close()
    document = draw(manager, form="svg", max_rows=1000)
    assert len(document) < 1_000_000
    assert len(draw(manager, form="svg")) < 400_000
    root = ET.fromstring(document)
    assert len(elements(root, "rect")) < 16_000
    assert number(root, "height") < 30_000


def test_same_state_same_document():
    assert draw(ten_pages()[0], form="svg") == draw(ten_pages()[0], form="svg")


def test_without_prefix_cache():
    manager = KVCacheManager(4, page_size=2, prefix_cache=False)
    manager.open([1]).append(3)
    assert texts(parsed(manager))[-1] == "no prefix cache"
    assert "no prefix cache" not in texts(parsed(manager, tree=False))
