#!/usr/bin/env bash
# What a GPU is asked, in three commands of at most 4, 5 and 4 minutes (docs/gpu-checklist.md):
#   tests/on_gpu.sh first|why|ranks [FOLDER]
# A step goes on where a part fails or takes too long, keeps the output of each part in
# FOLDER/STEP-PART.log and the figures in FOLDER/STEP.json, prints a table last, and fails if a part
# did. LIMIT (seconds), PYTHON and MPIEXEC may be set. With REHEARSE=1 it runs without a GPU, over the
# stand-in for CuPy and tiny shapes; what cannot run there is left out, with the reason.
set -u -o pipefail
cd "$(dirname "$0")/.." || exit 2
step=${1:-}
case $step in
  first | ranks) seconds=240 ;;
  why) seconds=300 ;;
  *) sed -n '2,8s/^# //p' "$0" && exit 2 ;;
esac
out=${2:-gpu-results}
mkdir -p "$out"
rm -f "$out/$step".* "$out/$step"-*
slower=1 # how much longer a part may take
[[ ${REHEARSE:-} ]] && slower=3 seconds=280
: "${LIMIT:=$seconds}" "${PYTHON:=python3}" "${MPIEXEC:=mpiexec}" "${REHEARSE:=}"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0}
export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 PYTEST_PLUGINS=pytest_timeout  # no strangers' warnings
parts=$out/$step.parts

shapes=() quick=() batches=(--batches 32) all=(--batches 32) float32=(--shapes 32x256x56x56 32x1024x14x14)
six=(32x64x112x112 32x256x56x56 32x512x28x28 32x1024x14x14 32x2048x7x7 256x256x56x56)
digits=(--device cuda --epochs 1)
if [[ $REHEARSE ]]; then
  export PYTHONPATH=$PWD/tests/stand_in:$PWD/tests:$PYTHONPATH CUPYBN_TINY=1
  six=(4x8x16x16 8x16) shapes=(--shapes "${six[@]}") float32=("${shapes[@]}")
  quick=(--quick --repeat 3) batches=(--batches 1) all=(--shapes 4x8x16x16)
  digits+=(--batch 200)
fi

# part NAME SECONDS COMMAND...: within what is left of the limit. Interrupted, pytest still reports.
part() {
  local name=$1 seconds=$(($2 * slower)) left=$((LIMIT - SECONDS - 8)) rc began=$SECONDS log=$out/$step-${1// /-}.log
  shift 2
  if ((left < 5)); then
    printf 'not begun\t0\t%s\n' "$name" >>"$parts"
    return
  fi
  printf '#### %s\n' "$*" >"$log"
  timeout -s INT -k 5 $((seconds < left ? seconds : left)) env --default-signal=INT "$@" \
    </dev/null >>"$log" 2>&1
  rc=$?
  printf '\n#### %s\n%s\n' "$name" "$(tail -n "${SHOWN:-3}" "$log" | cut -c1-200)"
  printf 'exit %d\t%d\t%s\n' $rc $((SECONDS - began)) "$name" >>"$parts"
}

leave_out() { # NAME WHY
  printf 'left out\t0\t%s: %s\n' "$1" "$2" >>"$parts"
}

# gpu NAME SECONDS COMMAND...: a part that nothing takes the place of where there is no GPU.
gpu() {
  if [[ $REHEARSE ]]; then leave_out "$1" "needs a GPU"; else part "$@"; fi
}

tests() { # NAME SECONDS FILE WORDS-FOR--k
  "${RUN:-part}" "$1" "$2" "$PYTHON" -m pytest -m gpu -v --tb=short -p no:cacheprovider "$3" -k "$4"
}

bench() { # NAME SECONDS SECTIONS AND OPTIONS...: where kernels do nothing if there is no GPU
  STAND_IN_KERNELS=none SHOWN=${SHOWN:-60} part "$1" "$2" "$PYTHON" -m benchmarks "${@:3}" "${quick[@]}" \
    --json "$out/$step-${1// /-}.json"
}

first() {
  local some=""
  [[ $REHEARSE ]] && some="test_out or test_functional or two_streams"
  # At once: nothing of it is timed.
  gpu device 20 nvidia-smi &
  gpu pytorch 60 "$PYTHON" -c "import torch; print(torch.__version__, torch.version.cuda)" &
  SHOWN=25 part info 60 "$PYTHON" -m cupybn info &
  tests "kernels float16" 80 tests/test_gpu.py "small_shapes_in and float16 and not bfloat16" &
  tests "kernels float32" 80 tests/test_gpu.py "small_shapes_in and float32" &
  tests layers 80 tests/test_gpu_layers.py "$some" &
  wait
  bench overhead 30 overhead --quick
  bench "six shapes" 60 gpu --shapes "${six[@]}" --dtypes float16 --layouts rows columns --repeat 10
  bench ResNet-50 60 gpu "${batches[@]}" --dtypes float16 --layouts rows columns --repeat 7
  RUN=gpu tests "kernels float64" 60 tests/test_gpu.py "small_shapes_in and float64" &
  RUN=gpu tests "kernels bfloat16" 60 tests/test_gpu.py "small_shapes_in and bfloat16" &
  RUN=gpu tests "odd shapes float16" 60 tests/test_gpu.py "odd_split and float16 and not bfloat16" &
  tests transports 60 tests/test_gpu_transports.py "still_being_written or handed_on" &
  wait
}

why() {
  SHOWN=60 bench "resident beside streaming" 70 kernels "${all[@]}" --paths resident \
    --dtypes float16 --layouts rows columns --repeat 9
  SHOWN=40 bench "kernels float16" 130 kernels "${shapes[@]}"
  SHOWN=40 bench "kernels float32" 60 kernels "${float32[@]}" --dtypes float32 --layouts rows columns
  bench "bench float32" 60 gpu "${float32[@]}" --dtypes float32 --layouts rows columns --repeat 7
  part model 20 "$PYTHON" -m benchmarks.model --batches 32
}

sanitize() { # TOOL
  gpu "$1" 90 compute-sanitizer --tool "$1" --error-exitcode 9 --kernel-name kns=moments \
    --kernel-name kns=normalize --kernel-name kns=backward_ --kernel-name kns=local_ "$PYTHON" -m pytest -m gpu -q \
    -p no:cacheprovider --timeout=0 tests/test_gpu.py \
    -k "small_shapes_in and float16 and not bfloat16"
}

ranks() {
  local n
  for n in 2 4; do
    SHOWN=12 part "selftest $n ranks" 40 "$MPIEXEC" -n $n "$PYTHON" -m cupybn selftest \
      --device cuda --repeat 20
    STAND_IN_KERNELS=none SHOWN=6 part "messages $n ranks" 30 "$MPIEXEC" -n $n "$PYTHON" -m mpi4py -m benchmarks comm \
      --device cuda --quick --json "$out/$step-messages-$n-ranks.json"
  done
  # At once: nothing of it is timed.
  sanitize memcheck &
  sanitize racecheck &
  tests "two graphs on two streams" 60 tests/test_gpu_layers.py graphs_of_one_stream &
  SHOWN=8 part "digits 1 rank" 80 "$PYTHON" examples/train_digits.py "${digits[@]}" \
    --plot "$out/ranks-digits-1.png" &
  SHOWN=8 part "digits 2 ranks" 80 "$MPIEXEC" -n 2 "$PYTHON" -m mpi4py examples/train_digits.py \
    "${digits[@]}" --plot "$out/ranks-digits-2.png" &
  wait
  RUN=gpu tests "more than 2^31 elements" 60 tests/test_gpu.py "2_31 and (many or columns)"
}

"$step"
"$PYTHON" -m benchmarks.results collect "$out" "$step" || echo "no $step.json"
printf '\n#### %s, %d s\n' "$step" $SECONDS
awk -F '\t' '{ printf "%-10s %4d s  %s\n", $1, $2, $3 }' "$parts"
! grep -qvE '^(exit 0|left out)' "$parts"
