#!/usr/bin/env bash
# All that a GPU can tell, in one go and without a network, for the torch of the environment that
# PYTHON (python3) belongs to: builds with CUDA, runs the tests on the GPU, looks for races and bad
# accesses with compute-sanitizer where there is one, and runs the benchmarks. What it prints goes to
# stdout and into OUT (gpu-results/).
#
#     PYTHON=python3 OUT=gpu-results benchmarks/gpu.sh
set -euo pipefail
cd "$(dirname "$0")/.."

python="${PYTHON:-python3}"
root="$PWD"
mkdir -p "${OUT:-gpu-results}"
out="$(cd "${OUT:-gpu-results}" && pwd)"
run() {  # a name, then a command; a failure is told at the end and stops nothing
  echo "== $1: ${*:2}" | tee "$out/$1.txt"
  "${@:2}" 2>&1 | tee -a "$out/$1.txt" || failed+=("$1")
}
failed=()

GAUGE_EXT_CUDA=1 PIP_NO_INDEX=1 "$python" -m pip install --no-build-isolation --no-deps \
  --force-reinstall . 2>&1 | tee "$out/build.txt"

# From another folder: in the repository's Python would import ./gauge_ext, where nothing is compiled.
cd "$out"
export GAUGE_EXT_REQUIRE_COMPILED=1 HF_HUB_OFFLINE=1
run doctor "$python" -m gauge_ext doctor
run tests "$python" -m pytest -q -p no:cacheprovider -c "$root/pyproject.toml" "$root/tests/ops"
if command -v compute-sanitizer > /dev/null; then
  for tool in memcheck racecheck synccheck; do
    run "$tool" compute-sanitizer --tool "$tool" --error-exitcode 1 \
      "$python" -m pytest -q -p no:cacheprovider -c "$root/pyproject.toml" \
      "$root/tests/ops/test_devices.py" "$root/tests/ops/test_device_ops.py" \
      -k "cuda and values and (64 or 130 or group or gather or merge or step or norm)"
  done
fi
for dtype in bfloat16 float32; do
  for dropout in 0 0.1; do
    run "bench_${dtype}_$dropout" "$python" "$root/benchmarks/bench_cuda.py" --dtype "$dtype" \
      --dropout "$dropout"
  done
done
run bench_ops "$python" "$root/benchmarks/bench_cuda_ops.py"

if [ ${#failed[@]} -gt 0 ]; then echo "failed: ${failed[*]}"; exit 1; fi
echo "all passed; the results are in $out"
