#!/usr/bin/env bash
# Run the tests, in the environment .venv that is made first where needed. Arguments go to pytest:
#   ./scripts/test.sh                       everything but the slow ones
#   ./scripts/test.sh -m slow               the slow ones: minutes each
#   ./scripts/test.sh tests/loss -k koleo   some
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

./scripts/setup_env.sh
# Two processes share the cores; threads of both on every core would slow each other down several-fold.
export OMP_NUM_THREADS=1
[ $# -gt 0 ] || echo "[test] running all quick tests, about 11 minutes on 2 cores"
exec .venv/bin/python -m pytest -n 2 "$@"
