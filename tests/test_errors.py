import inspect
import pickle
import re

import pytest

from pagedkv import errors


def drawn_tree():
    """name -> parent, read off the drawing in the module docstring."""
    parents, path = {}, []
    for line in errors.__doc__.splitlines():
        match = re.match(r"^([│├└─ ]*)(\w+Error)\b", line)
        if match:
            depth = len(match.group(1)) // 4
            path[depth:] = [match.group(2)]
            parents[match.group(2)] = path[depth - 1] if depth else "Exception"
    return parents


def test_drawing_equals_classes():
    classes = {name: cls.__base__.__name__ for name, cls in vars(errors).items() if inspect.isclass(cls)}
    assert drawn_tree() == classes
    assert sorted(errors.__all__) == sorted(classes)


def test_out_of_pages_says_where_the_pages_are():
    error = errors.OutOfPagesError(5, free=2, evictable=1, pinned=61, num_sequences=7)
    assert str(error) == "cannot allocate 5 pages: 2 free, 1 evictable, 61 pinned by 7 sequences."
    assert (error.needed, error.free, error.evictable, error.pinned, error.num_sequences) == (5, 2, 1, 61, 7)


def test_out_of_pages_survives_pickling():
    error = pickle.loads(pickle.dumps(errors.OutOfPagesError(1, 0, 0, 4, 1)))
    assert str(error) == "cannot allocate 1 page: 0 free, 0 evictable, 4 pinned by 1 sequence."


def test_one_base_catches_all():
    for name in errors.__all__:
        assert issubclass(getattr(errors, name), errors.PagedKVError)
    with pytest.raises(errors.TierError, match="gone"):
        raise errors.CorruptPageError("gone")
