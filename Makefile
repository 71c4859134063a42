# Every target does its own set-up: a virtual environment with pinned packages, and the base model in the cache folder.
.DEFAULT_GOAL := help
# Any Python from 3.11 on; the first of these that there is.
PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3.13 python3.14 python3,$(if $(shell command -v $(name)),$(name))) python3.11)
ENGINE ?= native
# The build of vLLM: cpu or cuda. Each has an environment of its own.
DEVICE ?= cpu
VLLM_FILE := $(if $(filter cuda,$(DEVICE)),k8s/image/requirements-vllm.txt,gpu_worker/vllm/requirements.txt)
VENV := .venv$(if $(filter vllm,$(ENGINE)),-vllm$(if $(filter cuda,$(DEVICE)),-cuda))
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export RAY_AUTH_MODE := token
# Some images set it. Then each of a hundred processes of the tests compiles the modules that it imports.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup serve demo bench quick test coverage test-clients test-e2e test-vllm docs gpu paper soak check lint types helm image-test kernels sanitize

help: ## show this list
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## /\1\t/' | expand -t 14

# ENGINE=vllm installs vLLM too: see gpu_worker/vllm/requirements.txt.
$(READY): pyproject.toml constraints.txt $(if $(filter vllm,$(ENGINE)),$(VLLM_FILE))
	@echo "installing about 1 GB of packages into $(VENV): this takes a few minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[local,test]'
	$(if $(filter vllm,$(ENGINE)),$(BIN)/python -m pip install --progress-bar off --no-deps -r $(VLLM_FILE))
	touch $(READY)

setup: $(READY) ## install everything into .venv; ENGINE=vllm, and DEVICE=cuda for a GPU, into others

# The folder of a base model. It is served with an empty pool, in a folder of its own: adapters belong to one base.
BASE =
STARTER_OPTIONS = --preload examples/starter_pool --config examples/$(if $(filter vllm,$(ENGINE)),vllm,starter).yaml
BASE_OPTIONS = --base-model $(BASE) --store $(notdir $(abspath $(BASE)))-pool \
	$(if $(filter vllm,$(ENGINE)),--config examples/vllm_engine.yaml)
serve: $(READY) ## start the server on http://127.0.0.1:8000, with the starter pool or BASE=FOLDER; ENGINE=vllm; ARGS="--port 8001"
	$(BIN)/loraretriever serve $(if $(BASE),$(BASE_OPTIONS),$(STARTER_OPTIONS)) $(ARGS)

demo: $(READY) ## answer the starter pool's held-out prompts with every strategy, print the table, stop
	$(BIN)/python -m examples.demo $(ARGS)

bench: $(READY) ## other projects' load clients against this server and vLLM; ARGS="--vllm-python … --guidellm …"
	$(BIN)/python -m benchmarks.load $(ARGS)

# Before many processes of tests need it at once.
FILLED := $(VENV)/.cache-filled
$(FILLED): $(READY) $(wildcard gpu_worker/native/kernels/*.cpp gpu_worker/native/kernels/*.h)
	$(BIN)/python -m tests.fill_cache
	touch $@

# Named, since collecting all tests takes half a minute.
E2E_TESTS := tests/cluster tests/servers tests/e2e
# In one process: two servers that start at once may exceed the thirty seconds that Ray gives itself on a slow machine.
test: $(FILLED) ## run every test: those without a server two at a time, then those with servers
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not e2e"
	$(BIN)/python -m pytest $(E2E_TESTS)

coverage: $(READY) ## run the tests without a running application and print which lines they reach
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not e2e" --cov

test-e2e: $(READY) ## run the tests that start a server, with ENGINE=native or ENGINE=vllm
	ENGINE=$(ENGINE) $(BIN)/python -m pytest -m e2e $(or $(ARGS),$(E2E_TESTS))

test-vllm: ## install vLLM into .venv-vllm and run the tests of both engines there
	$(MAKE) ENGINE=vllm .venv-vllm/.ready
	OMP_NUM_THREADS=1 .venv-vllm/bin/python -m pytest tests/gpu_worker/conformance tests/gpu_worker/vllm \
		tests/benchmarks/gpu/test_kernels.py $(ARGS)

# Tests of the pure packages: they load no model and start no Ray.
# Left out: what starts a server or other processes, loads a model, or takes long.
QUICK_TESTS := tests/lora_store tests/retriever_svc tests/docs tests/deployments/api tests/deployments/config \
	tests/test_imports.py
NOT_QUICK := $(addprefix --ignore=tests/,$(addprefix lora_store/test_store_,crash.py concurrency.py memory.py) \
	$(addprefix retriever_svc/test_,bfloat16_linear.py openvino_network.py encoder.py encoder_files.py training.py calibration_attacks.py) \
	$(addprefix docs/test_,examples.py generated_pages.py screenshots.py site.py) lora_store/test_catalogue_folding.py lora_store/test_snapshot_visible_changes.py)
quick: $(READY) ## run the tests that need no model and no Ray, in under a minute
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -x -k "not s3 and not endpoint and not run_models" $(QUICK_TESTS) $(NOT_QUICK)

# LlamaIndex needs an older transformers than the server, and other frameworks other versions of what the server uses, so
# both have environments of their own. frameworks.txt names what the tests use, frameworks-constraints.txt the exact
# versions of all that it brings. The source distribution of `jsonschema` contains JSON Schema's own test suite.
CLIENTS_READY := $(VENV)/.clients-ready
$(CLIENTS_READY): $(READY) $(addprefix tests/clients/,package.json llama_index.txt frameworks.txt frameworks-constraints.txt)
	$(BIN)/python -m pip install --progress-bar off --no-compile -c constraints.txt -e '.[clients]'
	$(PYTHON) -m venv $(VENV)/llama-index
	$(VENV)/llama-index/bin/python -m pip install --progress-bar off --no-compile -r tests/clients/llama_index.txt
	$(PYTHON) -m venv $(VENV)/frameworks
	$(VENV)/frameworks/bin/python -m pip install --progress-bar off --no-compile -c tests/clients/frameworks-constraints.txt -r tests/clients/frameworks.txt
	$(BIN)/python -m pip download --progress-bar off -c constraints.txt --no-deps --no-binary jsonschema -d $(VENV)/json-schema jsonschema
	mkdir -p $(VENV)/node && cp tests/clients/package.json $(VENV)/node
	if command -v npm; then cd $(VENV)/node && npm install --no-package-lock --ignore-scripts; fi
	touch $(CLIENTS_READY)

test-clients: $(CLIENTS_READY) ## run other projects' clients against the server, and axe-core against the console
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/clients tests/gpu_worker/conformance/test_schema_suite.py \
		tests/deployments/test_console_accessibility.py $(ARGS)

docs: $(READY) ## build the documentation into build/docs, and fail on broken links and stale pages
	$(BIN)/python -m docs.generate --check
	$(BIN)/mkdocs build --strict --quiet

gpu: ## check and measure both engines on a GPU within nine minutes, installation not counted; see docs/benchmarks/index.md
	$(MAKE) ENGINE=vllm DEVICE=cuda .venv-vllm-cuda/.ready
	.venv-vllm-cuda/bin/python -m benchmarks.gpu $(ARGS)

paper: $(READY) ## the paper's main claims on 46 adapters, resumed where it stopped; ARGS=--quick: ten minutes, no results
	$(BIN)/python -m pip install --progress-bar off -c constraints.txt -e '.[bench]'
	$(BIN)/python -m benchmarks.paper all $(ARGS)

soak: $(CLIENTS_READY) ## run the tests that have full counts at those; reports in benchmarks/results/soak/
	$(BIN)/python -m pytest --scale full $(ARGS)

kernels: $(READY) ## build the CPU kernels ahead of time, as the image does; a start then compiles nothing
	$(BIN)/python -m gpu_worker.native.kernels.build_kernels --out gpu_worker/native/kernels/prebuilt

# `-s` because a finding ends the process, and its report would be lost with what pytest captured.
# The preloaded libraries come with g++. Python and torch never free everything, so leaks are not looked for. Without
# AVX-512, as g++ 12 aligns its vectors wrongly on a stack that it checks (GCC bug 110027).
KERNEL_TESTS := $(addprefix tests/gpu_worker/,native/attention/test_decode_attention.py \
	native/attention/test_attention_cpu.py native/test_fused.py model/test_packed_linear.py \
	model/test_grouped_mapping.py native/test_compiled_layer.py native/test_compiled_decoder.py native/sampling)
sanitize: $(READY) ## run the kernels' tests with checks of addresses and undefined behaviour
	CXX=g++ CXXFLAGS="-g -mno-avx512f -fsanitize=address,undefined -fno-sanitize-recover=all" CI_REQUIRES_COMPILER=1 \
	ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$$(for name in libasan.so libubsan.so libstdc++.so.6; \
		do g++ -print-file-name=$$name; done | paste -sd:)" \
	$(BIN)/python -m pytest -s $(KERNEL_TESTS)

image-test: $(READY) ## build the image with buildah, on Debian's packages, and get a completion from it: as root, 15 minutes
	CI_REQUIRES_BUILDAH=1 $(BIN)/python -m pytest --scale full tests/k8s/test_image_build.py $(ARGS)

helm: $(BIN)/helm ## install Helm, for x86-64 machines, with which tests/k8s renders the chart
$(BIN)/helm: $(READY)
	$(BIN)/python -m tests.k8s.install_helm $@

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(READY)
	$(BIN)/mypy

check: lint types test ## what CI runs: lint, types, tests
