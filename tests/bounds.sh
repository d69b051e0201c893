#!/usr/bin/env bash
# Try the bounds in requirements.txt: for each case a fresh virtual environment, the fast tests in it, and a row of tests/bounds.md.
#
#   bash tests/bounds.sh                              all cases: about 10 minutes each on 2 cores, and 7 GB of disk one at a time
#   PYTHON=python3.12 bash tests/bounds.sh newest     one case, with another Python
#
# lower: the lowest versions of all packages that have bounds, together. resolved: what pip makes of requirements.txt. newest: the two
# commands of requirements-newest.txt, the highest versions that the bounds allow.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
record=tests/bounds.md
base=$(command -v "${PYTHON:-python3}")
cases=("$@")
[ $# -gt 0 ] || cases=(lower resolved newest)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export CUDA_VISIBLE_DEVICES="" # one machine's GPU is no part of a bound

# Every plugin, pipeline and tensor parallelism, compiled layers, data, checkpoints, the saved model, the demo; not each combination.
loop='tests/test_training.py::test_losses_are_those_of_a_plain_loop'
fast=(tests/test_{bad_input,data,layers,losses,optimizer,fp8,run_demo}.py
  "$loop"'[torch_ddp]' "$loop"'[torch_ddp_fp16]' "$loop"'[low_level_zero, bf16]' "$loop"'[gemini]' "$loop"'[gemini, compiled, alone]'
  "$loop"'[tp=2 x pp=2]' "$loop"'[pp=2 x dp=2, zero 1, bf16]'
  tests/test_checkpoints.py::test_resumed_run_is_the_uninterrupted_one tests/test_export.py::test_any_program_loads_it)

status=0
for case in "${cases[@]}"; do
  rm -rf "$work/venv"
  "$base" -m venv "$work/venv"
  export PATH="$work/venv/bin:$PATH" # `colossalai run` calls torchrun by its name
  pip=(python -m pip install --quiet --disable-pip-version-check)
  case $case in
    lower)
      sed -E 's/>=([^,]+).*/==\1/' requirements.txt >"$work/lower.txt"
      "${pip[@]}" -r "$work/lower.txt"
      ;;
    resolved) "${pip[@]}" -r requirements.txt ;;
    newest)
      "${pip[@]}" --upgrade -r requirements-newest.txt
      "${pip[@]}" --no-deps "$(grep colossalai requirements.txt)"
      ;;
    *) echo "bounds.sh: no case '$case': lower, resolved, newest" >&2 && exit 2 ;;
  esac
  "${pip[@]}" -r tests/requirements.txt
  python -m pytest -m "not long" -p no:cacheprovider "${fast[@]}" | tee "$work/log" || status=1
  row=$(python - "$case" "$(tail -n 1 "$work/log" | tr -d =)" <<'PY'
import datetime, platform, sys
from importlib import metadata

versions = (metadata.version(name) for name in ("torch", "transformers", "datasets", "numpy"))
name = f"{sys.argv[1]}, Python {platform.python_version()}"
print("|", " | ".join([name, *versions, str(datetime.date.today()), sys.argv[2].strip()]), "|")
PY
  )
  same=$(grep -oE '^[^.]*\.[0-9]+\.' <<<"$row") # the case with this Python, 3.11.7 or 3.11.8
  sed -i "/^$same/d" "$record"
  echo "$row" >>"$record"
done
cat "$record"
exit $status
