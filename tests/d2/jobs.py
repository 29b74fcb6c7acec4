"""Runs of `train_net.py` in which something goes wrong."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from shapes_run import overrides

from dino_d2 import model_zoo


def command(out, data, steps, *more):
    """Of `train_net.py`, without the interpreter."""
    more = ("model._target_=faulty.FaultyDINO", "train.checkpointer.max_to_keep=2", *more)
    script = [str(model_zoo.root() / "train_net.py"), "--config-file", "dino/dino_shapes"]
    return [*script, *overrides(out, data, steps, *more)]


def environment(fault="none 0 0"):
    """On the CPU, with the tests' modules."""
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    env = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "FAULT": fault}
    return {**os.environ, **env}


class Job:
    """A run on the CPU, with what it prints and how long it takes to end."""

    def __init__(
        self,
        out,
        data,
        *more,
        processes=1,
        fault="none 0 0",
        resume=False,
        steps=100_000,
        torchrun=False,
    ):
        self.out, self.torchrun = Path(out), torchrun
        self.out.mkdir(parents=True, exist_ok=True)
        script, *arguments = command(out, data, steps, *more)
        options = ["--num-gpus", str(processes), *["--resume"] * resume]
        launcher = []
        if torchrun:
            launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
            launcher, options = [*launcher, "--standalone"], options[2:]
        self.log = self.out / "output"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, *launcher, script, *options, *arguments],
                stdout=log,
                stderr=log,
                env=environment(fault),
                start_new_session=True,
            )

    def iterations(self):
        """Those that it has logged."""
        metrics = self.out / "metrics.json"
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        return [json.loads(line)["iteration"] for line in lines]

    def reach(self, iteration):
        """Wait until it has logged a step."""
        while max(self.iterations(), default=-1) < iteration:
            assert self.process.poll() is None, self.output()
            time.sleep(0.05)
        return self

    def children(self, word="spawn_main"):
        """Process ids of its training processes, in order."""
        wanted = ["-s", str(self.process.pid), word]
        if self.torchrun:  # which gives each a session
            wanted = [f"train.output_dir={self.out} "]
        found = subprocess.run(["pgrep", "-f", *wanted], capture_output=True, text=True)
        pids = [int(pid) for pid in found.stdout.split()]
        return [pid for pid in pids if not self.torchrun or pid != self.process.pid]

    def end(self, limit=120):
        """Wait for it; returns its exit status and the seconds that it took since `start`."""
        start = self.fault_time() or time.time()
        status = self.process.wait(limit)
        return status, time.time() - (self.fault_time() or start)

    def fault_time(self):
        """When the fault of `FaultyDINO` happened, or None."""
        found = re.search(r"fault: ([\d.]+)", self.output())
        return float(found[1]) if found else None

    def output(self):
        """Everything that it has printed."""
        return self.log.read_text(errors="replace")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        """Leave nothing behind, whatever happened."""
        for pid in [-self.process.pid, *self.children()]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
