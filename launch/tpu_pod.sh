#!/usr/bin/env bash
# Trains on a Cloud TPU pod: launch/tpu_pod.sh NAME ZONE TYPE [OPTIONS] -- FLAGS OF launch/train.py
#
#   launch/tpu_pod.sh run1 us-east5-a v5p-128 -- --config=configs/hybrid_8k.py:8b --workdir=/mnt/runs/run1 --config.data.tokenizer=/mnt/tokenizer.json
#   launch/tpu_pod.sh run1 us-east5-a v5p-128 --dry-run -- --config=configs/hybrid_8k.py:8b --workdir=/mnt/runs/run1 --config.data.tokenizer=/mnt/tokenizer.json
#   launch/tpu_pod.sh run1 us-east5-a v5p-128 --delete
#
# Requests a pod of that name unless it exists, waits for it, copies the files of this repository that git tracks (with local
# changes), installs the package with the extra tpu, starts the program on all hosts and follows the log of the first. Ctrl-C ends
# this script, not the training. The same command follows the training again; if it has ended, it is started again and resumes.
#
# --dry-run   print the commands and run none
# --spot      a cheaper pod that may be taken away at any time
# --slices=N  N slices (1)
# --delete    delete the pod: immediately if there is no --, else when the training has ended or could not be started
#
# PROJECT  of gcloud (its default)
# RUNTIME  version of the machines' software (v2-alpha-tpuv6e for v6e, v2-alpha-tpuv5-lite for v5e, v2-alpha-tpuv5 for v5p, else
#          tpu-ubuntu2204-base)
# SETUP    a command for every host before each start, which may run more than once. It usually mounts the disk of the workdir:
#          the hosts write one checkpoint together, and have no shared disk otherwise
# WAIT     seconds between two queries of the pod's state (30)
set -euo pipefail

usage() {
    sed -n '2,6p' "${BASH_SOURCE[0]}" | cut -c3- >&2
    exit 2
}

fail() { # message, exit code (1)
    echo "error: $1" >&2
    exit "${2:-1}"
}

(($# >= 3)) && [[ $1 != -* && $2 != -* && $3 != -* ]] || usage
name=$1 zone=$2 type=$3
shift 3
dry='' spot=() delete='' slices=1
while (($#)) && [[ $1 != -- ]]; do
    case $1 in
        --dry-run) dry=1 ;;
        --spot) spot=(--spot) ;;
        --delete) delete=1 ;;
        --slices=*) slices=${1#*=} ;;
        *) echo "error: $1 is no option; flags of launch/train.py come after --" >&2 && usage ;;
    esac
    shift
done
train=${1-} # the -- before the flags of the program, if there is one
shift $(($# > 0))
[[ $train || $delete ]] || usage
[[ $slices =~ ^[1-9][0-9]*$ ]] || fail "--slices=$slices is not a number of slices" 2

case $type in
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    *) runtime=tpu-ubuntu2204-base ;;
esac
runtime=${RUNTIME:-$runtime}
where=(--zone="$zone")
[[ -z ${PROJECT-} ]] || where+=(--project="$PROJECT")
nodes=("$name")
((slices == 1)) || mapfile -t nodes < <(for ((i = 0; i < slices; i++)); do echo "$name-$i"; done)

run() {
    if [[ $dry ]]; then
        printf '%s\n' "$(printf '%q ' "$@")" # in one write: the commands of several slices run at the same time
    else
        "$@"
    fi
}

state() {
    gcloud compute tpus queued-resources describe "$name" "${where[@]}" --format='value(state.state)' 2>"$scratch/why" || true
}

create() {
    local kind=(--node-id="$name")
    ((slices == 1)) || kind=(--node-count="$slices" --node-prefix="$name")
    run gcloud compute tpus queued-resources create "$name" "${where[@]}" "${kind[@]}" --accelerator-type="$type" \
        --runtime-version="$runtime" "${spot[@]}"
}

wait_until_active() {
    local now before='' unanswered=0
    while now=$(state) && [[ $now != ACTIVE ]]; do
        [[ $now == "$before" ]] || echo "$name is ${now:-not there yet}" >&2
        before=$now
        case $now in
            '') ((++unanswered < 10)) || fail "gcloud did not report the state of $name ten times: $(tail -n 1 "$scratch/why")" ;;
            FAILED | SUSPENDED | SUSPENDING | DELETING)
                useless=1
                fail "$name is $now and will not start; delete it and begin again: $0 $name $zone $type --delete"
                ;;
        esac
        sleep "${WAIT:-30}"
    done
}

# A command on every host of every slice at the same time.
on_all() {
    local node job jobs=() code=0
    for node in "${nodes[@]}"; do
        run gcloud compute tpus tpu-vm ssh "$node" "${where[@]}" --worker=all --command="$1" </dev/null &
        jobs+=($!)
    done
    for job in "${jobs[@]}"; do wait "$job" || code=$?; done
    return "$code"
}

# The files that git tracks, in an archive. This comes before the request, so that an error costs nothing.
pack() {
    local command="git ls-files -z --cached --deduplicate | tar --null -T - -czf $archive" missing untracked config
    if [[ $dry ]]; then
        echo "$command"
        return
    fi
    cd "$root"
    missing=$(git ls-files --deleted) || fail "git does not know the files of $root, which are to be copied" 2
    [[ -z $missing ]] || fail "git tracks files that are not there: ${missing//$'\n'/, }; commit that, or bring them back" 2
    for config; do # the config file among the flags
        [[ $config == --config=* ]] || continue
        config=${config#--config=} config=${config%%:*}
        [[ $config == /* || ! -e $config ]] || git ls-files --error-unmatch -- "$config" >/dev/null 2>&1 ||
            fail "git does not track $config, and what it does not track is not copied: git add it" 2
    done
    untracked=$(git ls-files --others --exclude-standard)
    [[ -z $untracked ]] || echo "not copied, for git does not track it: ${untracked//$'\n'/, }" >&2
    eval "$command"
    cd "$OLDPWD"
}

copy() {
    local node
    for node in "${nodes[@]}"; do
        run gcloud compute tpus tpu-vm scp "$archive" "$node:hybrid_attn.tgz" "${where[@]}" --worker=all
    done
}

remove() {
    run gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
}

# With --delete, deletes a pod on which no training could be started.
finish() {
    local code=$?
    rm -rf "$scratch"
    if [[ $useless && $delete ]]; then
        echo "deleting $name, on which no training was started" >&2
        remove || echo "error: $name could not be deleted and costs money: $0 $name $zone $type --delete" >&2
    fi
    exit "$code"
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
useless=''
if [[ $dry ]]; then
    scratch=/tmp
else
    scratch=$(mktemp -d /tmp/hybrid_attn.XXXXXX)
    trap finish EXIT
    trap 'useless=; exit 130' INT # gcloud may answer Ctrl-C with a status of its own
    trap 'useless=; exit 143' TERM HUP
fi
archive=$scratch/hybrid_attn.tgz
token=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n') # only processes with this token can join
install='set -e; mkdir -p hybrid_attn; tar -xzf hybrid_attn.tgz -C hybrid_attn; cd hybrid_attn
command -v python3.11 >/dev/null || { sudo apt-get update -qq; sudo apt-get install -qq -y python3.11 python3.11-venv; }
[ -x .venv/bin/python ] || python3.11 -m venv .venv
.venv/bin/python -m pip install --quiet --constraint constraints/py311.txt --editable ".[tpu]"'
# A detached process, so that a lost connection does not end it; its exit status goes to train.status.
running='[ -e train.pid ] && kill -0 "$(cat train.pid)" 2>/dev/null && [ ! -e train.status ]'
start="cd hybrid_attn; if $running; then exit 0; fi; rm -f train.status; export HYBRID_RUN_TOKEN=$token
printf -v command '%q ' .venv/bin/python launch/train.py$( (($#)) && printf ' %q' "$@" || true)
setsid nohup bash -c \"\$command > train.log 2>&1; echo \\\$? > train.status\" </dev/null >/dev/null 2>&1 &
echo \$! > train.pid"
ended='[ -e hybrid_attn/train.status ]'
follow='cd hybrid_attn; tail --pid="$(cat train.pid)" -n +1 -F train.log; exit "$(cat train.status 2>/dev/null || echo 1)"'

if [[ ! $train ]]; then
    remove
    exit
elif [[ $dry ]]; then
    create
elif [[ -z $(state) ]]; then
    pack "$@"
    create
    useless=1
fi
hosts=not-training
if [[ ! $dry ]]; then
    wait_until_active
    look="if cd hybrid_attn 2>/dev/null && $running; then echo is-training; else echo not-training; fi"
    hosts=$(on_all "$look") && [[ $hosts == *-training* ]] || fail "$name does not answer by ssh"
fi
if [[ $hosts == *not-training* ]]; then
    [[ -e $archive && ! $dry ]] || pack "$@"
    useless=1
    copy || fail "this repository could not be copied to $name"
    on_all "$install" || fail "the installation has failed on $name"
    [[ -z ${SETUP-} ]] || on_all "$SETUP" || fail "SETUP has failed on $name"
    on_all "$start" || fail "the program could not be started on $name"
fi
useless=''
code=0
run gcloud compute tpus tpu-vm ssh "${nodes[0]}" "${where[@]}" --worker=0 --command="$follow" || code=$?
if [[ $delete ]]; then
    # Not after a lost connection: the training may still be running.
    if ((code)) && ! run gcloud compute tpus tpu-vm ssh "${nodes[0]}" "${where[@]}" --worker=0 --command="$ended"; then
        echo "error: lost $name, where the training may go on; it is not deleted" >&2
    else
        remove || fail "$name could not be deleted and costs money: $0 $name $zone $type --delete"
    fi
fi
exit "$code"
