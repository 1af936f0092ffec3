# Every target sets up what it needs (.venv, pinned packages, native build); a second run starts at once.
BIN := .venv/bin
CPP := $(shell git ls-files 'csrc/*.cpp' 'csrc/*.hpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh' 'tests/*.cpp' 'tests/*.hpp' 'tests/*.cu')

.PHONY: setup build lint format test dist bench bench-mpi golden clean launchers layouts mutants torch-suite convert-proofs checkpoint-kills properties soak sanitize-address sanitize-thread gpu-check

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

# Two files at a time: many tests wait rather than compute. run_all.sh plays all of
# special_distributed on forked ranks; here is a sample of it on ranks of the launchers.
SAMPLE := $(addprefix special_distributed/test_,c10d.py collectives.py torch_functional.py)
TORCHRUN := python -m torch.distributed.run --standalone --nproc-per-node 4
test: lint
	. $(BIN)/activate && pytest -n 2 --dist loadfile --no-loadscope-reorder tests \
	  && $(TORCHRUN) -m pytest $(SAMPLE) \
	  && pytest --ranks 8 special_distributed/test_mcore_config_converter.py \
	  && mpirun -n 4 pytest special_distributed/test_torch_functional.py \
	    special_distributed/test_against_mpi.py special_distributed/test_mcore_config_converter.py

# All of special_distributed on ranks started in every way.
launchers: setup
	. $(BIN)/activate && pytest special_distributed \
	  && $(TORCHRUN) -m pytest special_distributed && mpirun -n 4 pytest special_distributed

# PyTorch's own distributed tests, all of them (tests/test_torch_suite.py runs a sample).
torch-suite: setup
	$(BIN)/python tests/torch_suite/run.py

# Every scenario in every layout of up to 8 ranks against its golden, the first STEPS steps of it;
# then twelve changes of layout between saving and resuming; inference in every layout.
STEPS := 4
layouts: setup
	for case in S1 S2 S4; do for which in all pairs; do \
	  $(BIN)/testbed run $$case --layouts $$which --steps $(STEPS) || exit 1; done; done
	$(BIN)/testbed run S3 --layouts all

# Small edits of the code, each of which a run must be judged failed for; some minutes on 2 cores.
mutants: setup
	$(BIN)/python tests/mutants/run_mutants.py

dist: setup
	$(BIN)/python -m build --no-isolation

# Records the golden of every scenario anew; look at the difference before committing it.
golden: setup
	for case in $$($(BIN)/testbed list --names); do $(BIN)/testbed record $$case || exit 1; done

clean:
	rm -rf .venv build dist primitives/_C*.so *.egg-info

# Prints both sides and the limit from one run; with the competitors of bench-mpi, if it ran before.
bench: setup
	$(BIN)/testbed bench all_gather reduce_scatter all_reduce all_to_all barrier gemm fused \
	  -b 4K -e 16M -f 64 --against gloo,mpi

# The MPIs beside Open MPI, which is in .venv: a folder each, since their programs share names.
bench-mpi: setup
	$(BIN)/pip install -q --no-deps --ignore-installed --prefix .mpi/mpich mpich==5.0.2
	$(BIN)/pip install -q --no-deps --ignore-installed --prefix .mpi/impi impi_rt==2021.19.0

# Every model family's conversion from Hugging Face to Megatron-LM, proven by logits on 50 random
# configurations each.
convert-proofs: setup
	. $(BIN)/activate && PRIMITIVES_PROOF_CASES=50 pytest --timeout 1800 tests/test_convert_proof.py

# SIGKILL at 200 points of each kind of save; then load, replay, save (about a quarter of an hour).
checkpoint-kills: setup
	$(BIN)/python tests/checkpoint_kills.py --points 200

# 10,000 random collectives and 300 random programs against primitives.reference; on an emulated
# device 10,000 collectives and 5,000 calls of the CUDA kernels of the vocabulary entropy.
properties: setup
	. $(BIN)/activate && PRIMITIVES_PROPERTY_CASES=10000 pytest --timeout 1800 \
	  tests/test_collective_properties.py tests/test_collective_machine.py tests/test_vocab_emulator.py \
	  tests/test_collective_emulator.py tests/test_fused_emulator.py

# A million collectives and messages on 8 processes: right, and nothing grows.
soak: setup
	$(BIN)/python tests/soak.py

# The native transport and collectives, without Python and torch, under AddressSanitizer and
# UndefinedBehaviorSanitizer, or under ThreadSanitizer.
sanitize-address sanitize-thread:
	$(MAKE) -C tests/native -j2 KIND=$(@:sanitize-%=%) run

# What only a machine with a GPU can say: tests/gpu, compute-sanitizer on a sample of it, the
# benchmarks on the GPU; results go to docs/performance/.
gpu-check: setup
	$(BIN)/python tests/gpu/check.py
