# What tests/compose.sh and tests/compose/guide.sh have in common; they set `name` to their own.

images=(rust:1.95.0-slim-bookworm gcr.io/distroless/static-debian12:nonroot redis:7-bookworm python:3.11-slim-bookworm)

skip() {
  echo "skipped: $name: $*" >&2
  [ "${TOKEN_SIDECAR_TEST_NO_SKIP:-}" != all ] || exit 1
  exit 0
}

check_needs() {
  local missing=() image
  local tool
  for tool in openssl python3; do
    command -v "$tool" >/dev/null || skip "$tool is missing"
  done
  docker info >/dev/null 2>&1 || skip "no Docker engine answers"
  docker compose version >/dev/null 2>&1 || skip "the plugin docker compose is missing"
  printf '2.24\n%s\n' "$(docker compose version --short | tr -d v)" | sort -VC || skip "docker compose is older than 2.24"
  for image in "${images[@]}"; do
    docker image inspect "$image" >/dev/null 2>&1 || missing+=("$image")
  done
  [ ${#missing[@]} -eq 0 ] || skip "images are missing: for image in ${missing[*]}; do docker pull \$image; done"
}

# make_shop_certificate FOLDER: for the hosts that the shop plays; any container may read it.
make_shop_certificate() {
  openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj '/CN=shop' \
    -addext 'basicConstraints=critical,CA:FALSE' \
    -addext 'subjectAltName=DNS:web-agr.chitai-gorod.ru,DNS:web-gate.chitai-gorod.ru,DNS:www.chitai-gorod.ru' \
    -keyout "$1/key.pem" -out "$1/cert.pem" 2>/dev/null
  chmod a+r "$1/key.pem"
}
