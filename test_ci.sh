#!/usr/bin/env bash
# Install what the tests need and run all that this machine can (tests that need a GPU are skipped without one).
#
#   bash test_ci.sh                     about 27 minutes on 2 cores, after the installation
#   bash test_ci.sh --full              the long tests as well (marked `long`)
#   bash test_ci.sh tests/test_data.py -x        other arguments go to pytest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
python=${PYTHON:-python3}
which=(-m "not long")
if [ "${1:-}" = --full ]; then which=() && shift; fi

"$python" -m pip install --quiet --disable-pip-version-check -r requirements.txt -r tests/requirements.txt
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m pytest ${which[@]+"${which[@]}"} "$@"
