#!/bin/sh
# Build the wheel, install it in an empty environment, and run the command from a folder that is not the checkout.
# usage: wheel_check.sh PYTHON_WITH_BUILD
set -eu
checkout=$(pwd)
python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$python" -m build --wheel --outdir "$work/dist" "$checkout"
"$python" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --upgrade pip
"$work/venv/bin/python" -m pip install --quiet "$work"/dist/*.whl
cd "$work"
"$work/venv/bin/expert-router" --version
"$work/venv/bin/expert-router" simulate --users 1,8 --out "$work/results"
test -s "$work/results/summary.csv"
test -s "$work/results/ttft.png"
"$work/venv/bin/expert-router" router explain "Translate this into German" | grep -q "translation rather than"
"$work/venv/bin/expert-router" schema | grep -q '"workload"'
echo "wheel check passed"
