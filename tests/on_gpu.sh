#!/usr/bin/env bash
# The steps of docs/gpu-checklist.md, each one command that ends by itself:
#   tests/on_gpu.sh correct|shapes|ranks|sanitize|bench [folder]
#   tests/on_gpu.sh profile folder DTYPE LAYOUT SHAPE...
# A step goes on where a part fails or takes too long, keeps everything in folder/STEP.log, says
# what came of each part at the end, and fails if one did. It takes at most $LIMIT seconds.
set -u -o pipefail
cd "$(dirname "$0")/.."
step=${1:-}
out=${2:-gpu-results}
mkdir -p "$out"
log=$out/$step.log
: "${LIMIT:=570}" "${PYTHON:=python3}" "${MPIEXEC:=mpiexec}"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0}
export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 PYTEST_PLUGINS=pytest_timeout  # no strangers' warnings
came=() failed=0

# part NAME SECONDS COMMAND...: within what is left of the limit. Interrupted, pytest still reports.
part() {
  local name=$1 seconds=$2 left=$((LIMIT - SECONDS)) rc began=$SECONDS
  shift 2
  if ((left < 15)); then
    came+=("not begun  $name") failed=1
    return
  fi
  printf '\n#### %s: %s\n' "$name" "$*" >>"$log"
  printf '\n#### %s\n' "$name"
  timeout -s INT -k 15 $((seconds < left - 12 ? seconds : left - 12)) "$@" </dev/null 2>&1 |
    tee -a "$log" | tail -n "${SHOWN:-12}" | cut -c1-300
  rc=$?
  ((rc)) && failed=1
  came+=("$(printf 'exit %3d, %3d s  %s' $rc $((SECONDS - began)) "$name")")
}

tests() { # NAME SECONDS FILES AND OPTIONS...
  part "$1" "$2" "$PYTHON" -m pytest -m gpu -v --tb=short -p no:cacheprovider "${@:3}"
}

only() { # the word for -k: one type's name is part of another's
  [[ $1 == float16 ]] && echo "float16 and not bfloat16" || echo "$1"
}

correct() {
  part device 30 nvidia-smi
  SHOWN=40 part cupy 60 "$PYTHON" -c "import cupy; cupy.show_config()"
  part versions 60 "$PYTHON" -m pip list
  SHOWN=25 part info 60 "$PYTHON" -m cupybn info
  SHOWN=40 tests layers 240 tests/test_gpu_layers.py
  tests transports 60 tests/test_gpu_transports.py
  part "bench, quickly" 60 "$PYTHON" -m benchmarks gpu overhead memory --quick \
    --json "$out/quick.json"
  SHOWN=40 tests kernels 300 tests/test_gpu.py --durations=15 \
    -k "not every_shape and not 2_31 and not first_step and not large_shapes and not small_shapes"
  tests "first step" 90 tests/test_gpu.py -k first_step
  tests "small shapes" 120 tests/test_gpu.py -k small_shapes
}

shapes() {
  tests "large shapes" 200 tests/test_gpu.py -k large_shapes
  tests "more than 2^31" 200 tests/test_gpu.py -k 2_31
  for dtype in float16 float32 bfloat16 float64; do
    tests "every shape, $dtype" 200 tests/test_gpu.py -k "every_shape and $(only $dtype)"
  done
}

selftests() { # NAME, OPTIONS of selftest...
  for n in 1 2 3 4; do
    part "selftest $1, $n ranks" 60 "$MPIEXEC" -n $n "$PYTHON" -m cupybn selftest "${@:2}"
  done
}

ranks() {
  SHOWN=25 part info 60 "$PYTHON" -m cupybn info
  selftests "as it is" --repeat 1000
  CUPYBN_CUDA_AWARE_MPI=0 selftests "through the host" --device cuda --repeat 1000
  for n in 2 4; do
    part "digits, $n ranks" 100 "$MPIEXEC" -n $n "$PYTHON" -m mpi4py examples/train_digits.py \
      --device cuda --epochs 2 --plot "$out/gpu-$n.png"
  done
  part "digits on the CPU" 60 "$PYTHON" examples/train_digits.py --epochs 2
  part "digits on the GPU" 60 "$PYTHON" examples/train_digits.py --device cuda --epochs 2
}

sanitize() {
  part "memcheck, layers" 100 compute-sanitizer --tool memcheck --error-exitcode 9 "$PYTHON" \
    -m pytest -m gpu -q -p no:cacheprovider --timeout=0 tests/test_gpu_layers.py \
    -k "any_allocator and none"
  for dtype in float16 float64; do
    for tool in memcheck racecheck synccheck initcheck; do
      part "$tool, $dtype" 130 compute-sanitizer --tool $tool --error-exitcode 9 "$PYTHON" \
        -m pytest -m gpu -q -p no:cacheprovider --timeout=0 tests/test_gpu.py \
        -k "small_shapes and $(only $dtype)"
    done
  done
}

bench() {
  part overhead 100 "$PYTHON" -m benchmarks overhead memory --quick --json "$out/quick.json"
  SHOWN=90 part bench 550 "$PYTHON" -m benchmarks gpu --json "$out/bench.json"
}

profile() { # DTYPE LAYOUT SHAPES...
  for shape in "${@:3}"; do
    part "profile $shape" 150 ncu --clock-control none --set full --import-source no \
      --kernel-name "regex:batch_moments|finalize_moments|normalize|backward_reduce|backward_input" \
      --launch-skip 15 --launch-count 10 --export "$out/ncu-$shape" --force-overwrite \
      "$PYTHON" -m benchmarks gpu --shapes "$shape" --dtypes "$1" --layouts "$2" \
      --paths cupybn --repeat 3
    SHOWN=200 part "report $shape" 60 ncu --import "$out/ncu-$shape.ncu-rep" --page details
  done
}

case $step in
  correct | shapes | ranks | sanitize | bench | profile) : >"$log" && "$step" "${@:3}" ;;
  *) sed -n '2,6s/^# //p' "$0" && exit 2 ;;
esac
printf '\n#### %s, %d s\n' "$step" $SECONDS | tee -a "$log"
printf '%s\n' "${came[@]}" | tee -a "$log"
exit $failed
