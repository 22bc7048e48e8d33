# For tests/slowhttp.sh and tests/tlsscan.sh: the release binary among stand-ins on loopback.
#
# start_sidecar [VARIABLE=value …]  sets $proxy, $sni, $admin (addresses), $pid and $work (a folder that goes at the end)

binary=${TOKEN_SIDECAR_BINARY:-${CARGO_TARGET_DIR:-target}/release/token-sidecar}
work=$(mktemp -d)
pids=()

finish() {
  local pid
  for pid in "${pids[@]}"; do
    kill "$pid" 2>/dev/null || true
    wait "$pid" 2>/dev/null || true
  done
  rm -rf "$work"
}
trap finish EXIT

# A field of the JSON log line with this message.
logged() {
  python3 - "$work/log" "$1" "$2" <<'PYTHON'
import json, sys, time
path, message, field = sys.argv[1:]
for _ in range(200):
    for line in open(path, errors="replace"):
        try:
            event = json.loads(line)
        except ValueError:
            continue
        event = {**event, **event.get("fields", {})}
        if event.get("message") == message:
            print(event.get(field) or "")
            sys.exit()
    time.sleep(0.05)
sys.exit(f"`{message}` was not logged")
PYTHON
}

certificates() {
  openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj "/CN=stand-in CA" \
    -keyout "$work/shop-ca.key" -out "$work/shop-ca.pem" 2>/dev/null
  openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj "/CN=stand-in" \
    -keyout "$work/shop.key" -out "$work/shop.csr" 2>/dev/null
  printf 'subjectAltName=DNS:*.chitai-gorod.ru\n' > "$work/shop.ext"
  openssl x509 -req -in "$work/shop.csr" -CA "$work/shop-ca.pem" -CAkey "$work/shop-ca.key" -days 2 \
    -extfile "$work/shop.ext" -out "$work/shop.pem" 2>/dev/null
}

start_sidecar() {
  if [ ! -x "$binary" ]; then
    echo "no $binary: cargo build --release, or set TOKEN_SIDECAR_BINARY" >&2
    exit 1
  fi
  binary=$(realpath "$binary")
  certificates
  python3 tests/wire/shop.py "$work/shop.pem" "$work/shop.key" > "$work/shop.port" &
  pids+=($!)
  until [ -s "$work/shop.port" ]; do sleep 0.05; done
  local port
  port=$(cat "$work/shop.port")
  # An anonymous token that ends tomorrow; the stand-in takes any.
  python3 - > "$work/shop.env" <<'PYTHON'
import base64, json, time
part = lambda data: base64.urlsafe_b64encode(json.dumps(data).encode()).decode().rstrip("=")
claims = {"iat": int(time.time()), "exp": int(time.time()) + 86400, "type": 10, "sub": "0"}
print(f'CHITAI_GOROD_BEARER_TOKEN="{part({"alg": "HS256"})}.{part(claims)}.c2lnbmF0dXJl"')
PYTHON
  # No name of the shop may be looked up: all of them lead to the stand-in.
  (
    cd "$work"
    exec env -i PATH="$PATH" PROXY_LISTEN=127.0.0.1:0 ADMIN_LISTEN=127.0.0.1:0 SNI_LISTEN=127.0.0.1:0 LOG_FORMAT=json \
      CA_DIR="$work/certs" ENV_FILE="$work/shop.env" UPSTREAM_CA_FILE="$work/shop-ca.pem" TOKEN_SOURCES=direct \
      CONNECT_TO="web-agr.chitai-gorod.ru:443=127.0.0.1:$port,web-gate.chitai-gorod.ru:443=127.0.0.1:$port,www.chitai-gorod.ru:443=127.0.0.1:$port" \
      "$@" "$binary" run 2> "$work/log"
  ) &
  pid=$!
  pids+=("$pid")
  until [ -s "$work/log" ]; do sleep 0.05; done
  proxy=$(logged listening proxy)
  admin=$(logged listening admin)
  sni=$(logged listening sni)
}
