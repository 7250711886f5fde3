#!/usr/bin/env bash
# Set up .venv and run all tests; arguments go to pytest: bash scripts/test.sh -k parity
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_venv.sh"
if ! cmp -s requirements-extras.txt .venv/requirements-extras.installed; then
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-extras.txt
    cp requirements-extras.txt .venv/requirements-extras.installed
fi
# Compiled modules are kept, which containers often forbid: the tests start dozens of processes.
unset PYTHONDONTWRITEBYTECODE
# One process for each core.
exec .venv/bin/python -m pytest -n auto --maxprocesses 8 --dist worksteal "$@"
