#!/usr/bin/env bash
# Runs all tests, and first installs what they need and is missing (Debian).
#
#   tests/run.sh                 everything
#   tests/run.sh --no-install    installs nothing; tests whose tools are missing are skipped and say so
#   tests/run.sh --install-only  installs, runs nothing
#   tests/run.sh -- refusal      the rest goes to the test binaries: a filter, --nocapture, …
#   tests/run.sh -- --ignored --skip soak --skip fleet  the slow ones: old clients at their full time-outs
#   tests/run.sh -- --ignored --nocapture soak::parsers  for SOAK_SECONDS (900), token lives of SOAK_DEATH_SECONDS (60)
#   tests/run.sh -- --ignored --nocapture soak::faults   half an hour (SOAK_SECONDS) at SOAK_RATE (200) requests a second,
#                                                        a token's death a minute, something broken every ten seconds
#   tests/run.sh -- --ignored --nocapture fleet          twenty sidecars on one Redis, and what FLEET_SIZE (1000) cost it,
#                                                        watched for FLEET_REST_SECONDS (60) at rest
#   tests/run.sh -- --ignored --nocapture storm          a thousand requests refused at once, and who has nothing to do with it
#   DIFFERENTIAL_STREAMS=20000 tests/run.sh -- --nocapture differential  damaged requests, more than the usual 1500
#
# Needed: redis-server, nginx, curl, openssl and python3 with venv; for the clients of other languages Go, PHP with its curl
# module, Node (18 or later) and a JDK; for clients behind an alias the right to mount and to listen on port 443.
# What is missing comes by apt-get, as root or by sudo. The Python clients and the schemas of Kubernetes
# (tests/clients/requirements.txt) go to .venv, or to where TOKEN_SIDECAR_TEST_VENV points. A second run installs nothing.
#
# SOAK_DOOR=closed leaves the parsers of soak::parsers no source but the failing solver: 401 is then all that they may see.
# The differential test prints its seed; DIFFERENTIAL_SEED repeats it. tests/slowhttp.sh and tests/tlsscan.sh try the
# release binary with slow clients and with a scanner of TLS; neither is part of a run.
#
# A test that cannot run here writes «skipped: <test>: <reason>» to standard error. TOKEN_SIDECAR_TEST_NO_SKIP makes it
# fail instead: 1 (the default, but not with --no-install) if a program or a package is missing, all also if the machine
# does not permit something, such as mount namespaces or ports 443 and 53. Set all where everything is permitted: CI.
set -euo pipefail
cd "$(dirname "$0")/.."

install=yes run=yes
while [ $# -gt 0 ]; do
  case $1 in
    --no-install) install=no ;;
    --install-only) run=no ;;
    --) shift; break ;;
    -h|--help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
    *) echo "unknown option $1, see $0 --help" >&2; exit 2 ;;
  esac
  shift
done

venv=${TOKEN_SIDECAR_TEST_VENV:-$PWD/.venv}

# Debian packages whose programs are missing.
missing_packages() {
  command -v redis-server >/dev/null || echo redis-server
  command -v nginx >/dev/null || [ -x /usr/sbin/nginx ] || echo nginx-light
  command -v curl >/dev/null || echo curl
  command -v openssl >/dev/null || echo openssl
  command -v python3 >/dev/null || echo python3
  python3 -c 'import ensurepip' 2>/dev/null || echo python3-venv
  command -v go >/dev/null || echo golang-go
  command -v php >/dev/null || echo php-cli
  php -r 'exit((int) !function_exists("curl_init"));' 2>/dev/null || echo php-curl
  command -v node >/dev/null || echo nodejs
  command -v unshare >/dev/null || echo util-linux
  command -v javac >/dev/null && command -v keytool >/dev/null || echo default-jdk-headless
}

install_packages() {
  local packages as_root=()
  mapfile -t packages < <(missing_packages)
  [ ${#packages[@]} -gt 0 ] || return 0
  if [ "$(id -u)" -ne 0 ]; then
    if ! command -v sudo >/dev/null; then
      echo "please install: ${packages[*]} (neither root nor sudo here)" >&2
      exit 1
    fi
    as_root=(sudo)
  fi
  if ! command -v apt-get >/dev/null; then
    echo "please install: ${packages[*]} (no apt-get here)" >&2
    exit 1
  fi
  echo "installing ${packages[*]}"
  "${as_root[@]}" apt-get update -qq
  # Some packages would start a server of their own: the tests start theirs.
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get install -y -qq --no-install-recommends "${packages[@]}"
}

# The environment is complete when it was made from the present list.
install_clients() {
  local wanted=tests/clients/requirements.txt made=$venv/requirements.txt
  if [ -x "$venv/bin/python" ] && cmp -s "$wanted" "$made"; then
    return 0
  fi
  echo "making $venv"
  python3 -m venv "$venv"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$wanted"
  cp "$wanted" "$made"
}

if [ "$install" = yes ]; then
  install_packages
  install_clients
fi
if [ "$run" = yes ]; then
  export TOKEN_SIDECAR_TEST_VENV=$venv
  if [ "$install" = yes ]; then
    export TOKEN_SIDECAR_TEST_NO_SKIP=${TOKEN_SIDECAR_TEST_NO_SKIP:-1}
  fi
  # Most tests wait more than they work.
  export RUST_TEST_THREADS=${RUST_TEST_THREADS:-8}
  exec cargo test -- "$@"
fi
