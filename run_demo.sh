#!/usr/bin/env bash
# Fine-tune OPT. Installs what it needs, picks model, data, plugin and processes by what is there, and says why.
#
#   bash run_demo.sh                                     whatever fits this machine
#   MODEL=facebook/opt-1.3b PLUGIN=gemini bash run_demo.sh
#   DATASET=my.csv bash run_demo.sh --text_column plot --max_length 256
#
# Environment variables that override a choice: MODEL DATASET PLUGIN GPUNUM (processes a node) TP PP BS (rows per
# data-parallel rank) LR EPOCH OUTPUT HOSTFILE (several nodes) PYTHON INSTALL (0: no pip install).
# Arguments go to opt_train_demo.py as they are, and come before what is chosen here. Paths are from this folder on.
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")"
python=${PYTHON:-python3}

# [F4] Not where all is there already: pip would take a newer torch away, which ColossalAI's own pins do not allow.
if [ "${INSTALL:-1}" != 0 ] && ! "$python" -c "import opt.installed; exit(bool(opt.installed.out_of_bounds()))"; then
  "$python" -m pip install --quiet --disable-pip-version-check -r requirements.txt
fi
"$python" -m opt.installed run_demo.sh
say() { echo "run_demo: $*"; }
refuse() { echo "run_demo.sh: error: $*" >&2; exit 2; }
argument() { # NAME: what the arguments say of it, as "NAME VALUE" or "NAME=VALUE"
  local name=$1 value="" before="" word
  for word in "${arguments[@]}"; do
    case $word in "$name="*) value=${word#*=} ;; *) [ "$before" != "$name" ] || value=$word ;; esac
    before=$word
  done
  echo "$value"
}
arguments=("" "$@")

# ---- what is there
hub=${HF_ENDPOINT:-https://huggingface.co}
if timeout 5 "$python" - "$hub" 2>/dev/null <<'PY'
import sys, urllib.request
urllib.request.urlopen(sys.argv[1] + "/api/models/facebook/opt-350m", timeout=5)
PY
then reach="the Hub answers"; online=1; else reach="no answer from $hub within 5 s"; online=0; fi
nodes=1
if [ -n "${HOSTFILE:-}" ]; then
  [ -r "$HOSTFILE" ] || refuse "HOSTFILE=$HOSTFILE cannot be read"
  nodes=$(grep -cvE '^[[:space:]]*(#|$)' "$HOSTFILE") || refuse "HOSTFILE=$HOSTFILE names no host"
fi
found=$("$python" -m opt.limits)
read -r gpus unused <<<"$found"

# ---- model and data: what the user names is taken as it is, never replaced
if [ "$gpus" -gt 0 ] && [ "$online" = 1 ]; then
  default_model=facebook/opt-350m default_dataset=hugginglearners/netflix-shows
  why="$gpus GPU(s), and $reach"
else
  default_model=sample/opt-tiny default_dataset=sample/netflix_sample.csv
  why=$([ "$gpus" -gt 0 ] && echo "$reach" || echo "no GPU${unused:+ for PyTorch: $unused}")
fi
MODEL=${MODEL:-$(argument --model_name_or_path)} PLUGIN=${PLUGIN:-$(argument --plugin)}
TP=${TP:-$(argument --tp_size)} PP=${PP:-$(argument --pp_size)}
for name in GPUNUM TP PP; do
  case ${!name:-1} in 0* | *[!0-9]*) refuse "$name=${!name} is no number of at least 1" ;; esac
done
data=(--dataset "${DATASET:-$default_dataset}") # one of the arguments' would be beside it
[ -n "${DATASET:-}" ] || [ -z "$(argument --dataset)" ] || data=() DATASET=$(argument --dataset)
model=${MODEL:-$default_model}
dataset=${DATASET:-$default_dataset}
[ "$online$gpus${MODEL:-}" = 10 ] && say "a larger model: MODEL=facebook/opt-125m bash run_demo.sh"
say "model $model ($([ -n "${MODEL:-}" ] && echo "you chose it" || echo "$why"))"
say "data $dataset ($([ -n "${DATASET:-}" ] && echo "you chose it" || echo "$why"))"

# ---- processes and plugin
processes=${GPUNUM:-$((gpus > 0 ? gpus : 1))}
plugin=${PLUGIN:-} more="" why="you chose it"
[ -z "$plugin" ] && [ -n "${TP:-}${PP:-}" ] && plugin=hybrid_parallel why="you chose TP or PP"
tp=1 pp=1
if [ "$plugin" = hybrid_parallel ]; then
  if [ -n "${TP:-}${PP:-}" ]; then tp=${TP:-1} pp=${PP:-1}
  elif [ $((processes % 4)) = 0 ]; then tp=2 pp=2
  elif [ $((processes % 2)) = 0 ]; then tp=2; fi
  more="--tp_size $tp --pp_size $pp"
else # for the script to refuse, beside a plugin that has no such thing
  [ "${TP:-1}" = 1 ] || more="--tp_size $TP"
  [ "${PP:-1}" = 1 ] || more+=" --pp_size $PP"
fi
if [ -n "$plugin" ]; then say "plugin $plugin${more:+ $more} on $processes process(es) a node ($why)"
else say "$processes process(es) a node; --auto chooses the rest by what fits, and says why"; fi

# A step has the same rows however many processes share them: more of them give the same model, sooner.
dp=$((processes * nodes / (tp * pp)))
rows=32 lr=5e-5 epochs=10
[ "$model" = sample/opt-tiny ] && rows=16 lr=1e-3 epochs=4 # a tiny model wants larger steps
case $(argument --lora_r)$(argument --lora_adapter) in "" | 0) ;; *) lr=2e-4 ;; esac # adapters take larger steps
flags=(--model_name_or_path "$model" "${data[@]}" --output_path "${OUTPUT:-./output_model}" --auto)
flags+=(${plugin:+--plugin "$plugin"} $more --batch_size "${BS:-$((dp > 0 ? (rows + dp - 1) / dp : rows))}" --learning_rate "${LR:-$lr}" --num_epoch "${EPOCH:-$epochs}")
flags+=("$@")

# ---- run
if [ -n "${HOSTFILE:-}" ]; then
  # Mistakes first: here they are said once.
  WORLD_SIZE=$((processes * nodes)) LOCAL_WORLD_SIZE=$processes "$python" opt_train_demo.py "${flags[@]}" --dry_run >/dev/null
  launch=("$python" -m opt.hosts run_demo.sh "$HOSTFILE" "$processes")
elif [ "$processes" -gt 1 ]; then
  launch=("$python" -m opt.torchrun --standalone --nproc_per_node "$processes")
else
  launch=("$python") # a launcher would only make it wait
fi
# In the background, in a process group of its own: so a signal to this script alone reaches it too.
set -m
"${launch[@]}" opt_train_demo.py "${flags[@]}" &
child=$!
for signal in INT TERM USR1; do trap "kill -$signal -- -$child" $signal; done
while true; do # a signal ends wait, but not what was waited for
  wait $child && status=0 || status=$?
  kill -0 $child 2>/dev/null || break
done
wait $child && status=0 || status=$?
[ $status != 137 ] || say "killed, most likely for host memory (exit code 137)" >&2
exit $status
