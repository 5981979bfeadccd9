#!/usr/bin/env bash
# Fails if the committed generated code is not what protos/ generates.
set -euo pipefail
cd "$(dirname "$0")/.."
fresh=$(mktemp -d)
trap 'rm -rf "$fresh"' EXIT
scripts/generate_protos.sh "$fresh"
while IFS= read -r -d '' file; do
  if ! diff -q "$file" "protos/${file#"$fresh"/}" >/dev/null 2>&1; then
    echo "protos/${file#"$fresh"/} is stale: run 'make protos' and commit the result" >&2
    exit 1
  fi
done < <(find "$fresh" -type f -print0)
