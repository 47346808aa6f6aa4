#!/usr/bin/env bash
# Style, types and tests, in the environment that scripts/setup.sh makes.
#
#   scripts/test.sh [pytest arguments]         what a change is checked with
#   scripts/test.sh --all [pytest arguments]   with the long matrices
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
scripts/setup.sh
bin=${LOGITCASK_VENV:-$root/.venv}/bin

select=(-m "not long")
if [ "${1:-}" = --all ]; then
  select=()
  shift
fi

# One thread for each core in all: a test's own child processes bring theirs.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export TOKENIZERS_PARALLELISM=false
# Tests make their models: whatever asks the hub must fail at once, and nothing is told to anybody.
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 DO_NOT_TRACK=1 VLLM_NO_USAGE_STATS=1
export VLLM_LOGGING_LEVEL=${VLLM_LOGGING_LEVEL:-WARNING}
export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1} # GiB, and plenty for a tiny teacher
export VLLM_CPU_OMP_THREADS_BIND=${VLLM_CPU_OMP_THREADS_BIND:-nobind}

failed=
check() {
  printf '== %s\n' "$*"
  "$bin/python" -m "$@" || failed+=" $1 $2;"
}
check ruff check .
check ruff format --check .
check mypy -p storage_schemas -p cache_builder -p distiller # strict by pyproject.toml
[ -z "$failed" ] || printf '== failed:%s the tests all the same\n' "$failed"
# Last, so that its closing line is what is seen.
"$bin/python" -m pytest -n "${LOGITCASK_TEST_PROCESSES:-2}" --dist loadfile "${select[@]}" "$@"
[ -z "$failed" ]
