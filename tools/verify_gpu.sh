#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Proves the CUDA kernels on the GPU of this machine:   tools/verify_gpu.sh [--dry-run] OUTDIR
#
# Builds in place for this card alone, runs the tests marked `cuda`, compute-sanitizer on a small
# set, and times every kernel. Needs no network: Python with torch, pytest, hypothesis, CMake, ninja
# and nvcc must be there. Ends within nine minutes, whatever hangs. OUTDIR then holds summary.md,
# verify.json, kernels.json and three logs. Exit status 0: built, and all tests passed.
# --dry-run writes the same files without running anything; it needs no GPU.
set -uo pipefail
cd "$(dirname "$0")/.."

dry_run=no
if [ "${1:-}" = --dry-run ]; then
  dry_run=yes
  shift
fi
if [ $# -ne 1 ]; then
  echo "usage: tools/verify_gpu.sh [--dry-run] OUTDIR" >&2
  exit 2
fi
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
python=${PYTHON:-python3}
limit=525  # seconds for all steps; the summary takes a few more
steps=$(mktemp -d) || exit 2
trap 'rm -rf "$steps"' EXIT

# step NAME SECONDS LOG COMMAND...: runs it with at most that time, or what is left of all time.
step() {
  local name=$1 cap=$2 log=$out/$3 left status=0 start=$SECONDS
  shift 3
  left=$((limit - SECONDS))
  [ "$left" -lt "$cap" ] && cap=$left
  printf '\n==> %s: %s\n' "$name" "$*" | tee -a "$log"
  if [ "$dry_run" = yes ]; then
    status=dry-run
  elif [ "$cap" -lt 5 ]; then
    status=no-time
  else
    # The group is ended: a compiler or a test may have children.
    timeout --kill-after=5 "$cap" "$@" >>"$log" 2>&1 </dev/null || status=$?
    [ "$status" = 124 ] || [ "$status" = 137 ] && status=timeout
  fi
  printf '%s\t%s\t%s\t%s\n' "$name" "$status" "$((SECONDS - start))" "$3" >>"$steps/steps.tsv"
  printf '<== %s: %s after %s s\n' "$name" "$status" "$((SECONDS - start))"
  [ "$status" = 0 ]
}

for log in build tests sanitizer; do
  : >"$out/$log.log"
done
echo '{"card": "", "commit": "", "kernels": {}}' >"$out/kernels.json"

if [ "$dry_run" = yes ]; then
  arch=90a-real
elif ! arch=$("$python" -c '
import torch
major, minor = torch.cuda.get_device_capability()
print(f"{major}{minor}{chr(97) if major == 9 else str()}-real")'); then
  echo "verify_gpu: torch sees no GPU here" >&2
  exit 2
fi

export PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
if ! command -v nvcc >/dev/null && [ -x "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" ]; then
  export PATH=${CUDA_HOME:-/usr/local/cuda}/bin:$PATH
fi
build() {
  step build 240 build.log env PYDENSE_CUDA=ON "PYDENSE_CUDA_ARCHS=$arch" PYDENSE_WERROR=OFF \
    "$python" setup.py build_ext --inplace
}
# What has never run anywhere has a process of its own, after all others: it may leave the GPU in
# a state in which nothing runs any more.
twin_tests=tests/test_ops_dense_atrous_conv_wgmma.py
tests() {
  step tests 170 tests.log "$python" -m pytest tests --ignore=$twin_tests -m cuda -q -ra \
    -p no:cacheprovider --junitxml="$steps/tests.xml"
}
twins() {
  step twin-tests 40 tests.log "$python" -m pytest $twin_tests -q -ra -p no:cacheprovider
  step twin-kernels 30 tests.log "$python" -m benchmarks.cuda_kernels \
    --measure-twins "$out/kernels.json"
}
# The allocator of torch would hide an access behind the end of a tensor.
sanitizer() {
  local tool
  for tool in memcheck racecheck initcheck synccheck; do
    step "$tool" 90 sanitizer.log env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
      compute-sanitizer --tool "$tool" --error-exitcode 86 \
      "$python" -m pytest tests --ignore=$twin_tests -m "cuda and small" -q -p no:cacheprovider
  done
}
# What was measured before the time was up stays in the file.
kernels() {
  step kernels 75 tests.log "$python" -m benchmarks.cuda_kernels --measure "$out/kernels.json"
}
# Whole operators first, then torch.compile's form of them and of what the kernels belong to.
compiled() {
  step compiled 80 tests.log "$python" -m benchmarks.cuda_kernels \
    --measure-compiled "$out/kernels.json"
}

failed=0
if build || [ "$dry_run" = yes ]; then
  tests || failed=1
  kernels || failed=1
  compiled
  twins
  sanitizer
else
  failed=1
  tail -30 "$out/build.log"
fi
"$python" tools/gpu_summary.py "$steps" "$out" || failed=1
if [ "$dry_run" = yes ]; then
  failed=0
fi
echo
cat "$out/summary.md"
exit "$failed"
