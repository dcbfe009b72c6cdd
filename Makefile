# VENV=DIR reuses a virtual environment (a fresh one takes some 6 GB); PYTHON is only used to make it.
VENV ?= .venv
PYTHON ?= python3
RUN = $(VENV)/bin/python
DEMO = --dataset demo --img-size 96
FUSIONS = none film attention cross-attention bimodal

.PHONY: test test-browser test-spark demo clean

test: $(VENV)/dev
	$(RUN) -m pytest

# Opens report pages in Debian's chromium (apt-get install chromium chromium-driver), headless.
test-browser: $(VENV)/dev
	$(RUN) -m pytest tests/browser_report.py

# Needs Java 17 or later; pyspark takes half a GB.
test-spark: $(VENV)/dev
	$(RUN) -m pip install --quiet 'pyspark>=4.1'
	$(RUN) -m pytest tests/spark_example.py

demo: $(VENV)/run
	$(RUN) demo.py
	$(RUN) extract_features.py $(DEMO) --weights random --views 2 --overwrite
	for fusion in $(FUSIONS); do \
	  $(RUN) train.py $(DEMO) --fusion $$fusion --text-encoder data/demo/encoder --run-dir runs/demo-$$fusion \
	    --epochs 15 --lr 1e-3 --fusion-lr 1e-3 --overwrite || exit 1; \
	done
	$(RUN) evaluate.py --image-check --run $(FUSIONS:%=runs/demo-%)
	$(RUN) report.py --run $(FUSIONS:%=runs/demo-%)
	@echo "Open that page in a browser. Next, a post of your own:"
	@echo "  $(RUN) predict.py --run runs/demo-film --text 'Jordan in Paris' --image data/demo/images/test_0000.jpg"

$(VENV)/run: requirements.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/dev: requirements-dev.txt requirements.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet -r requirements-dev.txt
	touch $@

# What can be made again by itself; data, features and runs are yours to delete.
clean:
	rm -rf .venv .pytest_cache .hypothesis __pycache__ parts/__pycache__ tests/__pycache__ benchmarks/__pycache__ examples/__pycache__
