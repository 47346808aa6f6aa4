#!/usr/bin/env bash
# The whole way on two CPU cores: a teacher, its cache, and two students of half its layers, one trained on the cached
# distributions (TAID), one on the same tokens alone (cross-entropy).
#
#   scripts/demo.sh [DIR]     into demo-out, or DIR; a second run reuses the teacher and the caches and trains anew
#
# The table goes to stdout and, as figures, to DIR/report.json; progress goes to stderr.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
out=${1:-$root/demo-out}
bin=${LOGITCASK_VENV:-$root/.venv}/bin

steps=60
objectives=(cross_entropy taid)
training=(--max-steps "$steps" --per-device-train-batch-size 4 --learning-rate 1e-3 --bf16 --freeze-embeddings
  --max-length 256 --seed 0)

say() { printf 'demo: %d:%02d %s\n' $((SECONDS / 60)) $((SECONDS % 60)) "$*" >&2; }

# Everything is on this machine: nothing asks the hub or tells anybody.
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 DO_NOT_TRACK=1 VLLM_NO_USAGE_STATS=1
export TOKENIZERS_PARALLELISM=false VLLM_LOGGING_LEVEL=${VLLM_LOGGING_LEVEL:-ERROR}
export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1} # GiB

"$root/scripts/setup.sh"
mkdir -p "$out/caches"
out=$(cd "$out" && pwd)
teacher=$out/teacher
away=$out/teacher.away

put_back() { [ ! -d "$away" ] || [ -e "$teacher" ] || mv "$away" "$teacher"; }
trap put_back EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
put_back # where a killed run left it

# ---- the teacher, its text and its caches -----------------------------------------------------------------------------

if [ -e "$teacher" ]; then say "reusing the teacher in $teacher"; fi
"$bin/python" "$root/scripts/demo/make_teacher.py" --output "$teacher" >&2
"$bin/python" "$root/scripts/demo/make_text.py" --output "$out/text" --tokenizer "$teacher" >&2

for side in train held_out; do
  cache=$out/caches/$side
  text=$(cksum <"$out/text/$side.jsonl")
  if [ -s "$cache.json" ] && [ "$(cat "$cache.text" 2>/dev/null)" = "$text" ]; then
    say "reusing the cache in $cache"
    continue
  fi
  say "building the cache in $cache"
  rm -rf "$cache" "$cache.json" # of another text, or of a run that was stopped
  printf '%s\n' "$text" >"$cache.text"
  "$bin/cache-builder" build --teacher "$teacher" --dataset "$out/text/$side.jsonl" --output "$cache" \
    --top-k 64 --max-length 256 --engine vllm --format arrow --set corpus.id_column=id \
    --set engine.enforce_eager=true --json >"$cache.partial"
  mv "$cache.partial" "$cache.json"
done
"$bin/cache-builder" inspect "$out/caches/train" --json >"$out/caches/train.inspect.json"

# ---- the students -----------------------------------------------------------------------------------------------------

rm -rf "$out/students"
mkdir "$out/students"
say "cutting the initial student out of the teacher"
"$bin/distiller" init-student --model "$teacher" --keep-layers 15 --output "$out/students/initial" \
  --json >"$out/students/initial.slice.json"

say "moving the teacher away: from here on the caches are all there is of it"
mv "$teacher" "$away"

evaluate() {
  "$bin/distiller" evaluate --student "$out/students/$1" --cache "$out/caches/held_out" --bf16 \
    --json "$out/students/$1.json" >&2
}
evaluate initial
for objective in "${objectives[@]}"; do
  say "training with $objective, $steps steps"
  "$bin/distiller" train --cache "$out/caches/train" --student "$out/students/initial" --output "$out/students/$objective" \
    --objective "$objective" "${training[@]}" >&2
  evaluate "$objective"
done
put_back

"$bin/python" "$root/scripts/demo/make_report.py" "$out"
say "done; the figures are in $out/report.json"
