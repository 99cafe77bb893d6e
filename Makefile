# Set up, run and test on one machine. Needs make and Python 3.11 or newer with venv; README says what each target does.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
# Written last, removed first: without it the environment counts as half made and is made anew.
STAMP := $(VENV)/.complete

.PHONY: setup run lint test

setup: $(STAMP)

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; ok = sys.version_info >= (3, 11); ok or sys.exit("Python 3.11 or newer is needed, $(PYTHON) is %d.%d: say make PYTHON=python3.11" % sys.version_info[:2])'
	@if [ ! -e $(STAMP) ]; then echo "making $(VENV)"; $(PYTHON) -m venv --clear $(VENV); fi
	@rm -f $(STAMP)
	$(PIP) install --quiet --require-hashes --only-binary :all: -r requirements.lock
	$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	@touch $(STAMP)

run: setup
	$(BIN)/balances up $(if $(FOR),--for $(FOR))

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# In the order of their names: the long tests of processes come first, the quick ones fill what is left at the end.
test: lint
	$(BIN)/python -m pytest -n 4 --dist loadfile --no-loadscope-reorder

# Not part of `test`: ten minutes unless told otherwise, e.g. `make torture SECONDS=180 SEED=3`. See docs/reliability.md.
.PHONY: torture
torture: setup
	$(BIN)/python tests/torture/torture.py --seconds $(or $(SECONDS),600) --seed $(or $(SEED),1) $(if $(REPORT),--report $(REPORT))

# Not part of `test`, which needs no network: asks PyPI for known vulnerabilities of every locked version. `--strict`: a
# package that the source does not know counts as a failure, or an index without advisories would pass for a clean one.
.PHONY: audit
audit:
	@set -e; at=$$(mktemp -d); trap 'rm -rf "$$at"' EXIT; $(PYTHON) -m venv "$$at"; \
	"$$at/bin/python" -m pip install --quiet --disable-pip-version-check --no-input pip-audit; \
	"$$at/bin/pip-audit" --strict --disable-pip --require-hashes --progress-spinner off -r requirements.lock

# Not part of `test` either: twenty minutes, `make bench LONG=1` longer, `make bench ONLY=poll,dispatch` less. What it is
# compared with is installed in environments of its own: arq needs an older redis than the others.
.PHONY: bench
bench: setup .bench/peers/.complete .bench/arq/.complete
	$(BIN)/python tests/bench/bench.py --page docs/performance.md $(if $(ONLY),--only $(ONLY)) $(if $(LONG),--long)

.bench/%/.complete: tests/bench/requirements-%.lock
	$(PYTHON) -m venv --clear .bench/$*
	.bench/$*/bin/python -m pip --disable-pip-version-check --no-input install --quiet --require-hashes --only-binary :all: -r $<
	@touch $@
