import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHON"}  # which `make PYTHON=...` exports
QUIET = ENVIRONMENT | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
LOCAL = [str(ROOT / "launch/local_processes.sh"), "2", "--", f"--config={ROOT / 'configs/hybrid_8k.py'}"]


def run_script(command, folder, **variables):
    env = QUIET | {"PYTHON": sys.executable, "PATH": f"{folder}:{os.environ['PATH']}"} | variables
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=env, cwd=folder)


def fake(folder, name, *lines):
    """A program of that name that notes in `folder`/calls what it is called with, a line each, and does `lines`."""
    note = f"printf '%q ' {name} \"$@\" >>'{folder}/calls'; echo >>'{folder}/calls'"
    (folder / name).write_text("\n".join(["#!/usr/bin/env bash", note, *lines, ""]))
    (folder / name).chmod(0o755)


def calls(folder):
    return (folder / "calls").read_text().splitlines()


def test_local_processes_end_with_the_status_and_the_message_of_the_one_that_failed(tmp_path):
    flags = ["--config.stages[0].batch=2", "--config.data.sources.text.paths=('/nowhere/*',)"]
    done = run_script([*LOCAL, f"--workdir={tmp_path}/run", *flags], tmp_path)
    assert done.returncode == 2
    said = set(done.stderr.splitlines())
    assert len(said) == 1 and "matches no file" in said.pop()
    assert done.stdout == ""
    usage = run_script([*LOCAL[:2], *LOCAL[3:]], tmp_path)
    assert usage.returncode == 2 and "usage: " in usage.stderr


# Undoes what nohup and shells in the background do to a child: a shell cannot trap what it was born to ignore.
HEEDING = ["env", "--default-signal=INT,TERM,HUP"]


@pytest.mark.parametrize("came, passed_on", [("INT", "INT"), ("TERM", "TERM"), ("HUP", "TERM")])
def test_local_processes_pass_a_signal_on_and_end_with_what_they_started(tmp_path, came, passed_on):
    fake(
        tmp_path, "python",
        f'if [ "$1" = - ]; then exec {sys.executable} -; fi',
        "trap 'echo INT >>got; exit 7' INT",
        "trap 'echo TERM >>got; exit 7' TERM",
        "echo $$ >>started",
        "echo $HYBRID_RUN_TOKEN >>tokens",
        "for i in {1..300}; do sleep 0.1; done",
    )  # fmt: skip
    env = QUIET | {"PYTHON": f"{tmp_path}/python"}
    started, got = tmp_path / "started", tmp_path / "got"
    pipe = {"stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*HEEDING, *LOCAL], env=env, cwd=tmp_path, **pipe) as job:
        until = time.monotonic() + 20
        while not (started.exists() and started.read_text().count("\n") == 2) and time.monotonic() < until:
            time.sleep(0.05)
        job.send_signal(getattr(signal, f"SIG{came}"))
        assert job.wait(20) == 7
        assert job.stderr.read() == ""
    assert got.read_text().split() == [passed_on] * 2
    token, same = (tmp_path / "tokens").read_text().split()
    assert token == same and len(token) == 32
    assert not any(psutil.pid_exists(int(pid)) for pid in started.read_text().split())


def test_slurm_starts_the_program_and_queues_a_job_that_ran_out_of_time_again(tmp_path):
    fake(tmp_path, "scancel", "kill -TERM $(cat started)")
    fake(tmp_path, "scontrol")
    fake(tmp_path, "srun", "trap 'exit 0' TERM", "echo $$ >started", "while :; do sleep 0.1; done")
    env = QUIET | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "7"}
    with subprocess.Popen(["bash", str(ROOT / "launch/slurm.sbatch"), "--config=a b.py"], env=env, cwd=tmp_path) as job:
        until = time.monotonic() + 20
        while not (tmp_path / "started").exists() and time.monotonic() < until:
            time.sleep(0.05)
        job.send_signal(signal.SIGUSR1)
        assert job.wait(20) == 0
    assert calls(tmp_path) == [
        r"srun --kill-on-bad-exit=1 --cpu-bind=none .venv/bin/python launch/train.py --config=a\ b.py ",
        "scancel --signal=TERM 7 ",
        "scontrol requeue 7 ",
    ]


def test_a_slurm_job_that_cannot_be_queued_again_fails(tmp_path):
    for name in ("scancel", "sleep"):
        fake(tmp_path, name)
    fake(tmp_path, "scontrol", "exit 1")
    fake(tmp_path, "srun", 'kill -USR1 $(ps -o ppid= "$PPID"); [ ${#HYBRID_RUN_TOKEN} = 32 ]')  # it ends with the signal
    done = run_script(["bash", str(ROOT / "launch/slurm.sbatch")], tmp_path, SLURM_SUBMIT_DIR=str(tmp_path), SLURM_JOB_ID="7")
    assert done.returncode == 1 and "everything is saved, and the job could not be queued again" in done.stderr
    assert calls(tmp_path).count("scontrol requeue 7 ") == 4


def test_slurm_hands_on_the_status_of_a_failure_and_queues_nothing(tmp_path):
    fake(tmp_path, "srun", "exit 3")
    fake(tmp_path, "scontrol")
    done = run_script(["bash", str(ROOT / "launch/slurm.sbatch")], tmp_path, SLURM_SUBMIT_DIR=str(tmp_path), SLURM_JOB_ID="7")
    assert done.returncode == 3 and len(calls(tmp_path)) == 1


POD = ["repo/launch/tpu_pod.sh", "run1", "us-east5-a", "v5p-128"]


def fake_gcloud(folder, *states):
    """A gcloud whose queued resource is in `states` one after the other, and whose host is the folder `host`.

    What would be installed there is a python that notes its arguments, says a line and fails with status 3. The repository is
    the folder `repo`, which has only the script.
    """
    (folder / "repo/launch").mkdir(parents=True)
    shutil.copy(ROOT / "launch/tpu_pod.sh", folder / "repo/launch")
    for command in ("init", "add"):
        subprocess.run(["git", command, "."], cwd=folder / "repo", check=True, capture_output=True)
    (folder / "states").write_text("\n".join([*states, ""]))
    (folder / "host").mkdir()
    says = r'printf "#!/bin/sh\necho training \$#: \"\$@\"; exit 3\n"'
    python = f"mkdir -p hybrid_attn/.venv/bin; {says} >hybrid_attn/.venv/bin/python"
    fake(
        folder, "gcloud",
        f"cd '{folder}/host'",
        'for last; do :; done',
        'case "$*" in',
        "*describe*) head -n 1 ../states; [ $(wc -l <../states) = 1 ] || sed -i 1d ../states ;;",
        "*'tpu-vm scp'*) cp \"$5\" . ;;",
        f"*'pip install'*) {python}; chmod +x hybrid_attn/.venv/bin/python ;;",
        '*ssh*) bash -c "${last#--command=}" ;;',
        "esac",
    )  # fmt: skip


def test_a_tpu_pod_is_queued_for_filled_started_and_followed_to_its_end(tmp_path):
    fake_gcloud(tmp_path, "", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
    flags = ["--spot", "--delete", "--", "--config=configs/a b.py:1b", "--config.optim.lr=1e-3"]
    done = run_script([*POD, *flags], tmp_path, WAIT="0", SETUP="echo mounted >disk")
    assert done.returncode == 3, done.stderr
    assert done.stdout.splitlines()[-1] == "training 3: launch/train.py --config=configs/a b.py:1b --config.optim.lr=1e-3"
    verbs = [line.split(" --")[0].split()[4:6] for line in calls(tmp_path)]
    expected = ["describe", "create", "describe", "describe", "describe", "ssh", "scp", *["ssh"] * 5, "delete"]
    assert [verb[0] for verb in verbs] == expected
    assert "WAITING_FOR_RESOURCES" in done.stderr and (tmp_path / "host/disk").exists()
    (create,) = [line for line in calls(tmp_path) if " create " in line]
    for part in (
        "--node-id=run1",
        "--zone=us-east5-a",
        "--accelerator-type=v5p-128",
        "--runtime-version=v2-alpha-tpuv5",
        "--spot",
    ):
        assert part in create.split()


def spoil(folder, pattern, *lines):
    """Has the gcloud of `folder` do `lines` instead, when what it is called with matches `pattern` of the shell."""
    program = (folder / "gcloud").read_text().replace('case "$*" in', "\n".join(['case "$*" in', f"{pattern})", *lines, ";;"]))
    (folder / "gcloud").write_text(program)


@pytest.mark.parametrize("step", ["FAILED", "is-training", "tpu-vm scp", "pip install", "mounted", "nohup"])
@pytest.mark.parametrize("delete", [True, False])
def test_a_tpu_pod_on_which_the_run_could_not_start_is_deleted_with_the_flag_delete(tmp_path, step, delete):
    fake_gcloud(tmp_path, "", "FAILED" if step == "FAILED" else "ACTIVE")
    spoil(tmp_path, f"*'{step}'*", "exit 1")
    flags = ["--delete"] if delete else []
    done = run_script([*POD, *flags, "--", "--config=x.py"], tmp_path, WAIT="0", SETUP="echo mounted >disk")
    assert done.returncode == 1 and "error: " in done.stderr
    assert (" delete " in calls(tmp_path)[-1]) == delete


def test_an_existing_tpu_pod_is_not_deleted_if_it_does_not_answer(tmp_path):
    fake_gcloud(tmp_path, "ACTIVE")
    spoil(tmp_path, "*is-training*", "exit 255")
    done = run_script([*POD, "--delete", "--", "--config=x.py"], tmp_path, WAIT="0")
    assert done.returncode == 1 and "run1 does not answer by ssh" in done.stderr
    assert not any(" delete " in line for line in calls(tmp_path))


@pytest.mark.parametrize("lost, code", [("exit 1", 1), ('kill -INT "$PPID"; exit 1', 130)], ids=["connection", "interrupt"])
def test_a_tpu_pod_whose_training_may_go_on_is_not_deleted(tmp_path, lost, code):
    fake_gcloud(tmp_path, "ACTIVE")
    spoil(tmp_path, "*tail*", "until rm hybrid_attn/train.status; do sleep 0.05; done", lost)
    done = run_script([*HEEDING, *POD, "--delete", "--", "--config=x.py"], tmp_path, WAIT="0")
    assert done.returncode == code
    assert "tail" in (tmp_path / "calls").read_text() and not any(" delete " in line for line in calls(tmp_path))


def test_only_what_git_tracks_is_sent_to_a_tpu_pod(tmp_path):
    fake_gcloud(tmp_path, "", "ACTIVE")
    (tmp_path / "repo/.env").write_text("PASSWORD=1")
    (tmp_path / "repo/a b.py").write_text("new")
    subprocess.run(["git", "add", "a b.py"], cwd=tmp_path / "repo", check=True)
    (tmp_path / "repo/a b.py").write_text("changed")
    done = run_script([*POD, "--", "--config=x.py"], tmp_path, WAIT="0")
    assert done.returncode == 3 and "not copied, for git does not track it: .env" in done.stderr
    with tarfile.open(tmp_path / "host/hybrid_attn.tgz") as archive:
        assert sorted(archive.getnames()) == ["a b.py", "launch/tpu_pod.sh"]
        assert archive.extractfile("a b.py").read() == b"changed"
    (start,) = [line for line in calls(tmp_path) if "nohup" in line]
    assert "export HYBRID_RUN_TOKEN=" in start


@pytest.mark.parametrize(
    "name, message", [("gone.py", "git tracks files that are not there: gone.py"), ("new.py", "git does not track new.py")]
)
def test_a_tree_that_cannot_be_copied_is_an_error_before_a_tpu_pod_is_requested(tmp_path, name, message):
    fake_gcloud(tmp_path, "")
    (tmp_path / "repo" / name).touch()
    if name == "gone.py":
        subprocess.run(["git", "add", name], cwd=tmp_path / "repo", check=True)
        (tmp_path / "repo" / name).unlink()
    done = run_script([*POD, "--delete", "--", f"--config={name}:1b"], tmp_path)
    assert done.returncode == 2 and message in done.stderr
    assert [line.split()[4] for line in calls(tmp_path)] == ["describe"]


def test_a_tpu_pod_that_is_training_is_only_followed(tmp_path):
    fake_gcloud(tmp_path, "ACTIVE")
    home = tmp_path / "host/hybrid_attn"
    home.mkdir()
    with subprocess.Popen(["sleep", "2"]) as training:
        (home / "train.pid").write_text(str(training.pid))
        (home / "train.log").write_text("step 7\n")
        threading.Thread(target=training.wait).start()
        done = run_script([*POD, "--", "--config=x.py"], tmp_path, WAIT="0")
    assert "step 7" in done.stdout and "training" not in done.stdout
    assert not any(verb in line for line in calls(tmp_path) for verb in (" create ", " scp ", "pip install"))


def test_a_failed_tpu_pod_is_an_error_with_the_cure(tmp_path):
    fake_gcloud(tmp_path, "FAILED")
    done = run_script([*POD, "--", "--config=x.py"], tmp_path)
    assert done.returncode == 1
    assert "run1 is FAILED and will not start; delete it" in done.stderr and "us-east5-a v5p-128 --delete" in done.stderr


def test_a_tpu_pod_whose_state_gcloud_does_not_report_is_not_awaited_for_ever(tmp_path):
    fake_gcloud(tmp_path)
    fake(tmp_path, "gcloud", "case \"$*\" in *describe*) echo 'no permission' >&2; exit 1 ;; esac")
    done = run_script([*POD, "--", "--config=x.py"], tmp_path, WAIT="0")
    assert done.returncode == 1 and done.stderr.splitlines()[-1].endswith("ten times: no permission")


def test_a_dry_run_prints_the_commands_for_every_slice_and_runs_none(tmp_path):
    fake_gcloud(tmp_path, "")
    done = run_script([*POD, "--dry-run", "--slices=2", "--", "--config=x.py"], tmp_path)
    assert done.returncode == 0 and not (tmp_path / "calls").exists()
    assert "--node-count=2 --node-prefix=run1" in done.stdout
    assert all(line.startswith(("gcloud compute tpus ", "git ls-files ")) for line in done.stdout.splitlines())
    for node in ("run1-0", "run1-1"):
        assert f"tpu-vm ssh {node} " in done.stdout and f"{node}:hybrid_attn.tgz" in done.stdout
    assert run_script([*POD], tmp_path).returncode == 2
    assert run_script([*POD, "--dri-run", "--", "--config=x.py"], tmp_path).returncode == 2
