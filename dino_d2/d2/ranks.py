"""The processes of a job: how they start, and what happens when one of them dies or hangs."""

import argparse
import faulthandler
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import distributed, multiprocessing
from torch.multiprocessing import ProcessExitedException

logger = logging.getLogger("detectron2.dino_d2")

# While one process evaluates, the others wait for it. In training, `HangHook` waits less.
TIMEOUT = timedelta(hours=1)
GRACE = 3.0  # seconds in which a process may end by itself after another has died, then by SIGTERM
PHASES = ("", "loading data", "forward pass", "backward pass", "sharing metrics", "after the step")


def launch(main: Callable, arguments: argparse.Namespace) -> None:
    """Run main(arguments) in every process of the job.

    Under `torchrun`, or `srun` with several tasks, this is one of the processes; else it starts
    `num_gpus` processes here, with the options of Detectron2's `default_argument_parser`. SIGTERM
    and SIGINT are passed on to them. When one dies the others end within seconds.
    """
    environment = joined_job(os.environ)
    if environment:
        _run(environment, main, arguments)
    elif arguments.num_gpus * arguments.num_machines == 1:
        main(arguments)
    else:
        _spawn(main, arguments)


def joined_job(environ: Mapping[str, str]) -> dict[str, str]:
    """What `init_process_group` needs to know in a job of torchrun or SLURM; {} outside of one."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if all(name in environ for name in names):
        return {name: environ[name] for name in names}
    if int(environ.get("SLURM_STEP_NUM_TASKS", 1)) == 1:
        return {}
    tasks, nodes = int(environ["SLURM_STEP_NUM_TASKS"]), int(environ["SLURM_STEP_NUM_NODES"])
    first = re.sub(r"\[(\d+).*", r"\1", environ["SLURM_STEP_NODELIST"].split(",")[0])
    port = 15000 + (int(environ["SLURM_JOB_ID"]) * 16 + int(environ["SLURM_STEP_ID"])) % 15000
    return {
        "RANK": environ["SLURM_PROCID"],
        "LOCAL_RANK": environ["SLURM_LOCALID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_WORLD_SIZE": str(tasks // nodes),
        "MASTER_ADDR": environ.get("MASTER_ADDR", first),
        "MASTER_PORT": environ.get("MASTER_PORT", str(port)),
    }


def _run(environment: Mapping[str, str], main: Callable, arguments: argparse.Namespace) -> None:
    """One process, from joining the others on."""
    os.environ.update(environment)
    local = int(environment["LOCAL_RANK"])
    gpu = torch.cuda.is_available()
    if gpu:
        if local >= torch.cuda.device_count():
            raise RuntimeError(f"process {local} of this machine has no GPU of its own")
        torch.cuda.set_device(local)
    distributed.init_process_group("nccl" if gpu else "gloo", timeout=TIMEOUT)
    comm.create_local_process_group(int(environment["LOCAL_WORLD_SIZE"]))
    comm.synchronize()
    main(arguments)


def _spawn(main: Callable, arguments: argparse.Namespace) -> None:
    context = multiprocessing.start_processes(
        _run_spawned,
        (_meeting_point(arguments), main, arguments),
        arguments.num_gpus,
        join=False,
        start_method="spawn",
    )
    told = []

    def pass_on(number: int, _frame) -> None:
        told.append(number)
        for process in context.processes:
            if process.is_alive():
                os.kill(process.pid, signal.SIGTERM)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    try:
        while not context.join(grace_period=GRACE):
            pass
    except ProcessExitedException as error:
        if told:
            sys.exit(128 + told[0])
        if error.exit_code > 128:  # a process was told to stop, and told the others
            sys.exit(error.exit_code)
        raise


def _run_spawned(local: int, meeting: tuple[str, str], main: Callable, arguments) -> None:
    environment = {
        "RANK": str(arguments.machine_rank * arguments.num_gpus + local),
        "LOCAL_RANK": str(local),
        "WORLD_SIZE": str(arguments.num_machines * arguments.num_gpus),
        "LOCAL_WORLD_SIZE": str(arguments.num_gpus),
        "MASTER_ADDR": meeting[0],
        "MASTER_PORT": meeting[1],
    }
    _run(environment, main, arguments)


def _meeting_point(arguments: argparse.Namespace) -> tuple[str, str]:
    """Address and port. On one machine any free port will do."""
    if arguments.num_machines == 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return "127.0.0.1", str(probe.getsockname()[1])
    match = re.fullmatch(r"tcp://(.+):(\d+)", arguments.dist_url)
    if not match:
        raise ValueError(f"--dist-url must be tcp://host:port, not {arguments.dist_url!r}")
    return match[1], match[2]


class HangHook(HookBase):
    """Ends a process that has waited too long for another one, and says for which.

    Every process tells the others, through the store that they met at, what it is doing. Those
    that are behind are those that the others wait for.

    Args:
        timeout: seconds. It does not count while all do the same in the first step, which may
            compile, or after a step, where all wait for an evaluation.
    """

    def __init__(self, timeout: float):
        self.timeout, self._ended = timeout, threading.Event()

    def before_train(self) -> None:
        """Start to watch."""
        store = distributed.distributed_c10d._get_default_store()
        self._store = distributed.PrefixStore("progress", store)
        threading.Thread(target=self._watch, daemon=True).start()

    def after_train(self) -> None:
        """End it."""
        self._ended.set()

    def _watch(self) -> None:
        seen, since = None, 0.0
        while not self._ended.wait(min(1, self.timeout / 10)):
            now = (self.trainer.iter, self.trainer.phase)
            if now != seen:
                seen, since = now, time.monotonic()
                self._store.set(str(comm.get_rank()), f"{now[0]} {PHASES.index(now[1])}")
            elif time.monotonic() - since > self.timeout:
                self._judge()

    def _judge(self) -> None:
        """End this process if others are ahead or behind, or nothing excuses the delay."""
        try:
            stages = [self._stage(rank) for rank in range(comm.get_world_size())]
        except distributed.DistError as error:
            _end(f"process 0 does not answer ({error})")
        behind = min(stages)
        iteration, phase = behind
        excused = iteration == self.trainer.start_iter or PHASES[phase] == PHASES[-1]
        if max(stages) == behind and excused:
            return
        ranks = [rank for rank, stage in enumerate(stages) if stage == behind]
        _end(
            f"processes {ranks} hang: for {self.timeout} seconds the job has waited for them in "
            f"iteration {iteration}, {PHASES[phase] or 'before the first step'}"
        )

    def _stage(self, rank: int) -> tuple[int, int]:
        self._store.set_timeout(timedelta(seconds=10))
        if not self._store.check([str(rank)]):
            return (-1, 0)
        iteration, phase = self._store.get(str(rank)).split()
        return int(iteration), int(phase)


def _end(reason: str) -> None:
    """End this process at once, whatever it waits for, with the stacks of its threads."""
    logger.error(reason)
    print(f"Process {comm.get_rank()} ends: {reason}", file=sys.stderr, flush=True)
    faulthandler.dump_traceback()
    os._exit(1)
