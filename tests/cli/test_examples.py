"""The programs in examples/ run, and print what they are meant to show."""

import runpy
import sys
from pathlib import Path

from pagedkv.cli.quiet import quiet_transformers

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def printed(name, capsys, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    return capsys.readouterr().out


def test_paged_attention_by_hand(capsys, monkeypatch):
    assert printed("paged_attention_by_hand", capsys, monkeypatch) == "(24, 8, 64)\n"


def test_prefix_sharing(capsys, monkeypatch):
    lines = printed("prefix_sharing", capsys, monkeypatch).splitlines()
    assert lines[0] == "8 of 12 tokens need no computing"
    assert lines[-1] == "4 pages stay cached, 60 are free"


def test_generate_with_paged_cache(capsys, monkeypatch, tiny_model_dir):
    with quiet_transformers():
        text = printed("generate_with_paged_cache", capsys, monkeypatch, tiny_model_dir)
    assert text.startswith("equal: True, ")


def test_every_example_is_run():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {
        name.removeprefix("test_") for name in globals() if name.startswith("test_")
    } - {"every_example_is_run"}
