"""Streaming text: whole characters, and stop strings wherever they fall."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedkv.engine.text import Detokenizer, StopStrings, TextStream
from pagedkv.testing.tiny_models import byte_tokenizer

TOKENIZER = byte_tokenizer()


@given(st.text(max_size=20))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_detokenizer_pieces_are_whole_characters_and_add_up(text):
    detokenizer = Detokenizer(TOKENIZER)
    pieces = [detokenizer.push(token) for token in TOKENIZER(text)["input_ids"]]
    if "�" not in text:
        assert all("�" not in piece for piece in pieces)
    assert "".join(pieces) + detokenizer.flush() == text


def test_detokenizer_shows_an_unfinished_character_at_the_end_alone():
    detokenizer = Detokenizer(TOKENIZER)
    assert [detokenizer.push(token) for token in TOKENIZER("aé")["input_ids"][:2]] == ["a", ""]
    assert detokenizer.flush() == "�"
    assert detokenizer.flush() == ""


def test_special_tokens_are_no_text():
    detokenizer = Detokenizer(TOKENIZER)
    pieces = [detokenizer.push(token) for token in (*TOKENIZER("a")["input_ids"], 256, *TOKENIZER("b")["input_ids"])]
    assert "".join(pieces) == "ab"


@given(st.lists(st.text("abc", max_size=3), max_size=8), st.lists(st.text("abc", min_size=1, max_size=3), max_size=3))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_stop_strings_show_what_is_before_the_first(pieces, stops):
    """Against the whole text at once: however it is cut, nothing of a stop string is shown."""
    shown, finder, is_stopped = "", StopStrings(stops), False
    text = ""
    for piece in pieces:
        text += piece
        found = finder.push(piece)
        shown += found.text
        is_stopped = found.is_stopped
        if is_stopped:
            break
    ends = [text.index(stop) for stop in stops if stop in text]
    assert is_stopped == bool(ends)
    assert shown + ("" if is_stopped else finder.flush()) == (text[: min(ends)] if ends else text)


@pytest.mark.parametrize(
    ("stops", "expected"), [(("wör",), "hello "), (("d", "lo w"), "hel"), (("xyz",), "hello wörld")]
)
def test_stream_stops_across_tokens(stops, expected):
    stream = TextStream(TOKENIZER, stops)
    shown = ""
    for token in TOKENIZER("hello wörld")["input_ids"]:
        piece = stream.push(token)
        shown += piece.text
        if piece.is_stopped:
            break
    assert shown + stream.flush().text == expected
