#!/usr/bin/env bash
# Runs the tests marked `gpu`, then prints times and memory beside bfloat16 and float32; eight minutes at most.
#   PYTHON=/path/to/python tests/gpu/check.sh
# PYTHON has torch with CUDA. What else the tests need is installed beside it, in .venv-gpu, if pip can reach an index;
# without it the tests are left out, and times and memory are printed if torch, typing_extensions and omegaconf are there.
set -uo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3}
export PYTHONPATH=.

"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    { echo "$PYTHON has no torch that sees a GPU: name one that has by PYTHON=" >&2; exit 1; }

tests_can_run() { "$1" -c 'import lightning, torchmetrics, omegaconf, pytest' 2> /dev/null; }

if ! tests_can_run "$PYTHON"; then
    # torch is the one that is there: pip is held to its version
    version=$("$PYTHON" -c 'import torch; print(torch.__version__.partition("+")[0])')
    if timeout 40 "$PYTHON" -m venv --system-site-packages .venv-gpu &&
        timeout 120 .venv-gpu/bin/pip install --quiet --retries 0 --timeout 10 --disable-pip-version-check \
            "torch==$version" --editable . pytest; then
        PYTHON=.venv-gpu/bin/python
    fi
fi

failed=0
if tests_can_run "$PYTHON"; then
    timeout $((360 - SECONDS)) "$PYTHON" -m pytest -q -p no:cacheprovider -m gpu tests/gpu || failed=$?
else
    echo "The tests need lightning, torchmetrics, omegaconf and pytest, and pip reaches no index: left out." >&2
    failed=1
fi
timeout $((470 - SECONDS)) "$PYTHON" tests/gpu/times.py --seconds $((440 - SECONDS)) || failed=$?
exit "$failed"
