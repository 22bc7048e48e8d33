#!/usr/bin/env bash
# Runs DEPLOY_TOKEN_UPDATE.md as it is written: what stands there in ```sh blocks, in order, in one shell, on a played server
# with a played shop and solver.
#
#   tests/compose/guide.sh             the whole guide
#   tests/compose/guide.sh GUIDE.md    another one
#   tests/compose/guide.sh --list      the blocks, and which of them are not run
#
# Blocks of ```sh norun are left out: they need a second server, a registry or the repository's address. Each line of a
# ```text block must come in the output of the block before it, spaces aside; … there stands for anything. Other blocks
# are not looked at.
#
# What is changed on the way: /opt is a folder of its own, images and projects have names of their own, the port is a free
# one, Docker's own resolver stands for public ones, and the stand-ins are laid over the compose files.
#
# Needs what tests/compose.sh needs, and touches nothing but what is its own (token-sidecar-guide-…).
set -euo pipefail
cd "$(dirname "$0")/../.."

repository=$PWD guide=DEPLOY_TOKEN_UPDATE.md list=
for argument; do
  case $argument in
    --list) list=yes ;;
    -h|--help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
    -*) echo "unknown option $argument, see $0 --help" >&2; exit 2 ;;
    *) guide=$argument ;;
  esac
done

name=tests/compose/guide.sh
# shellcheck source=tests/compose/lib.sh
. tests/compose/lib.sh
id=token-sidecar-guide-$$
work=$(mktemp -d)
nowhere=web-agr.chitai-gorod.ru:443=127.0.0.1:1,web-gate.chitai-gorod.ru:443=127.0.0.1:1,www.chitai-gorod.ru:443=127.0.0.1:1
block='' out=$work/out
exec 3>&1 4>&2

# --- the guide's blocks ---

# Writes each block of $guide that counts to a file of its own: LINE.sh, LINE.norun, LINE.text.
extract() {
  awk -v folder="$1" '
    file != "" && /^```$/ { close(file); file = ""; next }
    file != "" { print > file; next }
    /^```(sh|sh norun|text)$/ {
      kind = $0 == "```sh norun" ? "norun" : substr($0, 4)
      file = sprintf("%s/%05d.%s", folder, NR, kind)
      printf "" > file
      next
    }
    /^```./ { file = "/dev/null" }
  ' "$guide"
}

# As it is run here: nothing of the machine's own is meant.
moved() {
  sed -E -e "s#/opt/#$work/opt/#g" -e "s#token-sidecar:(latest|previous)#$id:\1#g" -e "s#127\.0\.0\.1:8080#$PUBLISH#g" \
    -e "s#\bbooks_#$id-books_#g" -e 's#1\.1\.1\.1,8\.8\.8\.8#127.0.0.11#g' \
    -e "s#token-sidecar-(token-sidecar|flaresolverr|redis)-([0-9])#$id-\1-\2#g" "$1"
}

# --- the stage ---

# A server with the repository in one folder, and an existing project in the other.
set_the_stage() {
  # Of an outer test, or of somebody who deploys.
  unset COMPOSE_FILE COMPOSE_PROJECT_NAME COMPOSE_PROFILES TOKEN_SIDECAR_IMAGE PARSERS_NETWORK HOST_ENV_FILE
  local server=$work/opt/token-sidecar
  mkdir -p "$server" "$work/tests/shop"
  cp -r Dockerfile .dockerignore Cargo.toml Cargo.lock src docker-compose.prod.yml docker-compose.override.example.yml \
    .env.prod.example deploy "$server/"
  cp -r tests/compose "$work/tests/compose"
  cp -r tests/compose/old-project "$work/opt/books"
  sed -i "s/token-sidecar:latest/$id:latest/" "$server"/docker-compose.*.yml
  sed -i "s/^name: token-sidecar$/name: $id/" "$server/docker-compose.prod.yml"
  sed -i "s/^name: my-parser$/name: $id-my-parser/" "$server/deploy/examples/parser.compose.yml"
  sed -i "s/\${TOKEN_SIDECAR_IMAGE:?}-old/$id-old/; s/^services:/name: $id-books\n&/" "$work/opt/books/docker-compose.yml"
  # Whatever happens, not the real shop.
  printf 'CONNECT_TO=%s\n' "$nowhere" >> "$server/.env.prod.example"
  printf '# of the old system\nDEBUG=1\nCHITAI_GOROD_BEARER_TOKEN=""\n' > "$work/opt/books/.env"
  make_shop_certificate "$work/tests/shop"
  chmod -R a+rX "$work"
  export TESTS=$work/tests PARSERS_NETWORK=$id-parsers CERTS_VOLUME=${id}_certs
  PUBLISH=127.0.0.1:$(python3 -c 'import socket; s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1])')
  export PUBLISH
  the_old_project up -d --build --wait >/dev/null 2>&1
}
the_old_project() { command docker compose -f "$work/opt/books/docker-compose.yml" "$@"; }

# The guide's docker: of compose files that need them, the stand-ins go along.
docker() {
  [ "${1:-}" = compose ] || { command docker "$@"; return; }
  shift
  local files
  if [ "${1:-}" = -f ]; then
    files=$2
    shift 2
  else
    files=$(sed -n 's/^COMPOSE_FILE=//p' .env 2>/dev/null | tail -1) || true
    [ -n "$files" ] || files=docker-compose.yml$([ ! -e docker-compose.override.yml ] || echo :docker-compose.override.yml)
  fi
  case $files in
    *docker-compose.prod.yml*) files+=:$TESTS/compose/docker-compose.test.yml ;;
    *docker-compose.override.yml*) files+=:docker-compose.test.yml ;;
  esac
  COMPOSE_FILE=$files command docker compose "$@"
}

clean_up() {
  local code=$? project
  exec 1>&3 2>&4
  if [ $code -ne 0 ] && [ -n "$block" ]; then
    printf 'FAILED (%s): %s:%d\n' "$code" "$guide" "$((10#$(basename "${block%.*}")))"
    sed 's/^/  $ /' "$block"
    sed 's/^/  | /' "$out"
  fi >&2
  for project in "$id" "$id-my-parser" "$id-books"; do
    command docker compose -p "$project" down --volumes --remove-orphans --timeout 5 >/dev/null 2>&1 || true
  done
  command docker image rm "$id:latest" "$id:previous" "$id-old" "$id-parser" "$id-my-parser-parser" >/dev/null 2>&1 || true
  rm -rf "$work"
  exit $code
}

# --- running it ---

fail() {
  echo "$*" >> "$out"
  exit 1
}

# check_output TEXT: each of its lines came.
check_output() {
  local line pattern
  while read -r line; do
    pattern=$(tr -s ' \t' ' ' <<<"$line" | sed -e 's/[][\.*^$+?(){}|]/\\&/g' -e 's/ \{0,1\}… \{0,1\}/.*/g')
    [ -z "$pattern" ] || tr -s ' \t' ' ' < "$out" | grep -qE -- "^ ?$pattern *\$" || fail "did not come: «$line»"
  done < <(moved "$1")
}

traffic() { (cd "$work/opt/token-sidecar" && docker compose --profile traffic "$@" 2>/dev/null); }

# Parsers in the middle of their work.
begin_traffic() {
  traffic up -d --no-deps traffic
  local end=$((SECONDS + 30))
  until traffic logs traffic | grep -q running; do
    [ $SECONDS -lt $end ] || fail "no traffic: $(traffic logs traffic)"
    sleep 0.2
  done
}

# What the parsers got: nothing but answers, without a connection that was refused.
end_traffic() {
  local container counts
  traffic kill -s SIGTERM traffic
  container=$(traffic ps -aq traffic)
  command docker wait "$container" >/dev/null
  counts=$(command docker logs "$container" 2>&1 | tail -1)
  traffic rm -f traffic >/dev/null
  printf '   under traffic: %s\n' "$counts" >&3
  grep -qxE '\{"200": [0-9]+\}' <<<"$counts" || fail "the traffic got $counts"
}

run_block() {
  local under_traffic=
  printf -- '-- %s:%d\n' "$guide" "$((10#$(basename "${block%.*}")))" >&3
  sed 's/^/   $ /' "$block" >&3
  moved "$block" > "$work/block.sh"
  if grep -q -- --no-recreate "$block"; then
    under_traffic=yes
    begin_traffic
  fi
  # shellcheck disable=SC1091
  . "$work/block.sh" > "$out" 2>&1 < /dev/null
  [ -z "$under_traffic" ] || end_traffic
}

nothing_is_left() {
  local left
  left=$({ command docker ps -a --format '{{.Names}}'; command docker volume ls -q; command docker network ls --format '{{.Name}}'; } |
    grep -F "$id" | grep -v "^$id-books[-_]") || true
  [ -z "$left" ] || fail "left over at the end of the guide: $left"
}

mkdir "$work/blocks"
extract "$work/blocks"
if [ -n "$list" ]; then
  for block in "$work"/blocks/*; do
    printf '%s:%d %s\n' "$guide" "$((10#$(basename "${block%.*}")))" "${block##*.}"
    sed 's/^/    /' "$block"
  done
  rm -rf "$work"
  exit 0
fi
trap clean_up EXIT
trap 'exit 130' INT TERM
check_needs
set_the_stage
cd "$work"
count=0
for file in "$work"/blocks/*; do
  case $file in
    *.sh) block=$file; run_block; count=$((count + 1)) ;;
    *.text) check_output "$file" ;;
  esac
done
nothing_is_left
printf '== all is well: %d blocks\n' "$count" >&3
