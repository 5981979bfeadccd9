#!/usr/bin/env bash
# Generates Python code and type stubs from protos/ into the folder given, for both packages.
set -euo pipefail
out=${1:?usage: generate_protos.sh OUTPUT_FOLDER}
cd "$(dirname "$0")/.."
# shellcheck disable=SC2046
python -m grpc_tools.protoc -I protos \
  --python_out="$out" --grpc_python_out="$out" \
  --mypy_out="$out" --mypy_grpc_out="$out" \
  $(find protos -name '*.proto' | sort)
