#!/usr/bin/env bash
# Uses an installed secateurs as a new user would, away from any checkout: its version, its libraries, the bundled model
# pruned, compressed and continued. Given a wheel or an sdist, installs that into a new environment first; without,
# what is on the PATH is used.
#
#     tools/check_install.sh dist/secateurs-*.whl
set -euo pipefail
constraints=$(realpath "$(dirname "$0")/../constraints.txt")
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
if [ $# -gt 0 ]; then
  package=$(realpath "$1")
  python3 -m venv "$place/venv"
  PATH="$place/venv/bin:$PATH"
  pip install --quiet --constraint "$constraints" "$package"
fi
cd "$place"

secateurs --version
python -W error - <<'EOF'
import shutil

from secateurs import demo
from secateurs.native import library
from secateurs.runtime.cpu import CpuKernels

for name in ("pruning.solvers._products", "pruning.solvers._sweep", "runtime._kernels"):
    assert library(name, "a library is missing") is not None
print("instruction sets here:", *CpuKernels(library("runtime._kernels", "")).isas)
shutil.copytree(demo.HERE, "demo")
EOF
secateurs prune demo/model --calibration demo/calibration.txt --method sparsegpt --pattern 50% --values int4 \
  --samples 16 --length 128 --output pruned
secateurs compress pruned --output small
secateurs generate small --prompt "It was a cold evening, and" --tokens 20
echo ok
