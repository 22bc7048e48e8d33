#!/usr/bin/env bash
# Runs the compose project as a server would, in a real Docker engine, with a played shop and solver.
#
#   tests/compose.sh            everything
#   tests/compose.sh NAME…      only the checks of these names
#   tests/compose.sh --keep …   leaves the last project running, and says how to look into it and to remove it
#   tests/compose.sh --list     the names
#
# Needs a Docker engine with compose 2.24 and the base images (Dockerfile, docker-compose.prod.yml). Where something is
# missing it says what, and is skipped; with TOKEN_SIDECAR_TEST_NO_SKIP=all it fails instead. Touches nothing but its own
# containers, networks, volumes and image, whose names begin with token-sidecar-test.
set -euo pipefail
cd "$(dirname "$0")/.."

checks=(
  the_container_is_locked_down
  every_service_is_hardened_and_bounded
  parsers_reach_the_proxy_alone
  the_parser_has_what_env_prints
  the_unchanged_parser_survives_the_death_of_the_token
  the_token_rests_in_redis_and_in_the_volume
  the_key_of_the_ca_is_the_sidecars_alone
  commands_work_in_the_container
  a_restart_keeps_token_and_ca
  redis_may_die_and_come_back
  flaresolverr_may_stop
  an_update_loses_no_request
  a_stop_lets_slow_answers_end
  logs_hold_no_secret
  a_parser_of_another_project_joins
  a_client_without_proxy_comes_by_the_alias
  the_hosts_env_file_is_kept_up_to_date
  it_starts_without_its_neighbours
  a_password_of_ones_own_may_have_any_characters
  three_sidecars_share_one_volume
  three_sidecars_solve_once
  both_systems_share_their_keys
)

keep='' chosen=()
for argument; do
  case $argument in
    --keep) keep=yes ;;
    --list) printf '%s\n' "${checks[@]}"; exit 0 ;;
    -h|--help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
    *)
      printf '%s\n' "${checks[@]}" | grep -qxF -- "$argument" || { echo "no check $argument, see $0 --help" >&2; exit 2; }
      chosen+=("$argument") ;;
  esac
done
[ ${#chosen[@]} -gt 0 ] || chosen=("${checks[@]}")

name=tests/compose.sh
# shellcheck source=tests/compose/lib.sh
. tests/compose/lib.sh
id=token-sidecar-test-$$
repository=$PWD
projects=("$id-other")

# --- saying and failing ---

step() { printf '\n== %s\n' "$*"; }
note() { printf '   %s\n' "$*"; }

fail() {
  printf 'FAILED: %s\n' "$*" >&2
  docker compose logs --no-color --tail 40 >&2 2>/dev/null || true
  exit 1
}

# is WHAT EXPECTED FOUND
is() { [ "$2" = "$3" ] || fail "$1: expected «$2», found «$3»"; }

# has WHAT PATTERN TEXT
has() { grep -qE -- "$2" <<<"$3" || fail "$1: no «$2» in: $3"; }

# eventually SECONDS COMMAND…: until it succeeds.
eventually() {
  local end=$((SECONDS + $1)); shift
  until "$@" >/dev/null 2>&1; do
    [ $SECONDS -lt $end ] || fail "not within its time: $*"
    sleep 0.2
  done
}

clean_up() {
  local code=$? project
  if [ -n "$keep" ]; then
    echo "left: docker compose -p ${COMPOSE_PROJECT_NAME:-$id} ps, or logs, or exec token-sidecar token-sidecar status"
    printf 'to remove: docker compose -p %s down --volumes\n' "${projects[@]}"
    echo "to remove: docker image rm $id; rm -r $work"
    exit $code
  fi
  for project in "${projects[@]}"; do
    docker compose -p "$project" down --volumes --remove-orphans --timeout 5 >/dev/null 2>&1 || true
  done
  docker image rm "$id" "$id-old" "$id-prod-parser" "$id-other-parser" >/dev/null 2>&1 || true
  rm -rf "$work" 2>/dev/null || docker run --rm -v "$work:/work" python:3.11-slim-bookworm sh -c 'rm -rf /work/*'
  exit $code
}

# --- the parts of a project ---

sidecar() { docker compose exec -T token-sidecar token-sidecar "$@"; }
redis() { docker compose exec -T redis sh -c '[ ! -s /data/password ] || export REDISCLI_AUTH=$(cat /data/password); exec redis-cli "$@"' redis-cli "$@"; }
container() { docker compose ps -aq "$1"; }
inspect() { docker inspect --format "$2" "$(container "$1")"; }
fingerprint() { sidecar token | awk '$1 == "fingerprint" { print $2; exit }'; }
status_of() { sidecar status | python3 -c 'import json, sys; print(json.load(sys.stdin)[sys.argv[1]][sys.argv[2]])' "$@"; }

# shop GET|POST PATH: moves the played shop, or asks it.
shop() {
  docker compose exec -T shop python3 -c 'import sys, urllib.request as u
print(u.urlopen(u.Request("http://localhost:8000" + sys.argv[2], method=sys.argv[1])).read().decode())' "$@"
}
stat_of() { shop GET /stats | python3 -c 'import json, sys; print(json.load(sys.stdin)[sys.argv[1]])' "$1"; }

# parse PHRASE…: the example parser, as its image has it.
parse() { docker compose --profile example run --rm --no-deps -T parser python3 -u /app/parser.py "$@"; }

# A folder as on a server, with a shop's certificate beside it.
set_the_stage() {
  # Of somebody who deploys.
  unset COMPOSE_PROFILES REDIS_PASSWORD REDIS_URL FLARESOLVERR_URL UPSTREAM_DNS
  mkdir -p "$work/server" "$work/tests/compose" "$work/tests/shop"
  cp -r docker-compose.prod.yml .env.prod.example deploy "$work/server/"
  cp tests/compose/*.py tests/compose/*.yml "$work/tests/compose/"
  make_shop_certificate "$work/tests/shop"
  chmod -R a+rX "$work"
  export TESTS=$work/tests TOKEN_SIDECAR_IMAGE=$id
  cd "$work/server"
}

# project NAME FILE…: the one that the commands after it are about.
project() {
  export COMPOSE_PROJECT_NAME=$id-$1 PARSERS_NETWORK=$id-$1-parsers
  shift
  COMPOSE_FILE=$(IFS=:; echo "$*")
  export COMPOSE_FILE
  projects+=("$COMPOSE_PROJECT_NAME")
}

# --- what is checked ---

the_image_is_small_and_has_no_shell() {
  step "the image"
  docker build --quiet --build-arg REVISION="$(git rev-parse HEAD 2>/dev/null || echo unknown)" -t "$id" "$repository" >/dev/null
  local size
  size=$(docker image inspect --format '{{.Size}}' "$id")
  note "$size bytes"
  [ "$size" -le 15000000 ] || fail "the image has $size bytes, more than 15 MB"
  is "user" 65532:65532 "$(docker image inspect --format '{{.Config.User}}' "$id")"
  is "title" token-sidecar "$(docker image inspect --format '{{index .Config.Labels "org.opencontainers.image.title"}}' "$id")"
  has "health check" 'token-sidecar healthcheck' "$(docker image inspect --format '{{.Config.Healthcheck.Test}}' "$id")"
  ! docker run --rm --entrypoint sh "$id" -c true 2>/dev/null || fail "there is a shell in the image"
  has "version" '^token-sidecar [0-9]' "$(docker run --rm --network none --read-only --cap-drop ALL "$id" --version)"
}

a_new_server_needs_two_commands() {
  step "cp .env.prod.example .env && docker compose up -d --wait"
  local began=$SECONDS
  { cp .env.prod.example .env && docker compose up -d --wait; } 2> up.log || fail "$(cat up.log)"
  note "healthy after $((SECONDS - began)) s"
  for service in token-sidecar flaresolverr redis; do
    is "health of $service" healthy "$(inspect $service '{{.State.Health.Status}}')"
  done
  eventually 20 sidecar healthcheck --ready
}

the_container_is_locked_down() {
  step "read-only root, no capabilities, nothing published"
  is "read-only root" true "$(inspect token-sidecar '{{.HostConfig.ReadonlyRootfs}}')"
  is "capabilities" '[ALL] []' "$(inspect token-sidecar '{{.HostConfig.CapDrop}} {{.HostConfig.CapAdd}}')"
  is "privileges" '[no-new-privileges:true]' "$(inspect token-sidecar '{{.HostConfig.SecurityOpt}}')"
  local process
  process=$(inspect token-sidecar '{{.State.Pid}}')
  has "effective capabilities" 'CapEff:\s0000000000000000' "$(cat "/proc/$process/status")"
  has "user" 'Uid:\s65532\s65532' "$(cat "/proc/$process/status")"
  is "processes" token-sidecar "$(docker top "$(container token-sidecar)" -eo pid,comm | awk 'NR > 1 { print $2 }')"
  for service in token-sidecar flaresolverr redis; do
    is "published ports of $service" '' "$(docker port "$(container $service)")"
  done
  note "resident: $(awk '/^VmRSS/ { print $2, $3 }' "/proc/$process/status")"
}

every_service_is_hardened_and_bounded() {
  step "the settings of each service"
  docker compose -f docker-compose.prod.yml --profile example config --format json | python3 "$TESTS/compose/settings.py" ||
    fail "docker-compose.prod.yml is not as it should be"
}

parsers_reach_the_proxy_alone() {
  step "what a parser reaches"
  local reachable
  reachable=$(docker compose --profile example run --rm --no-deps -T parser python3 -c 'import socket
for host, port in [("token-sidecar", 8080), ("token-sidecar", 9090), ("redis", 6379), ("flaresolverr", 8191)]:
    try:
        socket.create_connection((host, port), 2)
        print(host, port)
    except OSError:
        pass')
  is "reachable" "token-sidecar 8080" "$reachable"
  local address
  for address in $(inspect redis '{{range .NetworkSettings.Networks}}{{.IPAddress}} {{end}}'); do
    is "Redis by its address, and by the proxy" "no 403" "$(docker compose --profile example run --rm --no-deps -T -e "REDIS=$address" parser python3 -c 'import os, socket
try:
    socket.create_connection((os.environ["REDIS"], 6379), 2)
    print("yes", end=" ")
except OSError:
    print("no", end=" ")
proxy = socket.create_connection(("token-sidecar", 8080), 2)
proxy.sendall(b"CONNECT %s:6379 HTTP/1.1\r\nHost: x\r\n\r\n" % os.environ["REDIS"].encode())
print(proxy.recv(100).split()[1].decode())')"
  done
  local volumes
  volumes=$(docker compose --profile example run --rm --no-deps -T parser ls /certs)
  is "files that a parser sees" "ca-bundle.pem ca.pem" "$(tr -s '\n' ' ' <<<"$volumes" | sed 's/ $//')"
}

the_parser_has_what_env_prints() {
  step "the service parser has the output of token-sidecar env --format compose"
  local printed file
  printed=$(sidecar env --format compose | grep -v '^ *#' | sed 's/^/    /')
  for file in docker-compose.prod.yml deploy/examples/parser.compose.yml; do
    is "fragment in $file" "$printed" "$(sed -n '/^  parser:/,/^networks:/p' $file | sed -n '/^    environment:/,/^$/p' | grep -v '^$')"
  done
}

the_unchanged_parser_survives_the_death_of_the_token() {
  step "the example parser, while its token dies"
  local before printed
  before=$(fingerprint)
  shop POST '/revoke?after=2' >/dev/null
  printed=$(parse python rust война мир)
  sed 's/^/   /' <<<"$printed"
  is "answers" 4 "$(grep -c 'HTTP 200, .*Книга про' <<<"$printed")"
  [ "$(stat_of refused)" -gt 0 ] || fail "no token was refused"
  [ "$before" != "$(fingerprint)" ] || fail "the token is the old one"
  is "renewed by" flaresolverr "$(status_of token source)"
}

the_token_rests_in_redis_and_in_the_volume() {
  step "Redis and the token's file"
  eventually 10 redis_and_file_agree
  local ttl
  ttl=$(redis TTL chitai_gorod_token)
  { [ "$ttl" -gt 80000 ] && [ "$ttl" -le 86400 ]; } || fail "TTL is $ttl"
  has "cookies" '"access-token":"Bearer%20' "$(redis GET chitai_gorod_cookies)"
  has "without password" NOAUTH "$(docker compose exec -T redis redis-cli PING 2>&1)"
  is "mode of the token's file" 600 "$(in_state stat -c %a /state/token.env)"
}
in_state() { docker run --rm -v "${COMPOSE_PROJECT_NAME}_state:/state" python:3.11-slim-bookworm "$@"; }
redis_and_file_agree() {
  local token
  token=$(redis GET chitai_gorod_token)
  [ -n "$token" ] && in_state grep -qF "CHITAI_GOROD_BEARER_TOKEN=\"$token\"" /state/token.env
}

the_key_of_the_ca_is_the_sidecars_alone() {
  step "ca.key lies in no volume that a parser mounts"
  is "mounts of ca" token-sidecar "$(docker compose --profile example config --format json | python3 -c 'import json, sys
services = json.load(sys.stdin)["services"]
print(*[name for name, service in services.items() if any(v.get("source") == "ca" for v in service.get("volumes", []))])')"
  is "mode of ca.key" 600 "$(docker run --rm -v "${COMPOSE_PROJECT_NAME}_ca:/ca" python:3.11-slim-bookworm stat -c %a /ca/ca.key)"
}

commands_work_in_the_container() {
  step "refresh, token, ca, doctor in the container"
  has "refresh" 'source +flaresolverr' "$(sidecar refresh)"
  has "token" 'redis' "$(sidecar token)"
  has "ca" 'web-agr.chitai-gorod.ru' "$(sidecar ca)"
  sidecar doctor > doctor.txt || fail "doctor: $(cat doctor.txt)"
  has "metrics" '^sidecar_token_generation' "$(sidecar status --metrics)"
}

a_restart_keeps_token_and_ca() {
  step "restart"
  local token ca
  token=$(fingerprint) ca=$(sidecar ca)
  docker compose restart token-sidecar 2>/dev/null
  eventually 15 sidecar healthcheck --ready
  is "token" "$token" "$(status_of token fingerprint)"
  is "CA" "$ca" "$(sidecar ca)"
  has "answer" 'HTTP 200' "$(parse python)"
}

redis_may_die_and_come_back() {
  step "Redis killed and back"
  docker compose kill redis 2>/dev/null
  shop POST '/revoke?after=0' >/dev/null
  has "answer without Redis" 'HTTP 200' "$(parse python)"
  eventually 20 healthy token-sidecar
  docker compose up -d --wait redis 2>/dev/null
  eventually 60 redis_has_the_present_token
  docker compose stop token-sidecar 2>/dev/null
  docker compose kill redis 2>/dev/null
  docker compose up -d --wait redis 2>/dev/null
  has "the token in the append-only file" '^eyJ' "$(redis GET chitai_gorod_token)"
  docker compose up -d --wait token-sidecar 2>/dev/null
}
healthy() { [ "$(inspect "$1" '{{.State.Health.Status}}')" = healthy ]; }
redis_has_the_present_token() {
  local memory
  memory=$(status_of token fingerprint)
  [ "$(redis GET chitai_gorod_token | tr -d '\n' | sha256sum | cut -c1-8)" = "$memory" ]
}

flaresolverr_may_stop() {
  step "FlareSolverr stopped"
  docker compose stop flaresolverr 2>/dev/null
  shop POST '/revoke?after=0' >/dev/null
  has "answer without FlareSolverr" 'HTTP 200' "$(parse python)"
  is "renewed by" direct "$(status_of token source)"
  docker compose up -d --wait flaresolverr 2>/dev/null
}

an_update_loses_no_request() {
  step "docker compose up -d --force-recreate under traffic"
  local traffic counts old
  docker compose --profile traffic up -d --no-deps traffic 2>/dev/null
  eventually 30 eval 'docker compose logs traffic | grep -q running'
  eventually 10 eval '[ "$(stat_of slow)" -gt 2 ]'
  old=$(container token-sidecar)
  docker compose up -d --no-deps --force-recreate --wait token-sidecar 2>/dev/null
  [ "$old" != "$(container token-sidecar)" ] || fail "the container is the old one"
  docker compose --profile traffic kill -s SIGTERM traffic 2>/dev/null
  traffic=$(docker compose --profile traffic ps -aq traffic)
  is "exit code of the traffic" 0 "$(docker wait "$traffic")"
  counts=$(docker logs "$traffic" 2>&1 | tail -1)
  note "$counts"
  is "what came" 'only 200, and refused connections that were tried again' "$(python3 -c 'import json, sys
counts = json.loads(sys.argv[1])
fine = counts.get("200", 0) > 50 and set(counts) <= {"200", "retried"}
print("only 200, and refused connections that were tried again" if fine else counts)' "$counts")"
  docker compose --profile traffic rm -f traffic >/dev/null 2>&1
}

a_stop_lets_slow_answers_end() {
  step "docker compose stop while a slow answer runs, longer than the 10 s that Docker gives by itself"
  local old slow began
  old=$(container token-sidecar)
  slow=$(docker compose --profile example run -d --no-deps parser python3 -c 'import requests
print(requests.get("https://web-agr.chitai-gorod.ru/web/api/v2/slow?seconds=15", timeout=40).status_code)')
  eventually 20 eval '[ "$(stat_of slow)" -gt 0 ]'
  began=$SECONDS
  docker compose stop token-sidecar 2>/dev/null
  note "stopped after $((SECONDS - began)) s"
  is "exit code" 0 "$(docker inspect --format '{{.State.ExitCode}}' "$old")"
  is "exit code of the parser" 0 "$(docker wait "$slow")"
  is "the slow answer" 200 "$(docker logs "$slow" 2>&1)"
  docker rm "$slow" >/dev/null
  began=$SECONDS
  docker compose up -d --no-deps --wait token-sidecar 2>/dev/null
  docker compose stop token-sidecar 2>/dev/null
  [ $((SECONDS - began)) -le 20 ] || fail "start and stop took $((SECONDS - began)) s"
  docker compose up -d --no-deps --wait token-sidecar 2>/dev/null
}

logs_hold_no_secret() {
  step "logs without secrets"
  local secret
  sidecar refresh >/dev/null
  docker compose logs --no-color > logs.txt 2>&1
  has "the log of the refresh" 'token refreshed' "$(cat logs.txt)"
  for secret in "$(redis GET chitai_gorod_token)" "$(docker compose exec -T redis cat /data/password)" 'eyJ'; do
    ! grep -qF -- "$secret" logs.txt || fail "a secret is in the logs"
  done
  docker inspect "$(container token-sidecar)" "$(container redis)" > inspect.txt
  ! grep -qF "$(docker compose exec -T redis cat /data/password)" inspect.txt || fail "the password is in docker inspect"
}

it_starts_without_its_neighbours() {
  step "new volumes that a parser had first; neither Redis nor FlareSolverr"
  docker compose down --volumes --timeout 5 2>/dev/null
  docker compose --profile example run --rm --no-deps -T parser true 2>/dev/null
  docker compose up -d --wait token-sidecar shop 2>/dev/null
  has "answer" 'HTTP 200' "$(parse python)"
  is "services" "shop token-sidecar" "$(docker compose ps --services | sort | tr '\n' ' ' | sed 's/ $//')"
  docker compose up -d --wait 2>/dev/null
  eventually 60 redis_has_the_present_token
}

a_password_of_ones_own_may_have_any_characters() {
  step "a password of one's own"
  local password=' p"a\s$s #@:/% '
  sed "s|^REDIS_PASSWORD=.*|REDIS_PASSWORD='${password//\\/\\\\}'|" .env.prod.example > .env
  docker compose up -d --wait 2>/dev/null
  eventually 60 redis_has_the_present_token
  is "the password" "$password" "$(docker compose exec -T redis cat /data/password)"
  is "redis-cli by itself" PONG "$(docker compose exec -T redis redis-cli PING)"
  cp .env.prod.example .env
}

three_sidecars_share_one_volume() {
  step "three sidecars on new volumes, started at once"
  docker compose down --volumes --timeout 5 2>/dev/null
  docker compose up -d --wait --scale token-sidecar=3 2>/dev/null
  # Each shows in a handshake which CA it has in use; that of the volume would be the same in any case.
  is "answers of each by the volume's CA" "200 200 200" "$(docker compose --profile example run --rm --no-deps -T parser python3 -c 'import socket, requests
for address in socket.gethostbyname_ex("token-sidecar")[2]:
    answer = requests.get("https://web-agr.chitai-gorod.ru/web/api/v2/x", proxies={"https": f"http://{address}:8080"}, timeout=30)
    print(answer.status_code)' | tr '\n' ' ' | sed 's/ $//')"
  docker compose up -d --scale token-sidecar=1 2>/dev/null
}

three_sidecars_solve_once() {
  step "three sidecars, whose token dies for all of them at once"
  docker compose up -d --wait --scale token-sidecar=3 2>/dev/null
  eventually 60 all_three_have_the_token_of_redis
  local pages sign_ins
  pages=$(stat_of pages) sign_ins=$(stat_of sign_ins)
  shop POST '/revoke?after=0' >/dev/null
  is "answers" "30 of 3 sidecars: 200" "$(docker compose --profile example run --rm --no-deps -T parser python3 -c 'import socket, requests
from concurrent.futures import ThreadPoolExecutor
addresses = socket.gethostbyname_ex("token-sidecar")[2]
def ask(address):
    return requests.get("https://web-agr.chitai-gorod.ru/web/api/v2/x", proxies={"https": f"http://{address}:8080"}, timeout=60).status_code
with ThreadPoolExecutor(30) as threads:
    codes = list(threads.map(ask, addresses * 10))
print(len(codes), "of", len(addresses), "sidecars:", *sorted(set(codes)))')"
  eventually 60 all_three_have_the_token_of_redis
  is "pages solved for all of them" $((pages + 1)) "$(stat_of pages)"
  is "sign-ins beside that" "$sign_ins" "$(stat_of sign_ins)"
  docker compose up -d --scale token-sidecar=1 2>/dev/null
}
all_three_have_the_token_of_redis() {
  local number in_redis
  in_redis=$(redis GET chitai_gorod_token | tr -d '\n' | sha256sum | cut -c1-8)
  for number in 1 2 3; do
    [ "$(docker compose exec -T --index $number token-sidecar token-sidecar token | awk '$1 == "fingerprint" { print $2; exit }')" = "$in_redis" ] || return 1
  done
}

a_parser_of_another_project_joins() {
  step "a parser of another project"
  local printed
  printed=$(CERTS_VOLUME=${COMPOSE_PROJECT_NAME}_certs docker compose -p "$id-other" -f deploy/examples/parser.compose.yml run --build --rm -T parser 2>/dev/null)
  docker compose -p "$id-other" -f deploy/examples/parser.compose.yml down --rmi local 2>/dev/null
  has "answer" 'HTTP 200' "$printed"
}

a_client_without_proxy_comes_by_the_alias() {
  step "the alias, for clients that ignore proxies"
  # Docker's own resolver will do here, since CONNECT_TO goes before it.
  export UPSTREAM_DNS=127.0.0.11
  COMPOSE_FILE=$COMPOSE_FILE:deploy/examples/alias.compose.yml docker compose up -d --wait --no-deps token-sidecar 2>/dev/null
  has "answer" 'HTTP 200' "$(docker compose --profile example run --rm --no-deps -T \
    -e https_proxy= -e HTTPS_PROXY= -e http_proxy= -e HTTP_PROXY= parser)"
  has "route" 'route="sni",status="200"' "$(sidecar status --metrics)"
  unset UPSTREAM_DNS
}

as_root() { docker run --rm -v "$work:/work" python:3.11-slim-bookworm sh -c "$1"; }
the_hosts_env_file_is_kept_up_to_date() {
  step "the .env on the host, where that is wanted"
  export HOST_ENV_FILE=$work/host.env
  local with=$COMPOSE_FILE:deploy/examples/env-file.compose.yml
  printf '# of the parser\nDEBUG=1\nCHITAI_GOROD_BEARER_TOKEN="old"\nLAST=x' > "$HOST_ENV_FILE"
  as_root "chgrp 65532 /work/host.env"
  as_root "chmod 660 /work/host.env"
  COMPOSE_FILE=$with docker compose up -d --wait --no-deps token-sidecar 2>/dev/null
  sidecar refresh >/dev/null
  eventually 10 grep -qF "CHITAI_GOROD_BEARER_TOKEN=\"$(redis GET chitai_gorod_token)\"" "$HOST_ENV_FILE"
  is "the other lines" "# of the parser DEBUG=1 LAST=x" "$(grep -v CHITAI "$HOST_ENV_FILE" | tr '\n' ' ' | sed 's/ *$//')"
  is "its mode and group" "660 65532" "$(stat -c '%a %g' "$HOST_ENV_FILE")"

  as_root "sed -i s/DEBUG=1/DEBUG=2/ /work/host.env"
  sidecar refresh >/dev/null
  eventually 10 eval 'docker compose logs token-sidecar | grep -q "it was replaced where it is mounted from"'
  docker compose restart token-sidecar 2>/dev/null
  eventually 15 sidecar healthcheck --ready
  eventually 10 grep -qF "CHITAI_GOROD_BEARER_TOKEN=\"$(redis GET chitai_gorod_token)\"" "$HOST_ENV_FILE"

  as_root "chgrp 0 /work/host.env"
  as_root "chmod 644 /work/host.env"
  cp "$HOST_ENV_FILE" before.env
  COMPOSE_FILE=$with docker compose up -d --wait --no-deps --force-recreate token-sidecar 2>/dev/null
  sidecar refresh >/dev/null
  sidecar refresh >/dev/null
  eventually 10 redis_has_the_present_token
  cmp before.env "$HOST_ENV_FILE" || fail "the file was changed"
  is "warnings" 1 "$(docker compose logs token-sidecar | grep -c 'WARN.*env file')"
  has "the warning" 'ENV_FILE' "$(docker compose logs token-sidecar | grep 'WARN.*env file')"
}

# --- beside the system that it replaces ---

old() { docker compose exec -T celery python3 /app/old_system.py "$@"; }

both_systems_share_their_keys() {
  step "an existing project: the sidecar comes"
  cp -r "$repository/tests/compose/old-project" "$work/old" && cd "$work/old"
  cp "$repository/docker-compose.override.example.yml" docker-compose.override.yml
  project old docker-compose.yml
  docker compose up -d --wait --build 2>&1 | tail -1
  eventually 20 old refresh
  is "search before" "200 at once" "$(old search python)"
  local with=$COMPOSE_FILE:docker-compose.override.yml:docker-compose.test.yml pages
  pages=$(stat_of pages)
  COMPOSE_FILE=$with
  docker compose up -d --wait 2>/dev/null
  eventually 40 redis_has_the_present_token
  is "pages that were solved for it" "$pages" "$(stat_of pages)"
  is "search by the gateway" "200 at once" "$(old search python)"
  has "route" 'route="gateway",status="200"' "$(sidecar status --metrics)"

  step "the token dies: the sidecar renews it for both"
  shop POST '/revoke?after=0' >/dev/null
  is "search after a token's death" "200 at once" "$(old search python)"
  eventually 10 redis_has_the_present_token
  is "both keys" "Bearer%20$(redis GET chitai_gorod_token)" "$(redis GET chitai_gorod_cookies | python3 -c 'import json, sys; print(json.load(sys.stdin)["access-token"])')"

  step "the old system renews it: the sidecar takes it over"
  old refresh
  eventually 40 redis_has_the_present_token

  step "rolled back"
  COMPOSE_FILE=docker-compose.yml
  docker compose up -d --wait --remove-orphans 2>/dev/null
  is "services" "celery flaresolverr redis shop" "$(docker compose ps --services | sort | tr '\n' ' ' | sed 's/ $//')"
  is "search without the sidecar" "200 at once" "$(old search python)"

  step "the other order: the sidecar is first"
  COMPOSE_FILE=$with
  docker compose down --volumes --timeout 1 2>/dev/null
  docker compose up -d --wait token-sidecar redis flaresolverr shop 2>/dev/null
  eventually 20 redis_has_the_present_token
  docker compose up -d --wait celery 2>/dev/null
  is "search with the sidecar's keys" "200 at once" "$(docker compose exec -T -e CHITAI_GOROD_API_URL=https://web-agr.chitai-gorod.ru/web/api/v2 celery python3 /app/old_system.py search python)"
}

check_needs
work=$(mktemp -d)
trap clean_up EXIT
trap 'exit 130' INT TERM
set_the_stage
the_image_is_small_and_has_no_shell
project prod docker-compose.prod.yml "$TESTS/compose/docker-compose.test.yml"
docker compose --profile example build --quiet parser
a_new_server_needs_two_commands
for check in "${chosen[@]}"; do
  $check
done
step "all is well"
