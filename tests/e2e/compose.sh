#!/usr/bin/env bash
# Holds docker-compose.yml to what docs/deployment.md says of it: builds the images, starts the
# scheduler and three tensor-parallel executors, streams an answer through the published port,
# kills an executor in the middle of another, first one then rank 0, and takes everything down
# again.
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
export COMPOSE_PROFILES=cpu
export STEPWIRE_PORT=${STEPWIRE_PORT:-50951}
executors=(executor-0 executor-1 executor-2)

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
inspect() { docker inspect --format "$1" "$(docker compose ps --all --quiet "$2")"; } # FORMAT SERVICE
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

say "the scheduler has no torch, nobody is root, nobody writes to an image"
docker compose exec -T scheduler python -c '
from importlib.util import find_spec
assert not (find_spec("torch") or find_spec("numpy") or find_spec("stepwire_executor"))'
for service in scheduler "${executors[@]}"; do
  [[ $(docker compose exec -T "$service" id -u) == 10001 ]] || fail "$service does not run as 10001"
  for path in /probe /opt/stepwire/probe /models/model/probe; do
    if docker compose exec -T "$service" touch "$path" 2> /dev/null; then
      fail "$service can write $path"
    fi
  done
done

say "only the scheduler's port is published, on loopback"
[[ $(docker compose port scheduler 50051) == "127.0.0.1:$STEPWIRE_PORT" ]] || fail "scheduler's port"
for service in "${executors[@]}"; do
  published=$(inspect '{{range $port, $to := .NetworkSettings.Ports}}{{range $to}}{{$port}} {{end}}{{end}}' "$service")
  [[ -z $published ]] || fail "$service publishes $published"
done

say "executors answer nobody without the cluster's certificate, and nobody kept the CA's key"
for service in "${executors[@]}"; do
  if docker compose exec -T scheduler python -m stepwire_scheduler.probe "$service:50061" ""; then
    fail "$service answers in plain text"
  fi
  if docker compose exec -T scheduler python -m stepwire_scheduler.probe "$service:50061" "" \
    --tls-ca=/certificates/ca.pem; then
    fail "$service answers without a certificate"
  fi
  docker compose exec -T scheduler python -m stepwire_scheduler.probe "$service:50061" "" \
    --tls-ca=/certificates/ca.pem --tls-cert=/certificates/scheduler.pem \
    --tls-key=/certificates/scheduler-key.pem || fail "$service does not answer the scheduler"
done
if docker compose exec -T scheduler sh -c 'ls /certificates/*ca-key.pem' 2> /dev/null; then
  fail "the CA's key was kept"
fi

for victim in executor-1 executor-0; do
  say "stream, then stream while $victim is killed"
  # The executor is the one child of init, which is process 1.
  "$python" tests/e2e/compose_client.py "127.0.0.1:$STEPWIRE_PORT" \
    docker compose exec -T "$victim" sh -c 'kill -KILL $(cat /proc/1/task/1/children)'
  (($(inspect '{{.RestartCount}}' "$victim") > 0)) || fail "$victim was not restarted"
done

say "stop"
docker compose stop --timeout 40 scheduler # it drains, and needs the executors for that
docker compose stop --timeout 40
for service in scheduler "${executors[@]}"; do
  status=$(inspect '{{.State.ExitCode}}' "$service")
  ((status == 0)) || fail "$service ended with $status"
done
say "passed"
