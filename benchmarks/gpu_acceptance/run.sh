#!/bin/sh
# .gpu/run.sh OUT [flags of benchmarks.gpu_acceptance]: in the project's folder, on the machine with the GPU
set -e
kit=$(dirname "$0")
: "${1:?the folder for the results}"
out=$(mkdir -p "$1" && cd "$1" && pwd)
shift
python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$out/site" "$kit"/wheels/*.whl
if [ -f "$kit/cifar.npz" ]; then set -- --data "$kit/cifar.npz" "$@"; fi
if [ -d "$kit/official" ]; then set -- --official "$kit/official" "$@"; fi
PYTHONPATH="$out/site:$PWD" PYTHONUNBUFFERED=1 exec python3 -m benchmarks.gpu_acceptance --out "$out" "$@"
