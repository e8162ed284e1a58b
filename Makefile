# Environments are made once; a change of the requirements makes them anew.
#
#   make demo         train, fine-tune and compare on images of clothes; writes demo.png
#   make test         run the tests
#   make test-slow    run the tests that take longer: searches in other processes
#   make test-oldest  run scikit-learn's checks under the oldest supported versions
#   make test-built   build the wheel and the source archive, and run the README with each of them
#   make test-nightly run the tests under the newest versions there are, also unreleased ones
#   make coverage     run the tests and report the lines and branches of skood that they miss
#   make mutants      break calibration, labels and metrics on purpose: do their tests notice?
#   make lint         style, types and docstrings
#   make docs         build the site into docs/_build/html; a warning is an error
#   make clean        remove everything that these make, environments included
#
#   PYTHON=python3.12  another interpreter
#   INDEX=URL          another wheel index beside the default one

PYTHON ?= python3
INDEX ?=

REQUIREMENTS := pyproject.toml constraints-common.txt

.PHONY: demo test test-slow test-oldest test-built test-nightly coverage mutants lint docs clean

demo: .venv/demo.stamp
	MPLBACKEND=Agg .venv/bin/python examples/plot_clothes.py

# Small networks are quickest on one thread, and tests have one a worker. scipy's array API is switched
# on so that scikit-learn skips no check.
demo docs test test-slow test-oldest test-built test-nightly coverage mutants: export OMP_NUM_THREADS = 1
test test-slow test-oldest test-nightly coverage mutants: export SCIPY_ARRAY_API = 1

test: .venv/dev.stamp
	.venv/bin/pytest -n 2

test-slow: .venv/dev.stamp
	.venv/bin/pytest -m slow

test-oldest: .venv-oldest/test.stamp
	.venv-oldest/bin/pytest -n 2 tests/test_sklearn_contract.py

test-built: .venv-built/torch.stamp .venv/dev.stamp
	rm -rf dist
	.venv/bin/python -m build
	for file in dist/*.whl dist/*.tar.gz; do \
	    .venv-built/bin/python -m pip uninstall --yes skood && \
	    .venv-built/bin/python -m pip install $(addprefix --extra-index-url ,$(INDEX)) \
	        -c constraints.txt $$file && \
	    .venv-built/bin/python tests/built.py || exit 1; \
	done

test-nightly: .venv-nightly/test.stamp
	.venv-nightly/bin/pytest -n 2

coverage: .venv/dev.stamp
	.venv/bin/pytest -n 2 --cov --cov-fail-under=95

# What survives is explained in tests/mutants.md.
mutants: .venv/mutants.stamp
	rm -rf mutants
	.venv/bin/mutmut run --max-children 2
	.venv/bin/mutmut results

lint: .venv/dev.stamp
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/numpydoc lint $(addprefix skood/,detector.py rejection.py exceptions.py penalties.py \
	    calibration.py metrics.py monitoring.py reporting.py networks.py datasets.py scores/*.py \
	    model_selection/*.py plotting/*.py)

# Pages of names that are gone would warn.
docs: .venv/dev.stamp
	rm -rf docs/api docs/results docs/speed
	.venv/bin/sphinx-build -W --keep-going -b html docs docs/_build/html

clean:
	rm -rf .venv .venv-oldest .venv-built .venv-nightly .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage* mutants
	rm -rf build dist skood.egg-info docs/_build docs/api/generated docs/gallery docs/results docs/speed
	rm -f demo.png examples/demo.png docs/sg_execution_times.rst
	find benchmarks docs examples skood tests -name __pycache__ -exec rm -rf {} +

# $(call install,environment,constraints,extras): torch comes first, at its pinned version, so that
# nothing else draws in another build of it.
define install
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else \
	    "skood needs Python 3.11 or newer; name one, as in: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install $(addprefix --extra-index-url ,$(INDEX)) -c $(2) torch
	$(1)/bin/python -m pip install $(addprefix --extra-index-url ,$(INDEX)) -c $(2) -e '.[$(3)]'
endef

.venv/demo.stamp: $(REQUIREMENTS) constraints.txt
	$(call install,.venv,constraints.txt,plot)
	touch $@

.venv/dev.stamp: $(REQUIREMENTS) constraints.txt
	$(call install,.venv,constraints.txt,dev)
	touch .venv/demo.stamp $@

.venv/mutants.stamp: $(REQUIREMENTS) constraints.txt
	$(call install,.venv,constraints.txt,mutants)
	touch $@

.venv-built/torch.stamp: $(REQUIREMENTS) constraints.txt
	$(PYTHON) -m venv .venv-built
	.venv-built/bin/python -m pip install $(addprefix --extra-index-url ,$(INDEX)) \
	    -c constraints.txt torch
	touch $@

.venv-nightly/test.stamp: $(REQUIREMENTS)
	$(PYTHON) -m venv .venv-nightly
	.venv-nightly/bin/python -m pip install --pre $(addprefix --extra-index-url ,$(INDEX)) \
	    -e '.[test]'
	touch $@

.venv-oldest/test.stamp: $(REQUIREMENTS) constraints-oldest.txt
	$(call install,.venv-oldest,constraints-oldest.txt,test)
	touch $@
