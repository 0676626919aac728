"""What is written is executed: snippets of the README and of docs/, examples in docstrings; named paths exist."""

import contextlib
import doctest
import importlib
import io
import pkgutil
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import pagedkv

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```", re.M | re.S)


def page_id(path):
    return str(path.relative_to(ROOT))


def snippets(path):
    """(first line, language, rest of the fence line, text) of every fenced block."""
    text = path.read_text()
    for match in FENCE.finditer(text):
        yield text[: match.start()].count("\n") + 1, match.group(1), match.group(2).strip(), match.group(3)


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_python_snippets_run_and_print_what_the_page_says(path, tmp_path, monkeypatch):
    """A ```text block right after a program is what it prints. A fence marked `no-run` says in the text why."""
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    printed = None
    for line, language, marks, text in snippets(path):
        if language == "python" and "no-run" not in marks:
            if ">>>" in text:
                run_doctest(text, namespace, f"{path.name}:{line}")
                printed = None
                continue
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile(text, f"{path.name}:{line}", "exec"), namespace)
            printed = out.getvalue()
        elif language == "text" and printed is not None and "output" in marks:
            assert printed.strip() == text.strip(), f"{path.name}:{line}"
            printed = None


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_quoted_sources_are_the_sources(path):
    """A fence marked `file=PATH` quotes a whole file, one marked `in=PATH` a part of it."""
    for line, _, marks, text in snippets(path):
        kind, _, name = marks.partition("=")
        if kind in ("file", "in"):
            source = (ROOT / name).read_text()
            assert source == text if kind == "file" else text in source, f"{path.name}:{line} does not quote {name}"


def run_doctest(text, namespace, name):
    test = doctest.DocTestParser().get_doctest(text, namespace, name, name, 0)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    out = io.StringIO()
    runner.run(test, out=out.write, clear_globs=False)
    assert runner.failures == 0, out.getvalue()
    namespace.update(test.globs)


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_paths_that_pages_name_exist(path):
    text = path.read_text()
    links = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", text)
    named = re.findall(r"`((?:src|csrc|tests|docs|benchmarks|examples|scripts)/[\w./-]+)`", text)
    missing = [link for link in links if not (path.parent / link).exists()]
    missing += [name for name in named if not (ROOT / name).exists()]
    assert not missing, f"{path.name} names what does not exist: {missing}"


def modules():
    skipped = ("pagedkv.cli", "pagedkv._native")
    names = [module.name for module in pkgutil.walk_packages(pagedkv.__path__, "pagedkv.")]
    return [name for name in names if not name.startswith(skipped)]


@pytest.mark.parametrize("name", modules())
def test_docstring_examples(name):
    finder = doctest.DocTestFinder(exclude_empty=True)
    public = {item: getattr(pagedkv, item) for item in pagedkv.__all__}
    for test in finder.find(importlib.import_module(name), extraglobs={"torch": torch, "np": np, **public}):
        if test.examples:
            run_doctest_object(test)


def run_doctest_object(test):
    out = io.StringIO()
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    runner.run(test, out=out.write)
    assert runner.failures == 0, out.getvalue()
