#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Compiles the torch door against the headers of other torch releases and checks that those releases
# export every torch symbol it needs:
#   tools/check_torch_headers.sh 2.11.0 2.13.0
# Each wheel is downloaded without its dependencies (up to 1 GB), so this does not run in CI; run it
# after a change to a *_torch.cpp file or to torch/tensor.h.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
folder=${TORCH_HEADERS_DIR:-build/torch-headers}
for release in "$@"; do
  wheel_dir=$folder/$release
  mkdir -p "$wheel_dir"
  if [ ! -f "$wheel_dir/torch/lib/libtorch_cpu.so" ]; then
    "$python" -m pip download --quiet --no-deps --dest "$wheel_dir" "torch==$release"
    "$python" - "$wheel_dir" <<'PY'
import sys, zipfile
from pathlib import Path

folder = Path(sys.argv[1])
(wheel,) = folder.glob("torch-*.whl")
with zipfile.ZipFile(wheel) as archive:
    wanted = ("torch/include/", "torch/lib/libtorch_cpu.so", "torch/lib/libc10.so")
    archive.extractall(folder, [n for n in archive.namelist() if n.startswith(wanted)])
wheel.unlink()
PY
  fi
  torch_dir=$(realpath "$wheel_dir/torch")
  cmake -S . -B "$wheel_dir/build" -G Ninja -DPYDENSE_TORCH=ON -DPYDENSE_TORCH_DIR="$torch_dir" \
    -DCMAKE_SHARED_LINKER_FLAGS=-Wl,--allow-shlib-undefined \
    -DCMAKE_MODULE_LINKER_FLAGS=-Wl,--allow-shlib-undefined >"$wheel_dir/configure.log"
  cmake --build "$wheel_dir/build" --target libpydense_torch
  exported=$(nm -D --defined-only "$torch_dir/lib/libtorch_cpu.so" | awk '{print $3}' | sort -u)
  needed=$(nm -D --undefined-only "$wheel_dir/build/libpydense_torch.so" | awk '{print $2}' |
    grep -E '^(aoti_)?torch_' | sort -u)
  missing=$(comm -13 <(printf '%s\n' "$exported") <(printf '%s\n' "$needed"))
  if [ -n "$missing" ]; then
    printf 'torch %s lacks:\n%s\n' "$release" "$missing"
    exit 1
  fi
  printf 'torch %s: compiles, exports all %s torch symbols needed\n' "$release" "$(wc -l <<<"$needed")"
done
