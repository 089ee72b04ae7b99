# make setup   a .venv with everything in it        make demo   the main job, from videos to a report
# make test    all tests, the fast ones first       make lint   ruff and mypy
# make soak    the same claims, sampled deeper
PYTHON ?= python3
BIN := .venv/bin
TORCH := $(shell grep '^torch==' constraints.txt)
# It asks for torchvision, whose wheel does not load beside a torch for CPUs.
TIMM := $(shell grep '^timm==' constraints.txt)
# Two test or training processes on two cores must not start two threads each.
export OMP_NUM_THREADS ?= 1
PYTEST := $(BIN)/python -m pytest -q
# Two workers, to each of which go whole files, in the order that tests/conftest.py gives.
TWO := -n 2 --dist loadfile --no-loadscope-reorder
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: setup demo test soak lint
setup: .venv/done

# The marker is made last, so an installation that was cut off is taken up again.
.venv/done: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "error: $(PYTHON) is older than 3.11: name a newer one by 'make PYTHON=...'"; exit 1; }
	@$(PYTHON) -m venv .venv \
	  || { echo "error: no virtual environment: run 'apt-get install python3-venv' first"; exit 1; }
	$(BIN)/pip install --quiet -c constraints.txt $(TORCH)
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet -c constraints.txt -e '.[test,lint]'
	$(BIN)/pip install --quiet --no-deps $(TIMM)
	@touch $@

demo: .venv/done
	$(BIN)/python tools/demo.py

test: .venv/done
	$(PYTEST) $(TWO) -m 'not slow and not soak'
	$(PYTEST) $(TWO) -m 'slow and not soak'

soak: .venv/done
	$(PYTEST) $(TWO) -m soak --durations=20

lint: .venv/done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
