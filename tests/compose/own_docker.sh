# Sourced by run.sh: a Docker engine of our own, for Debian as root without a registry of images.
#
# What is real: the engine, the images of the three services, Redis and Prometheus (Debian's packages).
# What is not: Jaeger, of which nothing but its image is published; stand_ins/trace_receiver.py takes its place.
own=${LORAPLEX_TEST_DOCKER_DIR:-$work/docker}
mkdir -p "$own"

say "own Docker engine in $own"
say "STAND-INS: Jaeger is replaced by a small OTLP receiver; Redis and Prometheus are Debian's instead of the usual images"

missing=()
for package in docker.io debootstrap; do
  dpkg -s "$package" >/dev/null 2>&1 || missing+=("$package")
done
if ((${#missing[@]})); then
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi

export DOCKER_HOST=unix://$own/docker.sock
# Debian's engine has no BuildKit, and builds that run side by side would each make the stages they share. Its limits
# for containers are higher than an engine that is itself in a container may set.
export DOCKER_BUILDKIT=0 COMPOSE_PARALLEL_LIMIT=1
/usr/sbin/dockerd --data-root "$own/root" --exec-root "$own/exec" --pidfile "$own/pid" --host "$DOCKER_HOST" \
  --default-ulimit nofile=1024:4096 --default-ulimit nproc=1024:4096 --storage-driver overlay2 \
  >"$own/dockerd.log" 2>&1 &
engine_pid=$!
for _ in {1..100}; do
  docker version >/dev/null 2>&1 && break
  kill -0 "$engine_pid" || { tail "$own/dockerd.log"; exit 1; }
  sleep 0.2
done

export LORAPLEX_PYTHON_IMAGE=localhost/python:3.11-slim
base_image() {
  debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm "$work/rootfs" >"$work/debootstrap.log"
  tar -C "$work/rootfs" -c . | docker import - "$LORAPLEX_PYTHON_IMAGE" >/dev/null
  rm -rf "$work/rootfs"
}
docker image inspect "$LORAPLEX_PYTHON_IMAGE" >/dev/null 2>&1 || timed "base image from debootstrap" base_image
stand_ins() {
  docker build --quiet --tag localhost/stand-ins --build-arg BASE="$LORAPLEX_PYTHON_IMAGE" tests/compose/stand_ins >"$work/stand-ins.log" 2>&1 ||
    { tail -n 40 "$work/stand-ins.log"; return 1; }
}
timed "stand-in image" stand_ins

files+=(-f tests/compose/stand_ins/compose.yaml)

# What this machine's pip is told to trust and where it finds wheels, for the builds (images/install.sh).
certificates=${PIP_CERT:-${SSL_CERT_FILE:-}}
[[ -z $certificates ]] || { cp "$certificates" images/local/extra-ca.crt && local_files+=(images/local/extra-ca.crt); }
for folder in ${PIP_FIND_LINKS:-}; do
  for wheel in "$folder"/torch-*.whl; do
    [[ -e $wheel ]] && cp --update --preserve=timestamps "$wheel" images/local/ && local_files+=("images/local/$(basename "$wheel")")
  done
done
