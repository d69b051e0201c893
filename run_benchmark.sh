#!/usr/bin/env bash
# Throughput and peak memory of every combination of model, plugin, batch size and number of GPUs, each in a process of its own.
#
#   bash run_benchmark.sh                                 the default sweep
#   MODEL="350m 1.3b" BS="8 16 32" bash run_benchmark.sh
#   bash run_benchmark.sh --seq_length 2048 --grad_checkpoint
#
# Environment variables, each a list: MODEL PLUGIN BS (rows per data-parallel rank) GPUNUM (processes; more than there are
# GPUs is left out). And OUT (folder of the results), TIMEOUT (seconds a combination may take), PYTHON, INSTALL (0: no pip
# install). All other arguments go to opt_benchmark.py as they are. Killed and started again, it goes on where it stopped.
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")"
python=${PYTHON:-python3}

if [ "${INSTALL:-1}" != 0 ] && ! "$python" -c "import opt.installed; exit(bool(opt.installed.out_of_bounds()))"; then # see run_demo.sh
  "$python" -m pip install --quiet --disable-pip-version-check -r requirements.txt
fi
"$python" -m opt.installed run_benchmark.sh
refuse() { echo "run_benchmark.sh: error: $*" >&2; exit 2; }
for word in "$@"; do
  case ${word%%=*} in
    --model_name_or_path) refuse "$word: the sweep is over MODEL, a list" ;;
    --plugin) refuse "$word: the sweep is over PLUGIN, a list" ;;
    --batch_size) refuse "$word: the sweep is over BS, a list" ;;
    --json) refuse "$word: the results are in OUT" ;;
  esac
done
for n in ${GPUNUM:-1}; do case $n in 0 | *[!0-9]*) refuse "GPUNUM=$GPUNUM: $n is no number of at least 1" ;; esac; done
found=$("$python" -m opt.limits)
read -r gpus unused <<<"$found"
out=${OUT:-benchmark_results}
timeout=${TIMEOUT:-600}
if [ "$gpus" -gt 0 ]; then
  models=${MODEL:-125m 350m 1.3b} batches=${BS:-8 16 32 64} processes=${GPUNUM:-1 2 4 8}
else # a size that two cores manage in minutes
  models=${MODEL:-sample/opt-tiny} batches=${BS:-4 8} processes=${GPUNUM:-2}
  set -- --seq_length 128 --max_train_steps 5 --warmup_steps 2 "$@"
fi
plugins=${PLUGIN:-torch_ddp torch_ddp_fp16 low_level_zero gemini hybrid_parallel}
mkdir -p "$out"

combinations=()
for n in $processes; do
  [ "$gpus" -gt 0 ] && [ "$n" -gt "$gpus" ] && continue
  for model in $models; do for plugin in $plugins; do for bs in $batches; do
    combinations+=("$n $model $plugin $bs")
  done; done; done
done
# Told to stop, end the measurement under way too: it would go on by itself, beside those of the next start.
stop() {
  set +e
  for job in $(jobs -rp); do
    kill "$job" && wait "$job"
    # [F51] coreutils 9.1's timeout, told so just as it starts its command, ends without it: the rest of its process group.
    for _ in {1..50}; do kill -- "-$job" 2>/dev/null || break; sleep 0.1; done
  done
  exit 130
}
trap stop INT TERM
total=${#combinations[@]} done_before=0 failed_before=0 measured=0 begun=$SECONDS
echo "run_benchmark: $total combinations, $gpus GPU(s)${unused:+ for PyTorch ($unused)}, results in $out/"

for i in "${!combinations[@]}"; do
  read -r n model plugin bs <<<"${combinations[$i]}"
  # The name holds everything that the result depends on: other arguments are another measurement.
  name=$(printf '%s' "$model-$plugin-bs$bs-n$n${*:+-$*}" | tr -c 'A-Za-z0-9._-' '_')
  [ ${#name} -le 200 ] || name=${name:0:180}-$(printf '%s' "$name" | cksum | cut -d ' ' -f 1) # file systems have 255
  file=$out/$name.json
  if [ -s "$file" ]; then
    done_before=$((done_before + 1))
    ! grep -q '^ "status":' "$file" || failed_before=$((failed_before + 1))
    continue
  fi
  left=""
  if [ $measured -gt 0 ]; then left=", about $(((SECONDS - begun) * (total - i) / measured / 60 + 1)) min left"; fi
  echo "[$((i + 1))/$total$left] $model, $plugin, batch $bs, $n process(es)"
  flags=(--model_name_or_path "$model" --plugin "$plugin" --batch_size "$bs")
  # hybrid_parallel as the demo runs it: tensor parallel on 2 processes, and pipeline stages too on a multiple of 4.
  if [ "$plugin" = hybrid_parallel ] && [ $((n % 4)) = 0 ]; then flags+=(--tp_size 2 --pp_size 2)
  elif [ "$plugin" = hybrid_parallel ] && [ $((n % 2)) = 0 ]; then flags+=(--tp_size 2); fi
  status=0 began=$SECONDS
  timeout --kill-after=10 "$timeout" "$python" -m opt.torchrun --standalone --nproc_per_node "$n" \
    opt_benchmark.py "${flags[@]}" "$@" --json "$file.part" >"$out/$name.log" 2>&1 &
  wait $! || status=$? # bash heeds a signal in wait, not while a command runs
  [ $status = 137 ] && [ $((SECONDS - began)) -ge "$timeout" ] && status=124 # the timeout's own SIGKILL, its second try
  if [ $status = 0 ]; then
    mv "$file.part" "$file"
  else
    rm -f "$file.part"
    "$python" -m benchmarks.report failed "$file" --log "$out/$name.log" --status $status \
      --model "$model" --plugin "$plugin" --batch_size "$bs" --world_size "$n"
  fi
  tail -n +2 "$out/$name.log" | grep -E '^  (step|rate|memory|kernels)|: out of memory ' || echo "  failed$([ $status != 137 ] || echo ", killed, most likely for host memory"): $out/$name.log"
  measured=$((measured + 1))
done
[ $failed_before -eq 0 ] || failed=", $failed_before of them without a result: to try again, remove their .json from $out"
[ $done_before -eq 0 ] || echo "run_benchmark: $done_before combinations were there already${failed:-}"
"$python" -m benchmarks.report table "$out"
