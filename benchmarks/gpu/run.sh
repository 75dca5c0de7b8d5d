#!/bin/bash
# Everything that a GPU is asked for, in one call and at most $TOTAL_S (480) seconds: build, correctness of every op, the
# sanitizers, the engine, the op benchmarks and one real run. A step that fails or takes too long does not stop the next.
#
#   benchmarks/gpu/run.sh [--device cuda|cpu] [--smoke] [--wheels FOLDER] [--out FOLDER]
#
# --wheels: a bare machine without a network; what is in FOLDER is installed beside the Python that is there ($PYTHON).
# --smoke: the smallest sizes, to see that all of it runs; with --device cpu on a machine without a GPU.
# Results in --out (build/gpu): summary.txt, which is printed last, log.txt and the CSVs. The exit code is the number of
# steps that failed.
set -u
cd "$(dirname "$0")/../.." || exit 1
DEVICE=cuda SMOKE="" WHEELS="" OUT=$PWD/build/gpu
while [ $# -gt 0 ]; do
  case $1 in
    --device) DEVICE=$2; shift 2 ;;
    --smoke) SMOKE=--smoke; shift ;;
    --wheels) WHEELS=$2; shift 2 ;;
    --out) OUT=$2; shift 2 ;;
    *) sed -n '2,12p' "$0"; exit 1 ;;
  esac
done
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
# A CPU that does other work besides is slow: in small, a step only has to end.
SLOWER=$([ -n "$SMOKE" ] && echo 8 || echo 1)
TOTAL_S=${TOTAL_S:-$((480 * SLOWER))} STARTED=$(date +%s) FAILED=0
rm -rf "$OUT"; mkdir -p "$OUT"; SUMMARY=$OUT/summary.txt
export DATAFLEX_TEST_DEVICE=$DEVICE PYTHONPATH="$OUT/site:$PWD:$PWD/benchmarks" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
export TOKENIZERS_PARALLELISM=false DS_SKIP_CUDA_CHECK=1
PYTEST="$PYTHON -m pytest -q -p no:cacheprovider"
[ "$DEVICE" = cuda ] && PYTEST="$PYTEST -m gpu"

left() { echo $((TOTAL_S - $(date +%s) + STARTED)); }
step() {  # name, seconds at most, lines of its output to show, command...
  local name=$1 limit=$(($2 * SLOWER)) lines=$3 began; began=$(date +%s); shift 3
  [ "$(left)" -lt 5 ] && { echo "$name: left out, no time" >> "$SUMMARY"; FAILED=$((FAILED + 1)); return; }
  [ "$limit" -gt "$(left)" ] && limit=$(left)
  timeout -k 5 "$limit" "$@" > "$OUT/.step" 2>&1; local code=$?
  [ $code -ne 0 ] && FAILED=$((FAILED + 1))
  { echo "=== $name: $*"; cat "$OUT/.step"; } >> "$OUT/log.txt"
  echo "$name: exit code $code after $(($(date +%s) - began)) of $limit s" | tee -a "$SUMMARY"
  tail -n "$lines" "$OUT/.step" | cut -c1-240 | sed 's/^/  /' >> "$SUMMARY"
  rm -f "$OUT/.step"
}
sanitize() {  # tool: the smallest rows, beside nothing that is timed
  step "$1" 60 4 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 9 \
    --target-processes all $PYTEST tests/gpu/test_rows.py -k "none or transform or label_smoothing"
}

[ -n "$WHEELS" ] && step install 60 2 "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir \
  --upgrade --target "$OUT/site" "$WHEELS"/*.whl
step facts 40 16 "$PYTHON" -m dataflex.cli env
step build 120 4 "$PYTHON" benchmarks/gpu/build.py "$DEVICE"
step rows 90 6 $PYTEST tests/gpu/test_rows.py
step shapes 60 6 $PYTEST tests/gpu/test_shapes.py
if [ "$DEVICE" = cuda ]; then
  if command -v compute-sanitizer > /dev/null; then sanitize memcheck; sanitize racecheck
  else echo "memcheck, racecheck: left out, compute-sanitizer is not there" >> "$SUMMARY"; fi
fi
step engine 120 8 $PYTEST tests/gpu/test_engine.py
ROUNDS=$([ -n "$SMOKE" ] && echo 2 || echo 7)
step loss 100 40 "$PYTHON" benchmarks/bench_ops.py --only loss --device "$DEVICE" --rounds "$ROUNDS" --csv "$OUT/ops_loss.csv" $SMOKE
step project 100 40 "$PYTHON" benchmarks/bench_ops.py --only project --device "$DEVICE" --rounds "$ROUNDS" --csv "$OUT/ops_project.csv" $SMOKE
step real_run 150 12 "$PYTHON" benchmarks/gpu/real_run.py --device "$DEVICE" --csv "$OUT/real_run.csv" $SMOKE
echo "$FAILED steps failed, $(($(date +%s) - STARTED)) s in all; $OUT" >> "$SUMMARY"
cat "$SUMMARY"
exit $FAILED
