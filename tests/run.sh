#!/usr/bin/env bash
# Sets up like ./train_csv.sh, adds the test packages, runs every test. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="$(./train_csv.sh --setup_only)"
"$python" -m pip install --quiet --disable-pip-version-check -r tests/requirements.txt
"$python" download_model.py --demo >/dev/null
# a worker a core, each on one thread: the tests compute little and start much; a file stays with one worker, which keeps its models
OMP_NUM_THREADS=1 exec "$python" -m pytest tests -n 2 --dist loadfile "$@"
