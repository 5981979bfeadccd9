#!/usr/bin/env bash
# Holds docker-compose.yml to what docs/deployment.md says of it: builds both images, starts them,
# streams an answer through the published port, kills the executor in the middle of another, and
# takes everything down again.
#
# usage: tests/e2e/compose.sh        needs Docker with Compose v2, the model, and .venv (make run)
#   STEPWIRE_MODEL_DIR    folder of the model; default: that of `stepwire pull smollm2-135m`
#   STEPWIRE_WHEELS       folder of wheels for the build, where no package index is reachable
#   STEPWIRE_BASE_IMAGE   where no container registry is: see tests/e2e/make_base_image.sh
#   TIMEOUT_S             longest start; default 300
set -euo pipefail
cd "$(dirname "$0")/../.."

python=${PYTHON:-.venv/bin/python}
export COMPOSE_PROJECT_NAME=stepwire-e2e # its own containers, networks and volume
export STEPWIRE_PORT=${STEPWIRE_PORT:-50951}

wheel_server=
clean_up() {
  status=$?
  trap - EXIT
  [[ -z $wheel_server ]] || kill "$wheel_server" || true
  ((status == 0)) || docker compose logs --tail 40 >&2 || true
  docker compose down --volumes --timeout 40 || status=1
  exit "$status"
}
trap clean_up EXIT

say() { printf '\n== %s\n' "$*"; }
fail() { printf 'FAILED: %s\n' "$*" >&2; exit 1; }

say "build"
if [[ -n ${STEPWIRE_WHEELS:-} ]]; then
  # Served to the build over the host's loopback: nothing is copied into a context or a layer.
  "$python" -m http.server 50950 --bind 127.0.0.1 --directory "$STEPWIRE_WHEELS" > /dev/null 2>&1 &
  wheel_server=$!
  export STEPWIRE_BUILD_NETWORK=host STEPWIRE_PIP_NO_INDEX=1
  export STEPWIRE_PIP_FIND_LINKS=http://127.0.0.1:50950/
fi
docker compose build

say "start"
docker compose up --detach --wait --wait-timeout "${TIMEOUT_S:-300}"
docker compose ps

say "the scheduler has no torch, neither is root, neither writes to its image"
docker compose exec -T scheduler python -c '
from importlib.util import find_spec
assert not (find_spec("torch") or find_spec("numpy") or find_spec("stepwire_executor"))'
for service in scheduler executor; do
  [[ $(docker compose exec -T "$service" id -u) == 10001 ]] || fail "$service does not run as 10001"
  for path in /probe /opt/stepwire/probe /models/model/probe; do
    if docker compose exec -T "$service" touch "$path" 2> /dev/null; then
      fail "$service can write $path"
    fi
  done
done

say "only the scheduler's port is published, on loopback"
[[ $(docker compose port scheduler 50051) == "127.0.0.1:$STEPWIRE_PORT" ]] || fail "scheduler's port"
published=$(docker inspect --format '{{range $port, $to := .NetworkSettings.Ports}}{{range $to}}{{$port}} {{end}}{{end}}' \
  "$(docker compose ps --quiet executor)")
[[ -z $published ]] || fail "the executor publishes $published"

say "stream, then stream while the executor is killed"
# The executor is the one child of init, which is process 1.
"$python" tests/e2e/compose_client.py "127.0.0.1:$STEPWIRE_PORT" \
  docker compose exec -T executor sh -c 'kill -KILL $(cat /proc/1/task/1/children)'
restarts=$(docker inspect --format '{{.RestartCount}}' "$(docker compose ps --quiet executor)")
((restarts == 1)) || fail "the executor was restarted $restarts times"

say "stop"
docker compose stop --timeout 40
for service in scheduler executor; do
  status=$(docker inspect --format '{{.State.ExitCode}}' "$(docker compose ps --all --quiet "$service")")
  ((status == 0)) || fail "$service ended with $status"
done
say "passed"
