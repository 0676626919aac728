import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import pagedkv

# The names of the contract (docs/design of the package); a rename breaks users.
PROMISED = set(
    """
    KVCacheSpec MLACacheSpec calc_kv_cache_memory KVPool PageTable store_kv copy_pages gather_kv merge_states
    plan_attention paged_attention backends register_backend KVCacheManager check_integrity RadixCache PageAllocator
    fast_compare_key PagedKVError OutOfPagesError IntegrityError BackendUnavailableError TierError CorruptPageError
    TierUnavailableError quantize_kv dequantize_kv apply_rope RotaryEmbedding Llama31Scaling mla_attention store_mla
    MLAPool cascade_attention AttentionPlanBuffers rope_store_kv
    """.split()  # noqa: SIM905
)


def test_promised_names_are_public():
    assert not PROMISED - set(pagedkv.__all__)


def test_all_equals_what_is_public():
    public = {
        name
        for name, value in vars(pagedkv).items()
        if not name.startswith("_") and not isinstance(value, ModuleType) and name != "annotations"
    }
    assert sorted(pagedkv.__all__) == sorted(public)
    assert list(pagedkv.__all__) == sorted(pagedkv.__all__)


def modules():
    names = [module.name for module in pkgutil.walk_packages(pagedkv.__path__, "pagedkv.")]
    return [name for name in names if "._native" not in name and not name.endswith("__main__")]


@pytest.mark.parametrize("name", modules())
def test_every_module_lists_what_it_defines(name):
    module = importlib.import_module(name)
    listed = set(getattr(module, "__all__", ()))
    for item in listed:
        assert hasattr(module, item), f"{name}.__all__ lists {item}, which does not exist"
    if name.startswith("pagedkv.cli"):
        return
    for item, value in vars(module).items():
        defined_here = inspect.isfunction(value) or inspect.isclass(value)
        if defined_here and value.__module__ == name and not item.startswith("_"):
            assert item in listed or listed == set(), f"{name}.{item} is public but not in __all__"


@pytest.mark.parametrize("name", pagedkv.__all__)
def test_public_functions_and_classes_say_what_they_do(name):
    value = getattr(pagedkv, name)
    assert inspect.getdoc(value), f"{name} has no docstring"


def test_import_is_quiet():
    """No transformers, no Triton, no thread, no CUDA, no native library: only definitions."""
    code = (
        "import threading, sys, pagedkv, torch;"
        "heavy = {'transformers', 'triton', 'typer', 'rich', 'fastapi'} & set(sys.modules);"
        "assert not heavy, heavy;"
        "assert threading.active_count() == 1;"
        "assert not torch.cuda.is_initialized();"
        "assert 'libpagedkv' not in open('/proc/self/maps').read()"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_changelog_and_package_agree_on_the_version():
    root = Path(__file__).resolve().parent.parent
    newest = re.search(r"^## (\S+?),", (root / "CHANGELOG.md").read_text(), re.M)
    project = re.search(r'^version = "(.+)"', (root / "pyproject.toml").read_text(), re.M)
    assert newest
    assert project
    assert newest.group(1) == project.group(1) == pagedkv.__version__
