"""The processes of a job: how they start, and what happens when one of them dies or hangs."""

import argparse
import contextlib
import faulthandler
import json
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import distributed, multiprocessing
from torch.multiprocessing import ProcessExitedException

logger = logging.getLogger("detectron2.dino_d2")

# While one process evaluates, the others wait for it. In training, `HangHook` waits less.
TIMEOUT = timedelta(hours=1)
GRACE = 1.5  # seconds in which a process may end by itself after another has died, then by SIGTERM
JUDGEMENT = 15  # seconds in which all reports are to be had
PHASES = ("", "loading data", "forward pass", "backward pass", "sharing metrics", "after the step")


def launch(main: Callable, arguments: argparse.Namespace) -> None:
    """Run main(arguments) in every process of the job.

    Under `torchrun`, or `srun` with several tasks, this is one of the processes; else it starts
    `num_gpus` processes here (0 as 1), with the options of Detectron2's `default_argument_parser`.
    SIGTERM and SIGINT are passed on to them. When one dies the others end within seconds.

    Raises:
        ValueError: `num_gpus` is negative.
    """
    if arguments.num_gpus < 0:
        raise ValueError(f"--num-gpus must be a number of processes, not {arguments.num_gpus}")
    arguments.num_gpus = max(1, arguments.num_gpus)
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


class Report(NamedTuple):
    """What a process tells the others about itself."""

    iteration: int
    phase: int  # index into PHASES
    beat: int  # counts, as long as the process runs at all
    waits: int  # 1: for others, in PyTorch's collectives
    place: str  # in the code


class HangHook(HookBase):
    """Ends a process that has waited too long for another one, and says for which.

    Every process tells the others, through the store that they met at, what it is doing. One that
    cannot end itself, because it is frozen, is killed by those on the same machine: a launcher's
    SIGTERM does not reach it.

    Args:
        timeout: seconds. It does not count while all do the same in the first step, which may
            compile, nor in an evaluation after a step, unless a process is frozen for all of them.
    """

    def __init__(self, timeout: float):
        self.timeout, self._ended = timeout, threading.Event()
        self._earlier: list[Report] = []  # when this process last judged

    def before_train(self) -> None:
        """Start to watch."""
        store = distributed.distributed_c10d._get_default_store()
        self._store = distributed.PrefixStore("progress", store)
        self._handles = _handles(comm.all_gather((_machine(), os.getpid())))
        for action in (self._tell, self._watch):
            threading.Thread(target=action, daemon=True).start()

    def after_train(self) -> None:
        """End it."""
        self._ended.set()

    def _wait(self) -> bool:
        """For the next look; False at the end."""
        return not self._ended.wait(min(1, self.timeout / 10))

    def _progress(self) -> tuple[int, int]:
        return self.trainer.iter, PHASES.index(self.trainer.phase)

    def _tell(self) -> None:
        beat = 0
        while self._wait():
            beat += 1
            with contextlib.suppress(distributed.DistError):  # process 0 is gone
                report = json.dumps([*self._progress(), beat, *_place()])
                self._store.set(str(comm.get_rank()), report)

    def _watch(self) -> None:
        """Uses the store in other threads only: process 0 may be frozen, and with it the store."""
        seen, since = None, 0.0
        while self._wait():
            if self._progress() != seen:
                seen, since = self._progress(), time.monotonic()
            if time.monotonic() - since > self.timeout:
                judge = threading.Thread(target=self._judge, daemon=True)
                judge.start()
                for _ in range(JUDGEMENT):  # of which a process that stalls itself uses up one
                    judge.join(1)
                if judge.is_alive() and not self._ended.is_set():
                    since_when = f"nothing has moved for {self.timeout} seconds"
                    self._end(f"process 0 hangs: it does not answer, and {since_when}", [0])
                since = time.monotonic()

    def _judge(self) -> None:
        """End this process unless there is an excuse for the delay."""
        try:
            before = self._reports()
            time.sleep(min(3, self.timeout / 3))
            reports = self._reports()
        except distributed.DistError as error:
            if self._ended.is_set():
                return
            self._end(f"process 0 does not answer ({error})", [0])
        moved = [new[:2] != old[:2] for old, new in zip(before, reports, strict=True)]
        if any(moved) or self._ended.is_set():
            return
        earlier, self._earlier = self._earlier, reports
        evaluating = {report[:2] for report in reports} == {(reports[0].iteration, len(PHASES) - 1)}
        if evaluating:  # one process may work while the others wait, and hold Python's lock
            frozen = guilty = find_frozen(earlier, reports)
        else:
            frozen, guilty = find_frozen(before, reports), find_guilty(before, reports)
        if not guilty and (evaluating or self.trainer.iter == self.trainer.start_iter):
            return
        places = [
            f"process {i} in iteration {r.iteration}, {r.place}" for i, r in enumerate(reports)
        ]
        named = f"process {', '.join(map(str, guilty))} hangs" if guilty else "the job hangs"
        self._end(
            f"{named}: nothing has moved for {self.timeout} seconds; {'; '.join(places)}", frozen
        )

    def _reports(self) -> list[Report]:
        self._store.set_timeout(timedelta(seconds=10))
        ranks = [str(rank) for rank in range(comm.get_world_size())]
        texts = [self._store.get(r) if self._store.check([r]) else None for r in ranks]
        return [Report(*json.loads(t)) if t else Report(-1, 0, 0, 0, "not started") for t in texts]

    def _end(self, reason: str, frozen: list[int]) -> NoReturn:
        """End this process at once, whatever it waits for, with the stacks of its threads."""
        logger.error(reason)
        print(f"Process {comm.get_rank()} ends: {reason}", file=sys.stderr, flush=True)
        faulthandler.dump_traceback()
        for rank in frozen:
            if rank in self._handles:
                with contextlib.suppress(ProcessLookupError):  # others have killed it
                    signal.pidfd_send_signal(self._handles[rank], signal.SIGKILL)
        os._exit(1)


def _machine() -> str:
    """Where process ids mean the same as here; "" outside of Linux."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _handles(processes: list[tuple[str, int]]) -> dict[int, int]:
    """Files that stand for the other processes of this machine, by rank, of (machine, id) of all.

    Unlike an id, they never come to mean a process that is started later.
    """
    here = _machine()
    others = {rank: pid for rank, (place, pid) in enumerate(processes) if here and place == here}
    try:
        return {rank: os.pidfd_open(pid) for rank, pid in others.items() if pid != os.getpid()}
    except (OSError, AttributeError):  # an old kernel, a sandbox, or a Python without it
        return {}


def find_frozen(before: list[Report], reports: list[Report]) -> list[int]:
    """Processes that do not run at all; [] if there is nothing to compare with."""
    pairs = enumerate(zip(before, reports, strict=True)) if before else ()
    return [rank for rank, (then, now) in pairs if now.beat == then.beat]


def find_guilty(before: list[Report], reports: list[Report]) -> list[int]:
    """Processes that the others wait for: frozen ones, else those behind, else those at work.

    [] if all are alike.
    """
    ranks = range(len(reports))
    behind = [rank for rank in ranks if reports[rank][:2] == min(reports)[:2]]
    working = [rank for rank in ranks if not reports[rank].waits]
    signs = (find_frozen(before, reports), behind, working)
    return next((sign for sign in signs if 0 < len(sign) < len(reports)), [])


def _place() -> tuple[int, str]:
    """Whether the main thread is in a collective, and where it is."""
    frame = sys._current_frames()[threading.main_thread().ident]
    frames = list(traceback.walk_stack(frame))
    files = [f.f_code.co_filename for f, _ in frames]
    waits = any(os.path.join("torch", "distributed") in file for file in files)
    return int(waits), f"{files[0]}:{frames[0][1]} ({frame.f_code.co_name})"
