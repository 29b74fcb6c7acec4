"""What becomes of a run when processes, disks and numbers fail.

`make test-faults` runs every drill as often as its figure wants, and prints the figures.
"""

import os
import random
import re
import resource
import shutil
import signal
import time

import pytest
import torch
from figures import FULL, only_full, report
from jobs import Job
from shapes_run import make_data
from torch import nn

pytestmark = [  # a forked process must not wait for threads that it has not
    pytest.mark.detectron2,
    pytest.mark.faults,
    pytest.mark.usefixtures("one_thread"),
]

MODES = ("periodic", "periodic and best", "best alone")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"), num_images=5)


class Steps:
    """A trainer as far as checkpoints know it."""

    iteration = 0

    def state_dict(self):
        return {"iteration": self.iteration}

    def load_state_dict(self, state):
        self.iteration = state["iteration"]


def checkpointer(folder, size=1, **settings):
    from dino_d2.d2 import Checkpointer

    return Checkpointer(nn.Linear(size, 1000), str(folder), **settings)


def save_without_end(folder, mode, pipe):
    """Tell through the pipe what has been saved."""
    last = checkpointer(folder, 1000, trainer=Steps())
    best = checkpointer(folder, 1000, tag=False)
    for iteration in range(10**6):
        if "periodic" in mode:
            last.save(f"model_{iteration:07d}", iteration=iteration)
            old = f"{folder}/model_{iteration - 2:07d}.pth"
            os.path.exists(old) and os.unlink(old)
        if "best" in mode:
            best.save("model_best", iteration=iteration)
        os.write(pipe, b".")


def killed_saver(folder, mode, seconds):
    """How many periods a process had saved when it was killed."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            save_without_end(folder, mode, writing)
        finally:
            os._exit(1)
    os.close(writing)
    os.read(reading, 1)  # the first is there
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with os.fdopen(reading, "rb") as pipe:
        return 1 + len(pipe.read())


@pytest.mark.parametrize("mode", MODES)
def test_a_kill_loses_nothing_that_was_saved(tmp_path, mode):
    from dino_d2.checkpoint.io import peek, verify

    kills, generator, lost, torn = 200 if FULL else 8, random.Random(0), 0, 0
    for kill in range(kills):
        folder = tmp_path / str(kill)
        folder.mkdir()
        saved = killed_saver(folder, mode, generator.uniform(0, 0.1))
        newest = checkpointer(folder, 1000, trainer=Steps()).newest()
        if mode == "best alone":
            assert newest == ""
            newest = folder / "model_best.pth"
        lost += peek(newest)["iteration"] < saved - 1
        for file in folder.glob("*.pth"):
            try:
                verify(file)
            except RuntimeError:
                torn += 1
        shutil.rmtree(folder)
    report(
        f"SIGKILL, {mode}: points that lose a period / torn files, of {kills}", f"{lost} / {torn}"
    )
    assert (lost, torn) == (0, 0)


@only_full
def test_signals_end_a_run_with_a_checkpoint_that_resumes_exactly(data, tmp_path):
    """Also in a save, in an evaluation and in a wait for data, as it comes."""
    rounds, generator, slowest = 20, random.Random(0), 0
    steps = 12
    settings = [
        "train.eval_period=3",
        "train.checkpointer.period=2",
        "dataloader.train.num_workers=1",
    ]
    with Job(tmp_path / "whole", data, *settings, steps=steps) as whole:
        assert whole.end()[0] == 0, whole.output()
    expected = torch.load(tmp_path / "whole" / "model_final.pth", weights_only=True)
    for i in range(rounds):
        out, number = tmp_path / str(i), (signal.SIGTERM, signal.SIGINT)[i % 2]
        with Job(out, data, *settings, steps=steps) as job:
            job.reach(generator.randrange(steps - 3))
            time.sleep(generator.uniform(0, 0.3))
            start = time.time()
            job.process.send_signal(number)
            status = job.process.wait(60)
            slowest = max(slowest, time.time() - start)
            assert status == 128 + number, job.output()
        with Job(out, data, *settings, steps=steps, resume=True) as job:
            assert job.end()[0] == 0, job.output()
            assert "Resuming from" in job.output()
        actual = torch.load(out / "model_final.pth", weights_only=True)
        for state in (actual, expected):
            state.pop("run_start", None)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
        shutil.rmtree(out)
    report(
        "SIGTERM or SIGINT to checkpoint and exit, slowest in s",
        f"{slowest:.1f}, {rounds} of {rounds}",
    )
    report("resumed run bit-equal to the uninterrupted one", f"{rounds} of {rounds}")
    assert slowest < 30


@only_full
@pytest.mark.parametrize("what", ["loss", "output", "gradient"])
def test_a_number_that_is_not_finite_in_one_process_ends_all(data, tmp_path, what):
    settings = ["train.checkpointer.period=1", "train.eval_period=0"]
    with Job(tmp_path, data, *settings, processes=2, fault=f"{what} 2 1") as job:
        status, seconds = job.end()
        output = job.output()
    assert status == 1
    assert "FloatingPointError" in output
    assert "Process 1: " in output
    assert "images/00000" in output
    assert "encoder" in output or what == "loss"
    (kept,) = tmp_path.glob("non_finite_0000002_process1.pt")
    assert torch.load(kept, weights_only=True)[0]["image"].ndim == 3
    files = {
        file.name: torch.load(file, weights_only=True) for file in tmp_path.glob("model_*.pth")
    }
    assert set(files) == {"model_0000000.pth", "model_0000001.pth"}
    poisoned = [
        n for n, f in files.items() if not all(t.isfinite().all() for t in f["model"].values())
    ]
    report(
        f"not finite: {what}; iterations until all stopped / poisoned checkpoints",
        f"0 / {len(poisoned)}",
    )
    report("    seconds until all had ended", f"{seconds:.1f}")
    assert poisoned == []


@pytest.mark.parametrize(
    "what", ["kill", *(pytest.param(what, marks=only_full) for what in ("raise", "exit"))]
)
def test_a_dead_process_ends_the_job(data, tmp_path, what):
    fault = "none 0 0" if what == "kill" else f"{what} 2 1"
    with Job(tmp_path, data, processes=2, fault=fault) as job:
        if what == "kill":
            job.reach(1)
            start = time.time()
            os.kill(job.children()[-1], signal.SIGKILL)
            seconds = (job.process.wait(60), time.time() - start)[1]
        else:
            _, seconds = job.end()
        assert job.process.returncode == 1
        assert job.children() == []
    report(f"dead process ({what}): seconds until all had ended", f"{seconds:.1f}")
    assert seconds < 10


@only_full
@pytest.mark.parametrize("torchrun", [False, True])
@pytest.mark.parametrize(("what", "rank"), [("hang", 1), ("stop", 1), ("stop", 0)])
def test_a_hung_process_is_named_and_ends_the_job(data, tmp_path, what, rank, torchrun):
    """Also a frozen one, which no SIGTERM can end; process 0 may have the store with it."""
    fault = "none 0 0" if what == "stop" else f"hang 2 {rank}"
    settings = {"processes": 2, "fault": fault, "torchrun": torchrun}
    with Job(tmp_path, data, "train.hang_timeout=5", **settings) as job:
        job.reach(1)
        start = time.time()
        if what == "stop":
            os.kill(job.children()[rank], signal.SIGSTOP)
        assert job.process.wait(60) == 1
        seconds = time.time() - start
        reason = "(nothing has moved|it does not answer, and nothing has moved) for 5 seconds"
        assert re.search(f"process {rank} hangs: {reason}", job.output())
        assert job.children() == []
    case = f"{what} {rank}, {'torchrun' if torchrun else 'train_net.py'}"
    report(
        f"hung process ({case}), timeout 5 s: named; seconds until all had ended", f"{seconds:.1f}"
    )
    assert seconds < 5 + 35


@only_full
def test_an_evaluation_may_take_longer_than_a_hung_step(data, tmp_path):
    """Though process 0 works, and the others wait for it."""
    settings = [
        "train.hang_timeout=3",
        "train.eval_period=1",
        "dataloader.evaluator._target_=faulty.SlowEvaluator",
    ]
    with Job(tmp_path, data, *settings, processes=2, steps=2) as job:
        assert job.process.wait(120) == 0, job.output()


@only_full
def test_a_signal_to_the_launcher_saves(data, tmp_path):
    with Job(tmp_path, data, processes=2) as job:
        job.reach(1)
        job.process.terminate()
        assert job.process.wait(60) == 128 + signal.SIGTERM, job.output()
        assert job.children() == []
    (saved,) = tmp_path.glob("model_*.pth")
    assert (tmp_path / "last_checkpoint").read_text() == saved.name


@only_full
def test_a_hung_worker_is_noticed(data, tmp_path):
    settings = ["dataloader.train.num_workers=1", "train.worker_timeout=5"]
    with Job(tmp_path, data, *settings) as job:
        job.reach(1)
        (worker,) = [p for p in job.children("train_net") if p != job.process.pid]
        start = time.time()
        os.kill(worker, signal.SIGSTOP)
        assert job.process.wait(60) == 1
        assert re.search("(timed out after|no data for) 5 seconds", job.output())
        assert job.children("train_net") == []
    report(
        "hung worker, timeout 5 s: seconds until the job had ended", f"{time.time() - start:.1f}"
    )


@only_full
def test_a_full_disk_loses_nothing(tmp_path):
    """At 20 levels, writing over the old file or beside it."""
    from dino_d2.checkpoint import CheckpointError

    lost, levels = 0, 20
    checkpointer(tmp_path, trainer=Steps()).save("model_0000001", iteration=1)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for level in range(levels):
        for name in ("model_0000001", "model_0000002"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (level * 20_000, limits[1]))
            try:
                with pytest.raises(CheckpointError, match="cannot be written"):
                    checkpointer(tmp_path, 100, trainer=Steps()).save(name, iteration=2)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            lost += {file.name: file.read_bytes() for file in tmp_path.iterdir()} != before
    report(f"disk-full levels that lose or leave anything, of {levels} x 2", lost)
    assert lost == 0


@only_full
@pytest.mark.parametrize("checksum", [True, False])
def test_no_damage_loads_silently(tmp_path, checksum):
    """400 bits turned over, 100 blocks of zeros; with and without the checksum beside the file."""
    from dino_d2.checkpoint import CheckpointError, read_weights, write_weights

    path, generator, silent = tmp_path / "model.pth", random.Random(0), 0
    weights = {f"layer{i}": torch.randn(42, 42) for i in range(10)}
    write_weights(weights, path)
    whole = path.read_bytes()
    checksum or (tmp_path / "model.pth.sha256").unlink()
    for block in [False] * 400 + [True] * 100:
        data, at = bytearray(whole), generator.randrange(len(whole) - 512)
        data[at : at + 512] = bytes(512) if block else data[at : at + 512]
        data[at] ^= 0 if block else 1 << generator.randrange(8)
        path.write_bytes(data)
        try:
            found = read_weights(path)
        except CheckpointError:
            continue
        same = found.keys() == weights.keys() and all(
            map(torch.equal, found.values(), weights.values())
        )
        silent += not same
    report(f"damaged files that load silently, of 500, checksum beside: {checksum}", silent)
    assert silent == 0


def test_integrity_costs_little(tmp_path):
    """Of 200 MiB on the disk, the best of some rounds: checks, checksum and tag against none."""
    from dino_d2.checkpoint.io import verify

    saver = checkpointer(tmp_path, 52_429)
    seconds = {"plain": [], "ours": [], "verification": []}

    def plain(path):
        with path.open("wb") as file:
            torch.save({"model": saver.model.state_dict()}, file)
            file.flush()
            os.fsync(file.fileno())

    for _ in range(5 if FULL else 1):
        for name, action in (
            ("plain", lambda: plain(tmp_path / "plain")),
            ("ours", lambda: saver.save("model")),
            ("verification", lambda: verify(tmp_path / "model.pth")),
        ):
            start = time.perf_counter()
            action()
            seconds[name].append(time.perf_counter() - start)
    best = {name: min(of_rounds) for name, of_rounds in seconds.items()}
    report("200 MiB on the disk, s", ", ".join(f"{k} {v:.2f}" for k, v in best.items()))
    assert not FULL or best["ours"] - best["plain"] < 0.3
