# Sourced by the scripts beside it: goes to the repository's root and sets up .venv there, once.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}
if ! "$PYTHON" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
    echo "error: Python 3.10 or newer with venv is needed; set PYTHON to one, as in PYTHON=python3.11 bash $0" >&2
    exit 2
fi
# The stamp is written last: a set-up that was interrupted, or whose requirements have changed, is done again.
if ! cmp -s requirements.txt .venv/requirements.installed; then
    echo "setting up .venv (PyTorch is large; this happens once)"
    "$PYTHON" -m venv .venv
    install=".venv/bin/python -m pip install --quiet --disable-pip-version-check"
    $install "pip>=23" # the one that came with the first Python 3.10 cannot install this package
    $install -r requirements.txt
    $install --no-deps --editable .
    cp requirements.txt .venv/requirements.installed
fi
