#!/usr/bin/env bash
# Builds the images, brings the stack of compose.yaml up, streams a request, finds its trace, takes the stack down.
#
# Wants a Docker engine, Compose and .venv (make compose-test). Where no registry of images can be reached, as root on
# Debian: LORAPLEX_TEST_DOCKER=start starts an engine of its own and makes stand-ins for what would be pulled (see
# own_docker.sh; it says which). LORAPLEX_TEST_DOCKER_DIR names a folder to keep that engine's images in between runs.
set -euo pipefail
exec 3>&1
cd "$(dirname "$0")/../.."

python=$(realpath -s "${PYTHON:-.venv/bin/python}")
work=$(mktemp -d)
files=(-f compose.yaml)
engine_pid=
local_files=()

say() { echo "==> $*"; }
timed() {
  local what=$1 began=$SECONDS
  shift
  "$@"
  say "$what: $((SECONDS - began)) s" >&3
}
compose() { "${compose[@]}" -p loraplex-test "${files[@]}" "$@"; }

build() {
  compose build --quiet >"$work/build.log" 2>&1 || { tail -n 40 "$work/build.log"; return 1; }
}

finish() {
  local code=$?
  set +e
  if ((code)); then
    compose ps --all
    compose logs --no-color --tail 40
  fi
  compose down --volumes --remove-orphans --timeout 40 >/dev/null 2>&1
  if [[ -n $engine_pid ]]; then
    kill "$engine_pid"
    wait "$engine_pid"
  fi
  rm -rf "$work" "${local_files[@]}"
  ((code)) && say "FAILED" || say "passed; the stack is down"
  exit "$code"
}

# The plug-in of the docker command, or the binary that `make setup` installs.
if docker compose version >/dev/null 2>&1; then
  compose=(docker compose)
else
  compose=("$(dirname "$python")/docker-compose")
fi
trap finish EXIT

if [[ ${LORAPLEX_TEST_DOCKER:-} == start ]]; then
  source tests/compose/own_docker.sh
fi

# Any free port, so that a stack in use is not disturbed; copies of the adapters, since a private umask makes files
# that the images' user cannot read.
export LORAPLEX_PORT=0 LORAPLEX_JAEGER_PORT=0 LORAPLEX_PROMETHEUS_PORT=0
export LORAPLEX_ADAPTERS=$work/adapters
cp -r demo/adapters "$LORAPLEX_ADAPTERS"
chmod -R a+rX "$work"

say "building the images (minutes the first time: torch)"
timed "build" build
docker images --format '    {{.Repository}}  {{.Size}}' 'loraplex-*' | sort
docker run --rm --network none loraplex-router python -c 'import importlib.util, sys
sys.exit([name for name in ("torch", "numpy", "redis", "safetensors", "pydantic") if importlib.util.find_spec(name)] or 0)' ||
  { say "the image of the router has packages that are not the router's"; exit 1; }
say "starting the stack (the first start also prepares the demo base)"
timed "up, healthy" compose --progress quiet up --detach --quiet-pull
timed "adapters registered" compose wait register >/dev/null
timed "checks" "$python" tests/compose/check.py \
  --router "$(compose port router 50051)" --jaeger "$(compose port jaeger 16686)" \
  --prometheus "$(compose port prometheus 9090)"
say "a stopped service drains and exits with 0"
timed "stop" compose --progress quiet stop --timeout 40 router engine cache
for service in router engine cache; do
  code=$(docker inspect --format '{{.State.ExitCode}}' "$(compose ps --all --quiet "$service")")
  [[ $code == 0 ]] || { say "$service exited with $code"; exit 1; }
done
