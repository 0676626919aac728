"""The ten-page world of docs/prefix_caching.md: every id on that page, and the books after every line of it."""

import doctest
import re
from pathlib import Path

import pytest

from pagedkv import check_integrity

PAGE = Path(__file__).resolve().parents[2] / "docs" / "prefix_caching.md"

# The states of the ten pages in the order of the page, so that the story itself cannot be edited away.
TRACE = [
    "ooo-------",  # allocate
    "OOo-------",  # commit
    "SOoO------",  # hit
    "SSsO------",  # fork
    "SSoOo-----",  # copy on write
    "SSoOoOOoo-",  # duplicates
    "SSoOocc---",  # close
    "SSoOocoooo",  # evict
    "SSoOocoooo",  # out of pages
    "SSoOoco---",  # roll back
    "SSococooo-",  # roll back into a published page
    "cc-c-c----",  # free
    "----------",
]


def examples():
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    return doctest.DocTestParser().get_examples("\n".join(blocks))


def run(one, world):
    """None, or what went wrong."""
    test = doctest.DocTest([one], world, PAGE.name, str(PAGE), 0, None)
    output = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    runner.run(test, out=output.append, clear_globs=False)
    world.update(test.globs)
    return "".join(output) or None


def test_every_line_of_the_page_and_the_books_after_it():
    world, shown = {}, []
    for one in examples():
        assert (wrong := run(one, world)) is None, wrong
        if "manager" in world:
            check_integrity(world["manager"])
        if one.source.strip() == "show()":
            shown.append(one.want.strip())
    assert shown == TRACE


@pytest.mark.parametrize("before, after", [("tensor([18])", "tensor([17])"), ("SSoOocc---", "SSoOoc----")])
def test_another_id_on_the_page_would_be_noticed(before, after):
    world, changed = {}, False
    for one in examples():
        if one.want.strip() == before:
            one.want, changed = after + "\n", True
            assert run(one, world) is not None
            break
        assert run(one, world) is None
    assert changed
