#!/usr/bin/env bash
# Writes requirements.lock: exact versions with the hashes of their files, for Linux, macOS and Windows. Needs uv.
set -euo pipefail
cd "$(dirname "$0")/.."
file=$(mktemp)
uv pip compile pyproject.toml --extra diffusion --extra replay --constraint constraints.txt --generate-hashes \
  --universal --python-version 3.11 --no-header --no-annotate --no-emit-index-url --no-emit-find-links --quiet -o "$file"
{
  echo '# What `pip install "ttsnap[diffusion,replay]"` comes to, with the hashes of every file; made by tools/lock.sh.'
  cat "$file"
} > requirements.lock
rm "$file"
