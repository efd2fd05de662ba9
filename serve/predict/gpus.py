"""The engine for several GPUs: a process for each one makes shards, this process writes them in order.

The rows, shard files and manifest are those of the engine `local`. A process sees one GPU, as its first; so
nothing below knows that there are others. Where a process is killed, by a decoder that crashes for one, the
run is supervised as ever: the shard is made again, at last carefully, by this process alone on the first GPU.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from multiprocessing.connection import Connection
from queue import SimpleQueue

from ffl_deploy.runtime.gpu import VISIBLE, gpu_count, visible_gpu
from serve.inputs.items import Item
from serve.pipeline import ordered_map
from serve.predict import local
from serve.predict.job import PredictRun
from serve.predict.local import unfinished
from serve.predict.shard_maker import (
    MadeShard,
    PlainShard,
    ShardMaker,
    accepted,
    commit,
    constructor_arguments,
    described,
)
from serve.predict.supervise import WorkerDied


class Worker:
    """A process that makes shards on one GPU, asked by one thread at a time."""

    def __init__(self, gpu: str, arguments: tuple[str, str | None, str | None, bytes]) -> None:
        """gpu: what CUDA_VISIBLE_DEVICES has to be; arguments: of ShardMaker."""
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=work, args=(theirs, gpu, arguments), daemon=True)
        self._process.start()
        theirs.close()  # so that its end is seen here

    def make(self, shard: PlainShard) -> bytes:
        """-> what ShardMaker answers. Raises WorkerDied."""
        try:
            self._connection.send(shard)
            return self._connection.recv_bytes()
        except (EOFError, OSError):
            self._process.join()
            code = self._process.exitcode or 0
            raise WorkerDied(signal.Signals(-code).name if code < 0 else f"exit code {code}") from None

    def stop(self) -> None:
        self._process.terminate()
        self._process.join()
        self._connection.close()


def work(connection: Connection, gpu: str, arguments: tuple[str, str | None, str | None, bytes]) -> None:
    """The process: shards in, answers out, until the other end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of Ctrl-C, which every process gets: the other end decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    logging.getLogger("ffl_deploy").setLevel(logging.ERROR)  # the other end tells what there is to tell
    os.environ[VISIBLE] = gpu
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    maker = ShardMaker(*arguments)
    try:
        while True:
            shard = connection.recv()
            connection.send_bytes(maker.make(shard))
    except (EOFError, OSError):
        return


def predict_shards(run: PredictRun, items: Iterator[Item]) -> None:
    """Make every shard that is not finished yet. Raises UsageError without a GPU, and what a worker
    refuses."""
    recovery, size = run.job.recovery, run.shards.manifest.settings.shard_size
    if recovery.careful is not None:  # images are tried one at a time
        local.predict_shards(run, items)
        return

    def guard(number: int, position: int, item: Item) -> Item:
        return recovery.guarded(item, number, number * size + position)

    def shards() -> Iterator[PlainShard]:
        for number, shard in unfinished(run, items):
            yield described(number, shard, partial(guard, number))

    with ExitStack() as stack:
        gpus = [visible_gpu(number) for number in range(gpu_count())]
        threads = ThreadPoolExecutor(len(gpus), "gpu")
        stack.callback(threads.shutdown, cancel_futures=True)
        idle: SimpleQueue[Worker] = SimpleQueue()
        for gpu in gpus:
            worker = Worker(gpu, constructor_arguments(run))
            stack.callback(worker.stop)  # first, which ends what its thread waits for
            idle.put(worker)

        def made(shard: PlainShard) -> MadeShard:
            worker = idle.get()
            try:
                return accepted(worker.make(shard))
            finally:
                idle.put(worker)

        for finished in ordered_map(made, shards(), threads, 2 * len(gpus), lambda shard: len(shard.items)):
            commit(run, finished)
            recovery.marker.finished(run.job.own.next_from(finished.index + 1))
