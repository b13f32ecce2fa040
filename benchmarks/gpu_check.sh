#!/usr/bin/env bash
# Everything that needs a GPU, in one command that ends within 10 minutes:
#
#   benchmarks/gpu_check.sh [FOLDER]
#
# Needs torch with CUDA, triton, a C++ compiler and Python's headers. What else it takes (numpy,
# safetensors, typer, rich, matplotlib, pytest, hypothesis, pybind11, setuptools) is used as it is
# there, or fetched by pip into a temporary folder; the environment is left as it is.
#
# Builds the extension in a temporary copy, runs the tests marked gpu, measures what the first step
# waits for kernels to compile, the step benchmarks, the same captured in CUDA graphs, those of
# 16-bit parameters and of state in host memory, and runs a short step under compute-sanitizer.
# Logs, JSON, pictures and summary.{txt,json} go to FOLDER (default: benchmarks/results/gpu-check).
# PYTHON names the interpreter. The exit status is 0 only if every check passed.
set -uo pipefail

readonly DEADLINE=560 # seconds after the start
readonly GPU_TESTS=( # those with tests marked gpu; others need packages that are not needed here
  tests/kernels/test_rounding.py
  tests/kernels/test_runs.py
  tests/kernels/test_triton.py
  tests/kernels/test_triton_formats.py
  tests/test_compile.py
  tests/test_golden.py
  tests/test_lhopt.py
  tests/test_offload.py
  tests/test_placement.py
  tests/test_registers.py
  tests/test_release.py
)
readonly RANK_TESTS=( # processes that each have a GPU
  tests/distributed/test_sharded_step.py
  tests/distributed/test_training.py
)
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
mkdir -p "${1:-$root/benchmarks/results/gpu-check}" || exit 2
out=$(cd "${1:-$root/benchmarks/results/gpu-check}" && pwd)
tree=$(mktemp -d)
trap 'rm -rf "$tree"' EXIT
rows=()
failed=0

# record NAME STATUS SECONDS
record() {
  printf '%-16s %-10s %4ss\n' "$1" "$2" "$3" | tee -a "$out/summary.txt"
  rows+=("{\"check\": \"$1\", \"status\": \"$2\", \"seconds\": $3}")
}

# check NAME SECONDS COMMAND...: run it in the copy, no longer than that and the deadline allow
check() {
  local name=$1 limit=$2 start=$SECONDS code status
  shift 2
  if ((DEADLINE - SECONDS < limit)); then limit=$((DEADLINE - SECONDS)); fi
  if ((limit <= 0)); then
    failed=1
    record "$name" "no time" 0
    return
  fi
  echo "== $name: $*"
  (cd "$tree" && timeout --kill-after=10 "$limit" "$@") 2>&1 | tee "$out/$name.log"
  code=${PIPESTATUS[0]}
  case $code in
    0) status=passed ;;
    124 | 137) status="timed out" ;;
    *) status="failed ($code)" ;;
  esac
  if ((code != 0)); then failed=1; fi
  record "$name" "$status" $((SECONDS - start))
}

fail() {
  echo "gpu_check.sh: $*" >&2
  exit 2
}

# What nothing here can bring.
require() {
  local missing
  missing=$("$python" - <<'PYTHON'
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path
from shutil import which

missing = [] if sys.version_info >= (3, 10) else ["Python 3.10 or newer"]
missing += [name for name in ("torch", "triton") if find_spec(name) is None]
if not any(map(which, ("c++", "g++", "clang++"))):
    missing.append("a C++ compiler (package g++)")
if not Path(sysconfig.get_path("include"), "Python.h").exists():
    missing.append("Python's headers (package python3-dev)")
if "torch" not in missing:
    import torch

    missing += [] if torch.cuda.is_available() else ["a GPU that torch can use"]
print(", ".join(missing))
PYTHON
  ) || missing="a working $python"
  [[ -z $missing ]] || fail "missing: $missing. Install it (or set PYTHON) and run this again."
}

# Packages that are missing, into a folder that goes with the copy.
bring() {
  local missing
  missing=$("$python" - <<'PYTHON'
from importlib.util import find_spec

names = "numpy safetensors pybind11 setuptools pytest hypothesis typer rich matplotlib".split()
print(" ".join(name for name in names if find_spec(name) is None))
PYTHON
  )
  [[ -n $missing ]] || return 0
  echo "== fetching $missing"
  # shellcheck disable=SC2086 # a list
  "$python" -m pip install -q --target "$tree/site" $missing ||
    fail "missing: $missing, and pip cannot fetch them here. Install them and run this again."
  export PYTHONPATH="$tree/site${PYTHONPATH:+:$PYTHONPATH}"
}

# The package as it is installed, without installing it: kernels/ is lhopt_fused.kernels there.
copy_tree() {
  cp -r "$root"/{lhopt_fused,kernels,csrc,tests,benchmarks,setup.py} "$tree" &&
    rm -f "$tree"/lhopt_fused/*.so &&
    cp -r "$root/kernels" "$tree/lhopt_fused/kernels"
}

require
bring
copy_tree || exit 2
: >"$out/summary.txt"
if git_dir=$(git -C "$root" rev-parse --absolute-git-dir 2>/dev/null); then
  export GIT_DIR=$git_dir GIT_WORK_TREE=$root # results name the commit
fi
export LHOPT_BUILD_JOBS="${LHOPT_BUILD_JOBS:-8}"

# before pyproject.toml is there, which an old setuptools would stumble over; warnings of newer
# versions of torch and Triton are not what is tested
check build 150 "$python" setup.py build_ext --inplace
cp "$root/pyproject.toml" "$tree"
# most of the tests' time goes into compiling kernels, one at a time
in_parallel=()
if "$python" -c 'import xdist' 2>/dev/null; then in_parallel=(-n 6); fi
check tests 150 "$python" -m pytest -q -m gpu -W default "${in_parallel[@]}" \
  --junitxml="$out/tests.xml" "${GPU_TESTS[@]}"
check ranks 120 "$python" -m pytest -q -m gpu -W default --junitxml="$out/ranks.xml" \
  "${RANK_TESTS[@]}"
check compile 75 "$python" -m benchmarks.compile_time --out "$out"
check step 150 "$python" -m benchmarks.run --device cuda --rounds 9 --out "$out"
check graph 60 "$python" -m benchmarks.run --device cuda --graph --rounds 11 \
  --workloads gpt2-small,small-400 --out "$out"
check half 60 "$python" -m benchmarks.run --device cuda --rounds 7 --workloads gpt2-xl \
  --variants adamw-bf16,adamw-bf16-stochastic,adamw-bf16-master,torch-fused-bf16 --out "$out/half"
if "$python" -c 'import flashoptim' 2>/dev/null; then
  check int8 60 "$python" -m benchmarks.run --device cuda --rounds 9 --workloads gpt2-xl \
    --variants adamw-bf16-int8-split8,flashoptim-adamw-int8 --out "$out/int8"
else
  echo "gpu_check.sh: flashoptim is not installed, which the 8-bit step is timed against: pip install" \
    "flashoptim and run this again" >&2
  failed=1
  record int8 "no peer" 0
fi
check offload 75 "$python" -m benchmarks.offload --device cuda --rounds 5 --out "$out/offload"
if command -v compute-sanitizer >/dev/null; then
  # without torch's cache of allocations an access outside of a tensor is one outside of memory
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 check sanitizer 90 \
    compute-sanitizer --tool memcheck --error-exitcode 99 \
    "$python" -m benchmarks.run --device cuda --quick --rounds 1 --workloads small-400 \
    --variants adamw-skip,adamw-mask,lhopt-exact,lhopt-delayed --out "$tree/sanitizer"
else
  record sanitizer "not there" 0
fi

(
  IFS=,
  printf '[%s]\n' "${rows[*]}"
) >"$out/summary.json"
echo "== summary (everything is in $out)"
cat "$out/summary.txt"
exit "$failed"
