#!/usr/bin/env bash
# The kills, flips, signals and full disks of the tests, ten times as many, at other moments. Prints the seed; to repeat one: tests/soak.sh 7
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="$(./train_csv.sh --setup_only)"
"$python" -m pip install --quiet --disable-pip-version-check -r tests/requirements.txt
export FAULT_SEED="${1:-$RANDOM}" FAULT_TIMES="${2:-10}"
echo "FAULT_SEED=$FAULT_SEED FAULT_TIMES=$FAULT_TIMES"
exec "$python" -m pytest tests/test_resume.py tests/test_faults.py
