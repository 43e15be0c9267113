#!/usr/bin/env bash
# Lint, types and tests: ruff, then mypy beside pytest, whose workers (pytest-xdist) share the files of tests among them.
#   bash scripts/test.sh                                      what continuous integration runs
#   bash scripts/test.sh tests/test_audio.py -k resample      arguments go to pytest
#   bash scripts/test.sh -m slow                              the long ones, one after the other
#   bash scripts/test.sh -n 0 ...                             all in one process, for a debugger
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh

# One OpenMP thread per process: tests start trainers and engines side by side on as few as two cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
started=$SECONDS
failed=()

check() { # check NAME COMMAND...: runs it, notes a failure, goes on, so that one run shows everything
    local name="$1" begin=$SECONDS
    shift
    printf '\n== %s\n' "$name"
    "$@" || failed+=("$name")
    printf '== %s: %d s\n' "$name" $((SECONDS - begin))
}

# DeepSpeed compiles its communicator when it is first loaded, and a test killed meanwhile would leave a lock on which
# torch waits for ever: so it is built before the slow tests, once (about 20 s), where nothing kills it.
build_deepspeed() {
    ACCELERATE_USE_DEEPSPEED=true timeout 600 python - <<'PYTHON'
from audio_llm.training.run import check_build_locks
from deepspeed.accelerator import get_accelerator

check_build_locks()  # says which file to remove
builder = get_accelerator().create_op_builder("ShareMemCommBuilder")  # None on a GPU, which needs none
if builder is not None:
    builder.load(verbose=False)
PYTHON
}

check ruff ruff check .
types="$(mktemp)"
trap 'rm -f "$types"' EXIT
mypy >"$types" 2>&1 & mypy=$!

workers=(-n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder) # tests/conftest.py has the order of files
case " $* " in
    *slow*) # several processes each, with limits of time
        workers=()
        command -v g++ >/dev/null && check "DeepSpeed's communicator" build_deepspeed
        ;;
esac
check pytest python -m pytest "${workers[@]}" "$@"
check mypy wait "$mypy"
cat "$types"

printf '\ntotal %d s' $((SECONDS - started))
if [ ${#failed[@]} -gt 0 ]; then
    printf '; FAILED: %s\n' "${failed[*]}"
    exit 1
fi
printf '; all passed\n'
