#!/usr/bin/env bash
# Builds and runs the fuzz targets.
#
#   fuzz/run.sh --build [OPTION…]       builds all of them, with options of `cargo fuzz build`
#   fuzz/run.sh SECONDS [TARGET…]       runs each of them, or those named, for so long
#   fuzz/run.sh --list                  names them
#
# Needed: cargo-fuzz (`cargo install cargo-fuzz --locked`), a C++ compiler, and a nightly toolchain; without one the
# default toolchain is told to take a nightly's options. What was found lies in fuzz/artifacts/TARGET, the corpus in
# fuzz/corpus/TARGET; it grows from run to run. The last lines of a run tell its executions and its coverage. A finding
# ends the run of its target, not of the others, and makes the script fail.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"
}

if rustc +nightly --version >/dev/null 2>&1; then
  fuzz=(cargo +nightly fuzz)
else
  export RUSTC_BOOTSTRAP=1
  fuzz=(cargo fuzz)
fi

# The recorded replies of FlareSolverr, each as the target reads it: two bytes of status, then the body.
solution_seeds() {
  python3 - "$1" <<'PYTHON'
import json, pathlib, sys
folder = pathlib.Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
replies = json.load(open("tests/fixtures/flaresolverr-replies.json"))
for index, case in enumerate(replies["cases"].values()):
    body = json.dumps(case["json"], ensure_ascii=False).encode()
    (folder / f"recorded-{index:02}").write_bytes(case["http_status"].to_bytes(2, "big") + body)
PYTHON
}

run_target() {
  local target=$1 seconds=$2 dict=fuzz/dict/$1 options=()
  mkdir -p "fuzz/corpus/$target"
  [ "$target" != solution ] || solution_seeds fuzz/corpus/solution
  [ ! -f "$dict" ] || options+=("-dict=$dict")
  local folders=("fuzz/corpus/$target")
  [ ! -d "fuzz/seeds/$target" ] || folders+=("fuzz/seeds/$target")
  echo "== $target, ${seconds} s"
  "${fuzz[@]}" run "$target" "${folders[@]}" -- \
    -max_total_time="$seconds" -max_len=8192 -timeout=10 -print_final_stats=1 -verbosity=1 "${options[@]}"
}

case ${1:-} in
  --build) shift; exec "${fuzz[@]}" build "$@" ;;
  --list) exec "${fuzz[@]}" list ;;
  ''|*[!0-9]*) usage; [ "${1:-}" = -h ] || [ "${1:-}" = --help ] || exit 2; exit 0 ;;
esac

seconds=$1
shift
[ $# -gt 0 ] || mapfile -t targets < <("${fuzz[@]}" list)
[ $# -eq 0 ] || targets=("$@")
failed=()
for target in "${targets[@]}"; do
  run_target "$target" "$seconds" || failed+=("$target")
done
if [ ${#failed[@]} -gt 0 ]; then
  echo "findings in ${failed[*]}: see fuzz/artifacts/" >&2
  exit 1
fi
