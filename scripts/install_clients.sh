#!/usr/bin/env bash
# Installs the clients that the sessions of agents are tested against, each into an environment of
# its own, as what they need cannot live beside our own packages: they take other versions of mcp
# and openai. tests/actors/environments/test_real_clients.py finds them in .clients, or in the folder
# that ALIGNTUNE_CLIENTS names.
#
#   scripts/install_clients.sh [FOLDER]     default: .clients; about 1 GB
#
# PYTHON is the interpreter to build them from (default: .venv's).
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-.clients}
python=${PYTHON:-.venv/bin/python}
for pin in openenv==0.10.0 verifiers==0.4.0; do
  place=$folder/${pin%%=*}
  [ -x "$place/bin/python" ] || "$python" -m venv "$place"
  "$place/bin/python" -m pip install --quiet --disable-pip-version-check "$pin"
  echo "clients: $pin is in $place"
done
