#!/usr/bin/env bash
# Qdrant in Docker, for examples/colqwen2.5_qdrant.py and for trying things out. See --help.
set -euo pipefail

readonly IMAGE=qdrant/qdrant:v1.19.0 # at most one minor version from qdrant-client's, else that warns
readonly NAME=mlx-embeddings-qdrant  # of the container, and of the volume that holds the data
readonly HTTP_PORT=${QDRANT_HTTP_PORT:-6333}
readonly GRPC_PORT=${QDRANT_GRPC_PORT:-6334}
readonly READY_SECONDS=${QDRANT_READY_SECONDS:-60}

usage() {
  cat <<EOF
Usage: scripts/qdrant-docker.sh [start|stop]

  start   run $IMAGE on http://127.0.0.1:$HTTP_PORT, and wait until it is ready (the default)
  stop    end it; the data stays in the volume $NAME

Only this machine can reach it. It asks for no key.
QDRANT_HTTP_PORT, QDRANT_GRPC_PORT: other ports than 6333 and 6334, taken when the container is made.
QDRANT_READY_SECONDS: how long to wait (60).
EOF
}

fail() {
  printf 'qdrant-docker: %s\n' "$@" >&2
  exit 1
}

need_docker() {
  command -v docker >/dev/null ||
    fail "docker is not installed: https://docs.docker.com/get-docker/" \
      "Without it: examples/colqwen2.5_qdrant.py --embedded"
  local said
  said=$(docker version 2>&1 >/dev/null) ||
    fail "docker does not answer: is Docker Desktop, or the docker service, started?" "docker says: $said"
  command -v curl >/dev/null || fail "curl is not installed"
}

# running, exited, created, paused, ...; nothing where there is no container.
state() {
  docker container inspect --format '{{.State.Status}}' "$NAME" 2>/dev/null || true
}

need_free() {
  if (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; then
    fail "port $1 is taken by another program" \
      "Is that a Qdrant of yours? Then it needs no second one. Else: QDRANT_HTTP_PORT=7333 QDRANT_GRPC_PORT=7334 $0"
  fi
}

# The container's own port: it was made with it, whatever the environment says today.
url() {
  printf 'http://%s' "$(docker port "$NAME" 6333/tcp 2>/dev/null | head -n 1)"
}

wait_until_ready() {
  local deadline=$((SECONDS + READY_SECONDS))
  until curl --silent --fail --output /dev/null --noproxy '*' --max-time 2 "$(url)/readyz"; do
    if [[ $(state) != running ]]; then
      docker logs --tail 20 "$NAME" >&2 || true
      fail "Qdrant ended; its last lines are above"
    fi
    if ((SECONDS >= deadline)); then
      docker logs --tail 20 "$NAME" >&2 || true
      fail "Qdrant was not ready after $READY_SECONDS s; its last lines are above"
    fi
    sleep 0.5
  done
}

start() {
  need_docker
  local before
  before=$(state)
  case $before in
    running) ;;
    "")
      need_free "$HTTP_PORT"
      need_free "$GRPC_PORT"
      docker run --detach --name "$NAME" --volume "$NAME:/qdrant/storage" \
        --publish "127.0.0.1:$HTTP_PORT:6333" --publish "127.0.0.1:$GRPC_PORT:6334" "$IMAGE" >/dev/null ||
        fail "docker could not run $IMAGE; what it says is above"
      ;;
    created | exited)
      docker start "$NAME" >/dev/null ||
        fail "docker could not start the container $NAME; what it says is above" \
          "'docker rm $NAME' removes it, and keeps the data"
      ;;
    *) fail "the container $NAME is $before: 'docker rm --force $NAME' removes it, and keeps the data" ;;
  esac
  wait_until_ready
  if [[ $before == running ]]; then
    echo "Qdrant was running already: $(url)"
  else
    echo "Qdrant is ready: $(url) (dashboard: $(url)/dashboard)"
  fi
}

stop() {
  need_docker
  if [[ $(state) == running ]]; then
    docker stop "$NAME" >/dev/null
    echo "Qdrant has ended. Its data is in the volume $NAME: 'docker rm $NAME && docker volume rm $NAME' deletes it"
  else
    echo "Qdrant was not running"
  fi
}

case ${1:-start} in
  start) start ;;
  stop) stop ;;
  -h | --help) usage ;;
  *)
    usage >&2
    exit 2
    ;;
esac
