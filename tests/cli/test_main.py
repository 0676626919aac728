"""The entry point, with and without the packages of its extra."""

import subprocess
import sys

import pytest

import pagedkv
from pagedkv.cli import main


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_main_without_the_extra_says_what_to_install(missing, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("pagedkv.cli.")]:
        monkeypatch.delitem(sys.modules, name)
    for name in [name for name in sys.modules if name.startswith(f"{missing}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(SystemExit, match=rf"pagedkv: .* needs {missing}, .* pip install 'pagedkv\[cli\]'"):
        main()


def test_main_with_another_module_missing_is_not_hidden(monkeypatch):
    monkeypatch.delitem(sys.modules, "pagedkv.cli.app", raising=False)
    monkeypatch.setitem(sys.modules, "pagedkv.cli.units", None)
    with pytest.raises(ModuleNotFoundError, match=r"pagedkv\.cli\.units"):
        main()


def test_module_runs_as_a_program():
    command = [sys.executable, "-m", "pagedkv.cli", "info"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"pagedkv             {pagedkv.__version__}" in done.stdout
    assert "back end reference  available" in done.stdout


def test_app_imports_no_model_code():
    code = "import sys, pagedkv.cli.app; sys.exit(any(m in sys.modules for m in ('transformers', 'triton')))"
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 0
