"""Runs of an experiment on all cores of this machine, or wherever joblib's backend of the moment takes them.

In: trials. Out: each one's place and result, as they are done; the same to the last digit as one after the other.
Rules here:
- One job, or one run: here, in this process, and joblib is not needed.
- A backend that somebody chose with `joblib.parallel_config` (Dask, Ray) takes the runs, and says how many at once.
- However a sweep ends, it leaves no process behind: joblib ends them where it can. Where this process was killed, each
  sees that its parent is gone; without that they were there, waiting, five minutes later. Where Ctrl-C came twice, it
  also hit the `pgrep` by which joblib looks for what to kill, and this process waited for ever: so we kill them.
Rejected: chunks of several runs (a run takes seconds, to hand it over takes milliseconds).
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cache, partial
from importlib.util import find_spec
from typing import Final

from epp.errors import ConfigError
from epp.sim.experiment import R, Through, Trial, in_turn

MISSING: Final = "needs joblib: pip install 'epp[sim]'"


def spread(jobs: int = 0) -> Through:
    """A maker of runs for `experiment.made`.

    Args:
        jobs: runs at the same time; 0: one a core, and where joblib is not installed, one after the other. 1: in this
            process.

    Raises:
        ConfigError: fewer than 0; several are asked for, and joblib is not installed.
    """
    if jobs < 0:
        raise ConfigError(f"--jobs {jobs}: a number of runs at the same time is expected, or 0 for one a core")
    if not find_spec("joblib"):
        if jobs > 1:
            raise ConfigError(f"--jobs {jobs} {MISSING}")
        return in_turn
    return in_turn if jobs == 1 else partial(_spread, jobs or -1)


def _spread(jobs: int, trials: Sequence[Trial[R]]) -> Iterator[tuple[int, R]]:
    from concurrent.futures.process import BrokenProcessPool

    import joblib

    at_once = min(joblib.effective_n_jobs(jobs), len(trials))
    if at_once <= 1:
        yield from in_turn(trials)
        return
    sweep = joblib.Parallel(n_jobs=at_once, batch_size=1, pre_dispatch="all", return_as="generator_unordered")
    try:
        yield from sweep(joblib.delayed(_run)(at, trial, os.getpid()) for at, trial in enumerate(trials))
    except BrokenProcessPool as error:
        raise ConfigError("a process of this sweep was ended, most likely for want of memory: lower --jobs") from error
    except BaseException:
        _kill()
        raise


def _kill() -> None:
    """End joblib's processes, at work or not."""
    from joblib.externals.loky.backend.process import LokyProcess

    for process in multiprocessing.active_children():
        if isinstance(process, LokyProcess) and process.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)


def _run(at: int, trial: Trial[R], parent: int) -> tuple[int, R]:
    """What another process does."""
    if os.getppid() == parent:  # a child of ours, and no worker of a cluster that lives on without us
        _end_with(parent)
    return at, trial.run()


@cache
def _end_with(parent: int) -> None:
    """End this process when its parent has ended, though a run were going on. Looked at once a second."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
