# Every target makes the virtual environment .venv and installs what it needs; what is up to date is not done again.
#   make demo TORCH=torch==2.14.1 PYTHON=python3.12    on a fresh .venv, to choose another torch or Python
#   make clean && FASTLM_PURE=1 make test              without compiled kernels

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin

CXX_SOURCES := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.inl')

.PHONY: help demo test test-full fuzz sanitize bench lint clean distclean
help:
	@echo "make demo       train the same model with torch.nn.GRU and with fastlm and compare (under 4 minutes)"
	@echo "make test       the tests"
	@echo "make test-full  the tests on the full grid of shapes and options"
	@echo "make fuzz       random calls against the reference; N=1000000 for more than 20000, FIRST=20000 for others"
	@echo "make sanitize   the kernels under AddressSanitizer, UBSan and ThreadSanitizer (needs g++ alone)"
	@echo "make bench      the benchmarks; writes benchmarks/results and the tables made of them"
	@echo "make lint       ruff, mypy and clang-format"
	@echo "make clean      removes what was built; make distclean also .venv"

demo: $(VENV)/.kernels
	$(BIN)/python -m fastlm.demo

# Every test has one torch thread but where two are the point, so that processes share the cores well.
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal

test: $(VENV)/.kernels
	$(PYTEST)

test-full: $(VENV)/.kernels
	FASTLM_TEST_FULL=1 $(PYTEST)

N ?= 20000
FIRST ?= 0
fuzz: $(VENV)/.kernels
	$(BIN)/python -m tests.fuzz --calls $(N) --first $(FIRST)

# Without torch: csrc/cpu and a driver of its own, which takes its place.
SANITIZE_SOURCES := $(filter-out csrc/bindings/%,$(filter %.cpp,$(CXX_SOURCES))) tests/sanitize/driver.cpp
SANITIZE_FLAGS := -std=c++17 -O1 -g1 -ffp-contract=off -Wall -Wno-psabi -Icsrc -DFASTLM_WIDE_ISA=1 -fno-sanitize-recover=all
sanitize:
	$(MAKE) -j2 build/sanitize/address,undefined/driver build/sanitize/thread/driver
	build/sanitize/address,undefined/driver
	build/sanitize/thread/driver fastest

build/sanitize/%/driver: $(CXX_SOURCES) tests/sanitize/driver.cpp
	$(MAKE) $(SANITIZE_SOURCES:%.cpp=build/sanitize/$*/%.o) SANITIZE=$*
	$(CXX) -fsanitize=$* -pthread $(SANITIZE_SOURCES:%.cpp=build/sanitize/$*/%.o) -o $@

build/sanitize/$(SANITIZE)/%.o: %.cpp $(CXX_SOURCES)
	@mkdir -p $(@D)
	$(CXX) -fsanitize=$(SANITIZE) $(SANITIZE_FLAGS) -c $< -o $@

bench: $(VENV)/.kernels
	$(BIN)/python benchmarks/run.py
	$(BIN)/python benchmarks/report.py --tables benchmarks/AVX2.md

lint: $(VENV)/.package
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES) tests/sanitize/driver.cpp

clean:
	rm -rf build dist *.egg-info fastlm/*.so $(VENV)/.kernels .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find fastlm tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)

# torch comes first and from its own line, so that nothing below can choose another.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install $(TORCH)
	$(BIN)/pip install "setuptools>=77" wheel ninja pybind11
	touch $@

# Installs a link to this folder, nothing is compiled; CONTRIBUTING.md says why the two are apart.
$(VENV)/.package: $(VENV)/.torch pyproject.toml
	FASTLM_PURE=1 $(BIN)/pip install --no-build-isolation -e '.[demo,test,lint,bench]'
	touch $@

# Compiles into this folder; ninja compiles again only what changed.
$(VENV)/.kernels: $(VENV)/.package setup.py $(CXX_SOURCES)
	$(BIN)/python setup.py build_ext --inplace
	touch $@
