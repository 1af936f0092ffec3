#!/usr/bin/env bash
# The main job: sets up what is missing, runs each test file on four ranks, then scenario S1.
# A failing part does not stop the next one; the job fails if any part failed.
set -u
cd "$(dirname "$0")/.."
python3 bootstrap.py || exit 2
# shellcheck disable=SC1091
. .venv/bin/activate
export OMP_NUM_THREADS=1 # four ranks share the cores

summary=""
status=0
trap 'exit 130' INT

# run NAME COMMAND...
run() {
  local name=$1 start=$SECONDS verdict
  shift
  echo "== $name"
  if "$@"; then
    verdict=pass
  else
    verdict="FAIL (exit code $?)"
    status=1
  fi
  summary+=$(printf '%4d s  %-52s %s' $((SECONDS - start)) "$name" "$verdict")$'\n'
}

for file in special_distributed/test_*.py; do
  run "$file" python -m torch.distributed.run --standalone --nproc-per-node 4 -m pytest -q "$file"
done
run "scenario S1" testbed run S1

printf '\n== summary\n%s' "$summary"
exit $status
