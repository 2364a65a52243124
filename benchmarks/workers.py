"""Run many trainings in a few single-threaded processes, answers in the order of the jobs."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import get_context
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import track

from benchmarks.machine import THREADS_PER_WORKER
from esper.log import LOGGER

Job = TypeVar("Job")
Answer = TypeVar("Answer")
progress = Console(stderr=True)


class Workers:
    """A pool of spawned processes; with ``processes=0`` everything runs in this one."""

    def __init__(self, pool: ProcessPoolExecutor | None) -> None:
        self.pool = pool

    def map(self, work: Callable[[Job], Answer], jobs: Sequence[Job], note: str) -> list[Answer]:
        """Run every job, as many at a time as there are processes."""
        if self.pool is None:
            return [work(job) for job in track(jobs, note, console=progress)]
        filed = [self.pool.submit(work, job) for job in jobs]
        for done in track(as_completed(filed), note, total=len(filed), console=progress):
            if done.exception() is not None:
                self.pool.shutdown(wait=False, cancel_futures=True)
                break
        return [job.result() for job in filed]

    def one_at_a_time(self, work: Callable[[Job], Answer], jobs: Sequence[Job], note: str) -> list[Answer]:
        """Run the jobs with nothing else of ours beside them: for anything that takes time."""
        if self.pool is None:
            return self.map(work, jobs, note)
        return [self.pool.submit(work, job).result() for job in track(jobs, note, console=progress)]


@contextmanager
def workers(processes: int) -> Iterator[Workers]:
    """Open the pool; spawned, because a forked torch may hang on its own thread pool."""
    os.environ["OMP_NUM_THREADS"] = str(THREADS_PER_WORKER)  # read by a child's torch when it is imported
    if processes == 0:
        single_thread()
        yield Workers(None)
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=begin) as pool:
        yield Workers(pool)


def begin() -> None:
    """Prepare a worker: one thread, and no line of a run's logger between the tables of the bench."""
    single_thread()
    LOGGER.addHandler(logging.NullHandler())


def single_thread() -> None:
    torch.set_num_threads(THREADS_PER_WORKER)
