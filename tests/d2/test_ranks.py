"""How processes find each other, and which of them the others wait for."""

import os
import subprocess
import sys
from argparse import Namespace

import pytest
from figures import only_full
from jobs import command, environment
from shapes_run import make_data

pytestmark = pytest.mark.detectron2

SLURM = {
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[007-008]",
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
}


def joined(environ):
    from dino_d2.d2.ranks import joined_job

    return joined_job(environ)


def test_a_task_of_slurm_joins_its_step():
    job = joined(SLURM)
    assert job.pop("MASTER_PORT") == joined({**SLURM, "SLURM_PROCID": "0"})["MASTER_PORT"]
    assert job == {
        "RANK": "9",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "16",
        "LOCAL_WORLD_SIZE": "8",
        "MASTER_ADDR": "gpu007",
    }


@pytest.mark.parametrize(
    ("nodes", "first"), [("a1", "a1"), ("a1,b2", "a1"), ("n[3,5-7],m1", "n3"), ("n[01-02]", "n01")]
)
def test_the_first_node_is_where_they_meet(nodes, first):
    assert joined({**SLURM, "SLURM_STEP_NODELIST": nodes})["MASTER_ADDR"] == first


def test_a_batch_script_of_slurm_is_no_task():
    assert joined({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}) == {}


def test_steps_of_a_job_do_not_share_a_port():
    assert len({joined({**SLURM, "SLURM_STEP_ID": str(i)})["MASTER_PORT"] for i in range(4)}) == 4


@pytest.mark.parametrize(
    ("reports", "guilty"),
    [
        ([(3, 2, 9, 1), (3, 2, 9, 0)], [1]),  # one works, the other waits for it
        ([(3, 3, 9, 1), (3, 1, 9, 0)], [1]),  # one still loads data
        ([(4, 1, 9, 0), (3, 5, 9, 1)], [1]),  # a step behind
        ([(3, 2, 9, 0), (3, 2, 5, 1)], [1]),  # does not run at all
        ([(3, 2, 9, 1), (3, 2, 9, 1)], []),
        ([(3, 2, 9, 0), (3, 2, 9, 0)], []),
        ([(3, 2, 9, 1), (-1, 0, 0, 0)], [1]),  # has never reported
    ],
)
def test_who_the_others_wait_for(reports, guilty):
    """Of (iteration, phase, beats, waits); one second before, those that run had 8 beats."""
    from dino_d2.d2.ranks import Report, find_guilty

    now = [Report(*report, "") for report in reports]
    before = [r._replace(beat=8 if r.beat == 9 else r.beat) for r in now]
    assert find_guilty(before, now) == guilty


@pytest.mark.parametrize(
    ("place", "beats", "killed"),
    [
        ((3, 5), [1, 1, 9, 9], None),  # an evaluation, in which Python's lock was held for a while
        ((3, 5), [1, 1, 1, 1], [0]),
        ((3, 2), [1, 1], [0]),
        ((3, 2), [1, 2], []),
        ((0, 2), [1, 1], [0]),  # the first step, which may compile
    ],
)
def test_who_may_hold_up_the_others_and_who_is_killed(monkeypatch, place, beats, killed):
    """Process 0 works, at (iteration, phase), and the other waits for it."""
    from dino_d2.d2.ranks import HangHook, Report

    looks = [
        [Report(*place, beat, 0, ""), Report(*place, 10 + number, 1, "")]
        for number, beat in enumerate(beats)
    ]
    hook, ends = HangHook(1e-3), []
    hook.trainer = Namespace(iter=place[0], start_iter=0)
    monkeypatch.setattr(hook, "_end", lambda _reason, frozen: ends.append(frozen))
    monkeypatch.setattr(hook, "_reports", lambda: looks.pop(0))
    while looks:
        hook._judge()
    assert ends == ([] if killed is None else [killed])


def test_machines_need_a_place_to_meet():
    from dino_d2.d2.ranks import _meeting_point

    two = {"num_machines": 2}
    assert _meeting_point(Namespace(**two, dist_url="tcp://host:123")) == ("host", "123")
    with pytest.raises(ValueError, match="tcp://host:port, not 'auto'"):
        _meeting_point(Namespace(**two, dist_url="auto"))


@pytest.mark.faults
@only_full
def test_torchrun(tmp_path):
    """It starts the processes, and they are one job."""
    data = make_data(tmp_path / "data", num_images=4)
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    done = subprocess.run(
        [sys.executable, *launcher, *command(tmp_path / "out", data, 1)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "World size: 2" in done.stdout
    assert (tmp_path / "out" / "model_final.pth").exists()


def test_a_python_without_handles_of_processes_does_without(monkeypatch):
    from dino_d2.d2 import ranks

    pair = [(ranks._machine(), os.getppid())]
    assert ranks._handles(pair).keys() == {0}
    monkeypatch.delattr(os, "pidfd_open")
    assert ranks._handles(pair) == {}


def test_a_number_of_processes_is_none_below_zero():
    from dino_d2.d2.ranks import launch

    seen = []
    for number in (0, 1):
        launch(
            lambda given: seen.append(given.num_gpus), Namespace(num_gpus=number, num_machines=1)
        )
    assert seen == [1, 1]
    with pytest.raises(ValueError, match=r"--num-gpus .* not -1"):
        launch(seen.append, Namespace(num_gpus=-1, num_machines=1))
