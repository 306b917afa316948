#!/usr/bin/env bash
# Set up a virtual environment with the pinned versions, then lint, type-check, build the documentation and test.
set -euo pipefail
cd "$(dirname "$0")/.."
python3 -m venv .venv
.venv/bin/pip install --quiet --constraint constraints.txt --editable '.[dev,docs]'
# The report's page is tested in a browser, where there is one, or where one can be had without asking.
if ! command -v chromium >/dev/null && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  export DEBIAN_FRONTEND=noninteractive
  { timeout 300 apt-get update && timeout 300 apt-get install -y --no-install-recommends chromium; } </dev/null >/dev/null 2>&1 ||
    echo "chromium could not be installed: the report's page is not tested in a browser"
fi
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy &
NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --quiet --strict
wait $!
exec .venv/bin/pytest --numprocesses auto --dist loadscope
