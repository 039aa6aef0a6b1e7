#!/usr/bin/env bash
# Finetune a pretrained DINOv2 ViT-S/14 on a real slide and write report.html; safe to run again.
#   ./scripts/quickstart.sh [--short] [--seeds N] [--output-dir DIR] [--weights PATH] [--processes N] [key=value ...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup_env.sh
exec .venv/bin/python -m scripts.quickstart "$@"
