#!/usr/bin/env bash
# How a normal client fares while 1,000 slow ones hold on to the release binary. Everything is on loopback.
#
#   cargo build --release && tests/slowhttp.sh     needs slowhttptest (Debian), openssl, python3
#
# SLOW_CONNECTIONS (1000), SLOW_SECONDS (30): how many slow connections, and how long each attack. Three attacks of
# slowhttptest: slow heads (-H), slow bodies (-B), slow reads (-X). The goal: the client's p99 stays under 50 ms above
# what it was before; the script fails if it does not, or if a request of the client fails.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=tests/wire/lib.sh
. tests/wire/lib.sh

connections=${SLOW_CONNECTIONS:-1000} seconds=${SLOW_SECONDS:-30}
command -v slowhttptest >/dev/null || { echo "please install slowhttptest" >&2; exit 1; }
ulimit -n "$(ulimit -Hn)"

start_sidecar
url=http://$proxy/web/api/v2/x

sidecar_connections() {
  python3 -c "import sys, urllib.request as u
print(next(l for l in u.urlopen('http://$admin/metrics').read().decode().splitlines() if l.startswith('sidecar_connections ')))"
}

p99() { sed -n 's/.*p99 \([0-9]*\)\..*/\1/p' <<< "$1"; }
failures() { sed -n 's/.* \([0-9]*\) failed.*/\1/p' <<< "$1"; }

python3 tests/wire/latency.py "$proxy" 2 > /dev/null
before=$(python3 tests/wire/latency.py "$proxy" 10)
echo "before:      $before"
worst=0
attack() {
  local name=$1 during attacker
  shift
  slowhttptest "$@" -c "$connections" -r 500 -l "$seconds" -p 5 -u "$url" > "$work/attack.log" 2>&1 &
  attacker=$!
  pids+=("$attacker")
  # Only once they are all there.
  sleep 5
  echo "$name: $(sidecar_connections)"
  during=$(python3 tests/wire/latency.py "$proxy" $((seconds - 10)))
  echo "$name: $during"
  wait "$attacker" || true
  sed 's/\x1b\[[0-9;]*m//g' "$work/attack.log" | grep -aE '^(Exit status|(initializing|pending|connected|error|closed):)' | tail -6 |
    sed "s/^/$name:   /"
  if [ "$(p99 "$during")" -ge $(($(p99 "$before") + 50)) ] || [ "$(failures "$during")" -ne 0 ]; then
    worst=1
  fi
}
attack 'slow heads ' -H -i 3 -t GET -x 24
attack 'slow bodies' -B -i 3 -t POST -s 8192 -x 24
attack 'slow reads ' -X -t GET -w 10 -y 20 -n 5 -z 32 -k 3
# What the slow ones held is free again.
python3 - "$pid" <<'PYTHON'
import os, sys
print("after:       ", len(os.listdir(f"/proc/{sys.argv[1]}/fd")), "descriptors of the sidecar")
PYTHON
exit $worst
