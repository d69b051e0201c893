#!/usr/bin/env bash
# Fine-tune OPT. Installs what it needs, picks model, data, plugin and processes by what is there, and says why.
#
#   bash run_demo.sh                                     whatever fits this machine
#   MODEL=facebook/opt-1.3b PLUGIN=gemini bash run_demo.sh
#   DATASET=my.csv bash run_demo.sh --text_column plot --max_length 256
#
# Environment variables that override a choice: MODEL DATASET PLUGIN GPUNUM (processes a node) TP PP BS (rows per
# data-parallel rank) LR EPOCH OUTPUT HOSTFILE (several nodes) PYTHON INSTALL (0: no pip install).
# Arguments go to opt_train_demo.py as they are.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
python=${PYTHON:-python3}

# Not where all is there already: pip would take a newer torch away, which ColossalAI's own pins do not allow.
if [ "${INSTALL:-1}" != 0 ] && ! "$python" -c "import opt.installed; exit(bool(opt.installed.out_of_bounds()))"; then
  "$python" -m pip install --quiet --disable-pip-version-check -r requirements.txt
fi
"$python" -m opt.installed run_demo.sh
say() { echo "run_demo: $*"; }

# ---- what is there
read -r gpus bf16 < <("$python" - <<'PY'
import torch
from opt.launch import has_bf16
gpus = torch.cuda.device_count()
print(gpus, int(has_bf16(torch.device("cuda" if gpus else "cpu"))))
PY
)
hub=${HF_ENDPOINT:-https://huggingface.co}
if timeout 5 "$python" - "$hub" 2>/dev/null <<'PY'
import sys, urllib.request
urllib.request.urlopen(sys.argv[1] + "/api/models/facebook/opt-350m", timeout=5)
PY
then reach="the Hub answers"; online=1; else reach="no answer from $hub within 5 s"; online=0; fi

# ---- model and data: what the user names is taken as it is, never replaced
if [ "$gpus" -gt 0 ] && [ "$online" = 1 ]; then
  default_model=facebook/opt-350m default_dataset=hugginglearners/netflix-shows
  why="$gpus GPU(s), and $reach"
else
  default_model=sample/opt-tiny default_dataset=sample/netflix_sample.csv
  why=$([ "$gpus" -gt 0 ] && echo "$reach" || echo "no GPU")
fi
model=${MODEL:-$default_model}
dataset=${DATASET:-$default_dataset}
say "model $model ($([ -n "${MODEL:-}" ] && echo "you chose it" || echo "$why"))"
say "data $dataset ($([ -n "${DATASET:-}" ] && echo "you chose it" || echo "$why"))"

# ---- processes and plugin
if [ "$gpus" -gt 0 ]; then processes=${GPUNUM:-$gpus}; else processes=${GPUNUM:-2}; fi
tp=1 pp=1
if [ -n "${PLUGIN:-}" ]; then
  plugin=$PLUGIN why="you chose it"
elif [ -n "${TP:-}${PP:-}" ]; then
  plugin=hybrid_parallel why="you chose TP or PP"
elif [ $((processes % 4)) = 0 ]; then
  plugin=hybrid_parallel tp=2 pp=2 why="a multiple of 4 processes"
elif [ "$processes" = 2 ]; then
  plugin=hybrid_parallel tp=2 why="2 processes"
elif [ "$processes" = 1 ] && [ "$bf16" = 1 ]; then
  plugin=low_level_zero why="one GPU: the fastest there, see the README's table"
elif [ "$processes" = 1 ]; then
  plugin=torch_ddp why="one process"
elif [ "$bf16" = 1 ]; then
  plugin=low_level_zero why="$processes processes, not to be divided into tp 2 x pp 2: it records its steps"
else
  plugin=torch_ddp why="$processes processes: not to be divided into tp 2 x pp 2"
fi
tp=${TP:-$tp} pp=${PP:-$pp}
say "plugin $plugin$([ "$plugin" = hybrid_parallel ] && echo ", tp $tp x pp $pp" || true) on $processes process(es) a node ($why)"

flags=(--model_name_or_path "$model" --dataset "$dataset" --plugin "$plugin" --output_path "${OUTPUT:-./output_model}")
[ "$plugin" = hybrid_parallel ] && flags+=(--tp_size "$tp" --pp_size "$pp")
if [ "$model" = sample/opt-tiny ]; then # a tiny model from scratch wants many, larger steps
  flags+=(--batch_size "${BS:-16}" --learning_rate "${LR:-2e-3}" --num_epoch "${EPOCH:-8}")
else
  flags+=(--batch_size "${BS:-32}" --learning_rate "${LR:-5e-5}" --num_epoch "${EPOCH:-10}")
fi
if [ "$gpus" -gt 0 ] && { [ "$plugin" = low_level_zero ] || { [ "$processes${HOSTFILE:-}" = 1 ] && [ "$plugin" != gemini ]; }; }; then
  flags+=(--fused_loss)
  # Short rows: the GPU would wait for the host. In fp16 only torch_ddp can be recorded, and some of what a user may ask for not at all.
  if [ "$bf16" = 1 ] || [[ $plugin == torch_ddp* ]]; then
    case " $*" in *" --grad_checkpoint"* | *" --precision"* | *" --adam_kernel"*) ;; *) flags+=(--cuda_graph) ;; esac
  fi
fi
flags+=("$@")

# ---- check first: `colossalai run` would bury a mistake under its own messages
nodes=1
[ -n "${HOSTFILE:-}" ] && nodes=$(grep -cvE '^[[:space:]]*(#|$)' "$HOSTFILE")
WORLD_SIZE=$((processes * nodes)) "$python" opt_train_demo.py "${flags[@]}" --dry_run

# ---- run
if [ "$processes" = 1 ] && [ $nodes = 1 ]; then
  exec "$python" opt_train_demo.py "${flags[@]}" # a launcher would only make it wait
fi
port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
launch=("$python" -c 'from colossalai.cli import cli; cli()' run --nproc_per_node "$processes" --master_port "$port")
[ -n "${HOSTFILE:-}" ] && launch+=(--hostfile "$HOSTFILE")
"${launch[@]}" opt_train_demo.py "${flags[@]}"
