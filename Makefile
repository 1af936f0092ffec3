# Every target sets up what it needs (.venv, pinned packages, native build); a second run starts at once.
BIN := .venv/bin
CPP := $(shell git ls-files 'csrc/*.cpp' 'csrc/*.hpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh' 'tests/*.cpp' 'tests/*.hpp')

.PHONY: setup build lint format test dist bench golden clean properties soak sanitize-address sanitize-thread

setup build:
	@python3 bootstrap.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

test: lint
	. $(BIN)/activate && pytest tests && mpirun -n 4 pytest special_distributed

dist: setup
	$(BIN)/python -m build --no-isolation

# Records the golden of every scenario anew; look at the difference before committing it.
golden: setup
	for case in $$($(BIN)/testbed list --names); do $(BIN)/testbed record $$case || exit 1; done

clean:
	rm -rf .venv build dist primitives/_C*.so *.egg-info

# Prints both sides and the limit from one run.
bench: setup
	$(BIN)/python -m primitives.bench

# 10,000 random collectives and 300 random programs against primitives.reference.
properties: setup
	. $(BIN)/activate && PRIMITIVES_PROPERTY_CASES=10000 pytest --timeout 1800 \
	  tests/test_collective_properties.py tests/test_collective_machine.py

# A million collectives and messages on 8 processes: right, and nothing grows.
soak: setup
	$(BIN)/python tests/soak.py

# The native transport and collectives, without Python and torch, under AddressSanitizer and
# UndefinedBehaviorSanitizer, or under ThreadSanitizer.
sanitize-address sanitize-thread:
	$(MAKE) -C tests/native -j2 KIND=$(@:sanitize-%=%) run
