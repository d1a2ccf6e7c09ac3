# Two commands for a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: demo test install lint clean

demo: $(VENV)/.installed
	$(BIN)/probity demo $(if $(ONCE),--once)

# Half of the tests wait, for servers and disks; the other half computes beside them.
test: $(VENV)/.installed-dev lint
	@$(BIN)/pytest tests/gpu tests/property tests/unit > .tests-beside.txt 2>&1 & beside=$$!; \
	$(BIN)/pytest tests/e2e tests/fault tests/integration; status=$$?; \
	wait $$beside || status=1; cat .tests-beside.txt; exit $$status

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# torch goes first, with its cap: an open range asked for by another package finds a build with gigabytes of CUDA.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "torch>=2.11,<2.14"
	touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	$(BIN)/pip install --quiet --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.torch pyproject.toml
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV)
