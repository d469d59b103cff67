#!/usr/bin/env bash
# Trains with N processes on this machine, which communicate over its loopback address: launch/local_processes.sh N -- FLAGS OF launch/train.py
#
#   DEVICES=4 launch/local_processes.sh 2 -- --config=configs/hybrid_8k.py --workdir=runs/two --config.mesh.data=-1 \
#       '--config.stages[0].batch=8'
#
# DEVICES  CPU devices of each process (1)
# PYTHON   the interpreter (that of .venv, if there is one, else python3)
#
# After Ctrl-C, SIGTERM or when the terminal is closed, the processes save and stop. The exit status is that of the first process
# that fails.
set -euo pipefail
set -m # a group for each process: Ctrl-C reaches this script alone, which passes it on once

refuse() {
    echo "$1" >&2
    exit 2
}

((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 501)) || refuse "error: this script needs bash 5.1, and this is $BASH_VERSION"
[[ ${1-} =~ ^[1-9][0-9]*$ && ${2-} == -- ]] ||
    refuse "usage: [DEVICES=4] launch/local_processes.sh N -- --config=configs/hybrid_8k.py ..."
[[ ${DEVICES:-1} =~ ^[1-9][0-9]*$ ]] || refuse "error: DEVICES=$DEVICES is not a number of devices"
n=$1
shift 2
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
[[ -x $python || -n ${PYTHON-} ]] || python=python3

port=$(PYTHONPATH=$root "$python" - <<<'from hybrid_attn.parallel import launchers; print(launchers.free_port())')

# Only processes with this token can join.
HYBRID_RUN_TOKEN=${HYBRID_RUN_TOKEN:-$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')}
export HYBRID_RUN_TOKEN

pids=()
trap 'kill -INT "${pids[@]}" || true' INT
trap 'kill -TERM "${pids[@]}" || true' TERM HUP
for ((i = 0; i < n; i++)); do
    JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=${DEVICES:-1} "$python" "$root/launch/train.py" \
        --coordinator="localhost:$port" --num_processes="$n" --process_id="$i" "$@" </dev/null &
    pids+=($!)
done

exec 2>/dev/null # only of this script: bash would report each process that a signal ended
status=0 left=$n killer=
while ((left)); do
    code=0 ended=
    wait -n -p ended "${pids[@]}" || code=$?
    [[ -n ${ended-} ]] || continue # a signal woke this script, and no process has ended
    left=$((left - 1))
    for i in "${!pids[@]}"; do
        [[ ${pids[i]} != "$ended" ]] || unset "pids[i]"
    done
    if ((code && !status && left)); then
        # The others end by themselves and print the reason, unless they have not joined yet.
        { sleep 5; kill -TERM "${pids[@]}"; sleep 10; kill -KILL "${pids[@]}"; } &
        killer=$!
    fi
    ((status)) || status=$code
done
[[ -z $killer ]] || kill -- "-$killer" || true
exit "$status"
