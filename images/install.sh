#!/bin/sh
# Installs into /opt/venv, at the versions of constraints.txt:
#   install.sh extras EXTRA...          the base dependencies and those of the extras
#   install.sh packages PIP_ARGUMENT... packages by name
# images/local may hold extra-ca.crt (a certificate bundle to trust) and wheels that no index has.
set -eu
cd /build
if [ -f images/local/extra-ca.crt ]; then
  export PIP_CERT=/build/images/local/extra-ca.crt
fi
kind=$1
shift
if [ "$kind" = extras ]; then
  python3 images/requirements.py . "$@" > requirements.txt
  set -- -r requirements.txt
fi
# pip lives beside the environment, not in it: the images need no installer.
[ -d /opt/pip ] || python3 -m venv /opt/pip
[ -d /opt/venv ] || python3 -m venv --without-pip /opt/venv
/opt/pip/bin/pip --python /opt/venv/bin/python install --quiet --no-cache-dir --disable-pip-version-check \
  --only-binary :all: --find-links images/local ${EXTRA_INDEX:+--extra-index-url "$EXTRA_INDEX"} -c constraints.txt "$@"
