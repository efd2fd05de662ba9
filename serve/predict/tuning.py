"""Batch size and threads, chosen by a short measurement on this machine with this model."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import numpy as np

from ffl_deploy.bundle import Bundle
from ffl_deploy.errors import CheckError, DeviceLost
from ffl_deploy.host import available_cores
from ffl_deploy.runtime import Session, runtime_named
from ffl_deploy.runtime.gpu import gpu_count
from serve.pipeline import WorkSettings
from serve.predict.job import Job

SMALL_RUN = 2048  # items: below, measuring costs more than it gains
SMALL_BATCH = 32
SHARD_SIZE = 1024  # rows: some seconds of work, and a row group of the Parquet output
BATCH_SIZES = (16, 64)  # tried on a processor
GPU_BATCH_SIZES = (16, 64, 256, 1024)
GPU_STREAMS = 2  # while the GPU computes one batch, the next is on its way
MEASURE_SECONDS = 0.25  # for each candidate
WORTH = 1.05  # a larger or split configuration must be this much faster than the one before it


def choose_settings(bundle: Bundle, job: Job, small: bool) -> WorkSettings:
    """-> settings for a new run: what the flags say, and for the rest a measurement (or, for a small run,
    safe values)."""
    # an actor takes one core unless it was told otherwise: the cluster has as many as there are cores
    if job.engine == "ray":
        return WorkSettings(
            job.batch_size or BATCH_SIZES[-1],
            job.shard_size or SHARD_SIZE,
            streams=1,
            threads=job.threads or 1,
            decoders=1,
        )
    # of a part every machine has to choose the same, however many cores it has: one thread for each batch,
    # which is what the bytes depend on, and as many batches at once as there is room for
    if job.part is not None:
        streams = job.threads or available_cores()
        size = SMALL_BATCH
        if runtime_named(job.runtime or bundle.variant(job.variant).runtime).gpu:
            streams, size = min(streams, GPU_STREAMS), GPU_BATCH_SIZES[1]
        return WorkSettings(
            job.batch_size or size,
            job.shard_size or SHARD_SIZE,
            streams,
            threads=1,
            decoders=available_cores(),
        )
    cores = job.threads or max(1, available_cores() // (gpu_count() if job.gpu == "all" else 1))
    if small or (job.batch_size is not None and cores == 1):
        batch_size, streams = job.batch_size or SMALL_BATCH, 1
    else:
        batch_size, streams = fastest(bundle, job, cores)
    return WorkSettings(
        batch_size=batch_size,
        shard_size=job.shard_size or SHARD_SIZE,
        streams=streams,
        threads=max(1, cores // streams),
        decoders=cores,
    )


def fastest(bundle: Bundle, job: Job, cores: int) -> tuple[int, int]:
    """-> (batch size, streams) with the highest rate: one stream on all cores, or one stream on each core; on
    a GPU one or two.

    Streams need no barrier between the layers of a network, threads inside one inference do;
    which one wins depends on the model.
    """
    on_gpu = runtime_named(job.runtime or bundle.variant(job.variant).runtime).gpu
    best, best_rate = (job.batch_size or SMALL_BATCH, 1), 0.0
    for streams in dict.fromkeys((1, GPU_STREAMS if on_gpu else cores)):
        # only its time is asked
        session = bundle.session(job.variant, job.runtime, threads=max(1, cores // streams), check=False)
        sizes = GPU_BATCH_SIZES if on_gpu else BATCH_SIZES
        with closing(session):
            for batch_size in (job.batch_size,) if job.batch_size else sizes:
                # so slow a model gains nothing by more images at once
                if batch_size > best_rate * 2 * MEASURE_SECONDS > 0:
                    continue
                try:
                    rate = measured_rate(session, bundle, batch_size, streams)
                except DeviceLost:
                    raise
                except CheckError:
                    if best_rate == 0:
                        raise
                    break  # no memory for so many
                if rate > best_rate * WORTH:
                    best, best_rate = (batch_size, streams), rate
    return best


def measured_rate(
    session: Session, bundle: Bundle, batch_size: int, streams: int, seconds: float = MEASURE_SECONDS
) -> float:
    """-> images/s of `streams` concurrent callers, each with batches of seeded noise;
    the first batch is not timed."""
    size = bundle.preprocessing
    batch = np.random.default_rng(0).integers(
        0, 256, (batch_size, size.height, size.width, 3), dtype=np.uint8
    )

    def call() -> int:
        done = 0
        while done == 0 or time.perf_counter() < deadline:
            session.run(batch)
            done += batch_size
        return done

    with ThreadPoolExecutor(streams) as pool:
        session.run(batch)
        started = time.perf_counter()
        deadline = started + seconds
        done = sum(pool.map(lambda _: call(), range(streams)))
        return done / (time.perf_counter() - started)
