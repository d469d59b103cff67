#!/usr/bin/env bash
# From text to a report about four stages and a merge, on this machine: launch/end_to_end.sh SIZE FOLDER [FLAGS OF launch/train.py]
#
#   launch/end_to_end.sh tiny runs/end_to_end
#
# SIZE is one of configs/end_to_end.py. Everything is written into FOLDER. After Ctrl-C or a crash the same command goes on, in the
# middle of a stage too.
#
# PYTHON   the interpreter (that of .venv, if there is one, else python3)
set -euo pipefail

[[ ${1-} =~ ^[a-z0-9]+$ && -n ${2-} ]] || { echo "usage: launch/end_to_end.sh tiny runs/end_to_end" >&2; exit 2; }
size=$1 out=$2
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
[[ -x $python || -n ${PYTHON-} ]] || python=python3

# The training saves and ends well when it is stopped; what follows must not begin then. After `kill` of this script, unlike
# Ctrl-C, the shell waits until the training has ended by itself.
trap 'echo "stopped; the same command goes on" >&2; exit 130' INT TERM

if [[ ! -e $out/preferences.jsonl ]]; then # its second file
    "$python" "$root/tools/write_conversations.py" --out="$out"
fi
"$python" "$root/tools/prepare_data.py" --format=chat --input="$out/chats.jsonl" --out="$out/chats"
"$python" "$root/tools/prepare_data.py" --format=preference --input="$out/preferences.jsonl" --out="$out/pairs"
"$python" "$root/launch/train.py" --config="$root/configs/end_to_end.py:$size" --workdir="$out/run" \
    --config.data.sources.chats.store="$out/chats" --config.data.sources.pairs.store="$out/pairs" "${@:3}"

read -r length pretrain extend sft dpo < <(PYTHONPATH=$root "$python" - "$out/run" <<'PYTHON'
import itertools
import sys

from hybrid_attn.infer import loading

directory = loading.find(sys.argv[1])
stages = loading.saved_of(directory, loading.step_of(directory, None)).config.stages
print(stages[-1].seq_len, *itertools.accumulate(stage.steps for stage in stages))
PYTHON
)
if [[ ! -e $out/merged ]]; then # the mean of sft and dpo
    "$python" "$root/tools/merge.py" --checkpoint="$out/run" --steps="$sft,$dpo" --out="$out/merged"
fi
models=() # which the report compares with the first
for step in "$pretrain" "$extend" "$sft" "$dpo"; do
    models+=(--checkpoint="$out/run" --step="$step")
done
"$python" "$root/tools/evaluate.py" --suite=position,preferences --lengths="$length" --trust_checkpoint_data \
    --out="$out/report" "${models[@]}" --checkpoint="$out/merged" --step=0
