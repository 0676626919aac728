"""`pagedkv inspect` as a user calls it: the story step by step, traces, pictures, and one line for what is wrong."""

import io
import json
import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pagedkv.cli.app import app

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).with_name("test_inspect_story.txt")
ESCAPE = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture
def invoke(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    runner = CliRunner()
    return lambda *arguments, **options: runner.invoke(app, ["inspect", *map(str, arguments)], **options)


def failure(result):
    """The one line of a command that failed as it should."""
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output
    assert len(result.stderr.strip().splitlines()) == 1
    return result.stderr.strip()


def trace_file(tmp_path, *steps):
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(step) + "\n" for step in steps))
    return path


POOL = {"op": "pool", "num_pages": 4, "page_size": 2}


def test_story_step_by_step(invoke):
    result = invoke()
    assert result.exit_code == 0, result.output
    assert result.stdout == GOLDEN.read_text()


def test_story_is_the_one_of_the_page(invoke):
    """The states that docs/prefix_caching.md shows, in their order, in the letters of that page."""
    page = (ROOT / "docs" / "prefix_caching.md").read_text()
    shown = re.findall(r"^>>> show\(\)\n(\S+)$", page, re.M)
    maps = re.findall(r"^     0 (\S+)$", invoke("--no-tree").stdout, re.M)
    letters = {".": "-", "+": "s", "#": "S", "=": "c"}
    states = ["".join(letters.get(cell, "O" if cell.isupper() else "o") for cell in cells) for cells in maps]
    remaining = iter(states)
    assert len(shown) == 13
    for state in shown:
        assert state in remaining, f"{state} does not follow"
    assert len(maps) == 29


def test_until_stops_after_so_many_steps(invoke):
    text = invoke("--until", 18).stdout
    assert re.findall(r"^ +(\d+)  ", text, re.M) == [str(number) for number in range(1, 19)]
    assert text.rstrip().endswith("└─ 5: 50 51 52 53  age 0")
    assert "10 free" in invoke("--until", 0).stdout or ". free 10" in invoke("--until", 0).stdout


def test_last_prints_the_last_state_only(invoke):
    whole, last = invoke("--until", 9).stdout, invoke("--until", 9, "--last").stdout
    assert whole.endswith(f"\nAt the end\n\n{last}")
    assert last.startswith("10 pages of 4 tokens, 3 sequences\n")


def test_no_tree(invoke):
    assert "prefix cache:" not in invoke("--no-tree").stdout


def test_trace_of_a_file_and_of_standard_input(invoke, tmp_path):
    path = trace_file(
        tmp_path,
        POOL,
        {"op": "open", "seq": "chat 7", "tokens": [1, 2, 3], "namespace": ["lora", 3], "note": "with a LoRA"},
        {"op": "append", "seq": "chat 7", "num_tokens": 3},
        {"op": "commit", "seq": "chat 7", "tokens": [1, 2, 3]},
    )
    result = invoke(path)
    assert result.exit_code == 0, result.output
    assert "\nwith a LoRA\n  1  open chat 7, 3 tokens: 0 cached\n     0 ....\n" in result.stdout
    assert "\nA chat 7: 3 tokens, pages 0-1\n" in result.stdout
    assert "\nnamespace ('lora', 3)\n└─ 0: 1 2  1 lock, age 0\n" in result.stdout
    assert invoke("-", input=path.read_text()).stdout == result.stdout


def test_full_pool_is_an_answer(invoke, tmp_path):
    path = trace_file(
        tmp_path,
        POOL,
        {"op": "open", "seq": "a", "tokens": []},
        {"op": "append", "seq": "a", "num_tokens": 9},
        {"op": "append", "seq": "a", "num_tokens": 8},
    )
    result = invoke(path)
    assert result.exit_code == 0
    assert "  2  append 9 tokens to a: cannot allocate 5 pages: 4 free, 0 evictable" in result.stdout
    assert "  3  append 8 tokens to a: new pages 0-3\n     0 aaaa\n" in result.stdout


def test_svg_is_written(invoke, tmp_path):
    path = tmp_path / "pages.svg"
    result = invoke("--until", 18, "--svg", path)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{path}: 10 pages after 18 steps\n"
    symbols = [element.text for element in ET.parse(path).getroot() if len(element.text or "") == 1]
    assert "".join(symbols) == "0##aBc=bbbbABC"


def test_colours_on_demand(invoke):
    plain, colored = invoke("--until", 9), invoke("--until", 9, "--color")
    assert "\x1b" not in plain.stdout
    assert "\x1b[" in colored.stdout
    assert ESCAPE.sub("", colored.stdout) == plain.stdout


@pytest.mark.parametrize("is_terminal, no_color, has_color", [(True, "", True), (True, "1", False), (False, "", False)])
def test_colours_by_default(is_terminal, no_color, has_color, monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    out.isatty = lambda: is_terminal
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setenv("NO_COLOR", no_color)
    app(["inspect", "--until", "3"], standalone_mode=False)
    assert (b"\x1b[" in out.buffer.getvalue()) == has_color


def test_terminal_without_box_drawing_characters(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    monkeypatch.setattr(sys, "stdout", out)
    app(["inspect", "--until", "3"], standalone_mode=False)
    assert b"?? 0-1: 10 11 12 13" in out.buffer.getvalue()


@pytest.mark.parametrize("width", [40, 60])
def test_width_of_the_lines(width, invoke):
    lines = invoke("--width", width, "--last", "--until", 18).stdout.splitlines()
    assert max(map(len, lines)) <= width


def test_file_that_is_missing(invoke):
    words = "pagedkv: trace must be a file that can be read, got '/does/not/exist' (No such file or directory)."
    assert failure(invoke("/does/not/exist")) == words


def test_file_that_is_no_text(invoke, tmp_path):
    path = tmp_path / "trace.bin"
    path.write_bytes(b'{"op": "\xff"}')
    assert "trace must be UTF-8 text, got" in failure(invoke(path))


def test_svg_that_cannot_be_written(invoke, tmp_path):
    assert "svg must be a path that can be written, got" in failure(invoke("--svg", tmp_path / "none" / "x.svg"))


def test_line_that_is_broken_is_named(invoke, tmp_path):
    path = trace_file(tmp_path, POOL, {"op": "open", "seq": "a", "tokens": [1]})
    path.write_text(path.read_text() + '{"op": "append", "seq": "a",\n')
    line = failure(invoke(path))
    assert f"{path}, line 3 must be a JSON object, got {{" in line


def test_step_that_cannot_be_done_is_named(invoke, tmp_path):
    path = trace_file(tmp_path, POOL, {"op": "open", "seq": "a", "tokens": [1, -1]})
    assert f"{path}, line 2: token_ids must be 0 or more, got -1 at position 1." in failure(invoke(path))
