#!/usr/bin/env bash
# The main job: sets up what is missing, runs all tests on four ranks, then scenario S1.
# A failing file, even a crashing rank, does not stop the next; the job fails if any part failed.
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
  summary+=$(printf '%4d s  %-30s %s' $((SECONDS - start)) "$name" "$verdict")$'\n'
}

run "tests on four ranks" pytest --ranks 4 special_distributed
run "scenario S1" testbed run S1

printf '\n== summary\n%s' "$summary"
exit $status
