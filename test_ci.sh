#!/usr/bin/env bash
# Install what the tests need and run all that this machine can (tests that need a GPU are skipped without one).
#
#   bash test_ci.sh                     about 7 minutes on 2 cores, after the installation
#   bash test_ci.sh tests/test_data.py -x        arguments go to pytest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
python=${PYTHON:-python3}

"$python" -m pip install --quiet --disable-pip-version-check -r requirements.txt -r tests/requirements.txt
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m pytest "$@"
