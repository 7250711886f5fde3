#!/usr/bin/env bash
# Set up .venv and run all tests; arguments go to pytest: bash scripts/test.sh -k parity
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_venv.sh"
exec .venv/bin/python -m pytest -n 2 "$@"
