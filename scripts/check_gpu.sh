#!/usr/bin/env bash
# On a machine with a GPU: run the tests that need one, then time the runs of docs/performance.md.
#   ./scripts/check_gpu.sh [FOLDER]     speeds are printed and written to FOLDER (results/gpu)
# .venv is made first where needed; PYTHON=... names another interpreter that has the packages.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

folder=${1:-results/gpu}
if [ -z "${PYTHON:-}" ]; then
    ./scripts/setup_env.sh
    PYTHON=.venv/bin/python
fi
"$PYTHON" -c 'import sys, torch
torch.cuda.is_available() or sys.exit("[gpu] PyTorch finds no CUDA device here: run this where nvidia-smi shows one")'
mkdir -p "$folder"

measure() {
    local name=$1
    shift
    echo "[gpu] $name"
    "$PYTHON" scripts/bench_train.py --device cuda --precision bf16 --output "$folder/$name.json" "$@" \
        student.drop_path_rate=0.3 train.centering=sinkhorn_knopp | tee "$folder/$name.txt"
}

failed=0
"$PYTHON" -m pytest -q -n 4 -m gpu || failed=$?
for batch in 16 64 256; do
    measure "vits14-$batch" --batch "$batch" student.arch=vit_small student.patch_size=14 crops.local_crops_size=98
done
measure vitl16-64 --batch 64 student.arch=vit_large student.patch_size=16 crops.local_crops_size=96
[ "$failed" = 0 ] || echo "[gpu] tests failed, see above"
exit "$failed"
