#!/usr/bin/env bash
# Scans the interception face (SNI_LISTEN of the release binary) with sslyze. Everything is on loopback.
#
#   cargo build --release && tests/tlsscan.sh     needs openssl, python3 with venv; sslyze comes from PyPI
#
# The environment of sslyze is kept in TOKEN_SIDECAR_SCAN_VENV (target/sslyze). The last part of the output compares with
# Mozilla's recommendations; what it says of the certificate is meant for a public web server: ours is for parsers that
# trust the sidecar's own CA.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=tests/wire/lib.sh
. tests/wire/lib.sh

venv=${TOKEN_SIDECAR_SCAN_VENV:-${CARGO_TARGET_DIR:-target}/sslyze}
if [ ! -x "$venv/bin/sslyze" ]; then
  python3 -m venv "$venv"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check sslyze
fi
start_sidecar
name=web-agr.chitai-gorod.ru
# The address in braces is where it connects; the name is only said in the handshake.
status=0
"$venv/bin/sslyze" --certinfo_ca_file "$work/certs/ca.pem" --mozilla_config "${MOZILLA_CONFIG:-intermediate}" \
  --resum --early_data "$name:${sni##*:}{127.0.0.1}" || status=$?
exit "$status"
