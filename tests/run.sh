#!/usr/bin/env bash
# Sets up like ./train_csv.sh, adds the test packages, runs every test. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="$(./train_csv.sh --setup_only)"
"$python" -m pip install --quiet --disable-pip-version-check -r tests/requirements.txt
exec "$python" -m pytest tests "$@"
