"""The engine `ray`: the same shards, each made by an actor of Ray Data,
written by this process in the same order.

The rows, shard files and manifest are those of the engine `local`: a run begun on a cluster can be resumed on
one machine. Ray replaces an actor that dies and makes its shard again; when the cluster gives up, the
finished shards are kept.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from typing import Any

from ffl_deploy.errors import CheckError, UsageError, first_line
from ffl_deploy.installed import missing
from ffl_deploy.runtime import runtime_named
from serve.inputs.items import Item
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

WINDOW = 1024  # shards in one Ray Data job
# of them: names of files, and the images themselves where they are members of archives or tables
WINDOW_BYTES = 256 << 20
RETRIES = 2  # of a shard whose actor died; Ray Data's own default is to try for ever


class RayShardMaker(ShardMaker):
    """A ShardMaker as Ray Data calls it."""

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """batch: one PlainShard -> the answer."""
        return {"made": [self.make(PlainShard.of({name: batch[name][0] for name in PlainShard._fields}))]}


def predict_shards(run: PredictRun, items: Iterator[Item]) -> None:
    """Make every shard that is not finished yet. Raises UsageError without Ray,
    CheckError when the cluster gives up."""
    ray = start_ray()
    try:
        shards = (described(number, shard)._asdict() for number, shard in unfinished(run, items))
        while window := next_window(shards):
            for finished in mapped(ray, window, run):
                commit(run, finished)
    except ray.exceptions.RayError as error:
        raise CheckError(
            f"the cluster gave up a shard ({first_line(error)}); the finished ones are "
            "kept: the same command with --resume goes on, and with --engine local it also finds the image "
            "that kills workers."
        ) from error
    finally:
        ray.shutdown()


def next_window(described: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    """-> the next shards that this process holds at a time: at most WINDOW, and about WINDOW_BYTES."""
    window: list[dict[str, Any]] = []
    held = 0
    for shard in described:
        window.append(shard)
        held += len(shard["items"])
        if len(window) == WINDOW or held >= WINDOW_BYTES:
            break
    return window


def start_ray() -> Any:
    """-> the module ray, connected to the cluster of RAY_ADDRESS or to a local one of its own."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # what goes wrong arrives here as an exception
    try:
        import ray
        import ray.data
        import ray.exceptions
    except ImportError as error:
        raise missing("ray", "leave --engine ray away") from error
    if not ray.is_initialized():
        local: dict[str, Any] = {} if os.environ.get("RAY_ADDRESS") else {"include_dashboard": False}
        try:
            ray.init(log_to_driver=False, logging_level=logging.ERROR, **local)
        except Exception as error:  # a node that does not come up in time is a plain Exception
            raise CheckError(
                f"Ray did not start ({first_line(error)}); free the machine, or start it "
                "yourself (ray start --head, then RAY_ADDRESS=auto), or leave --engine ray away."
            ) from error
    # its tracebacks; the error itself is raised here
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    return ray


def mapped(ray: Any, window: list[dict[str, Any]], run: PredictRun) -> Iterator[MadeShard]:
    """Yield the shards of `window`, made, in order. Raises CheckError,
    UsageError where a node must not make any."""
    needs = actor_needs(run)
    actors = actor_count(needs, ray.cluster_resources(), len(window))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a successor to ray_remote_args_fn that Ray does not have yet
        dataset = ray.data.from_items(window, override_num_blocks=len(window)).map_batches(
            RayShardMaker,
            fn_constructor_args=constructor_arguments(run),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(min_size=actors, max_size=actors),
            **needs,
            ray_remote_args_fn=lambda: {"max_restarts": -1, "max_task_retries": RETRIES},
        )
    for batch in dataset.iter_batches(batch_size=1, prefetch_batches=0):
        yield accepted(batch["made"][0])


def actor_needs(run: PredictRun) -> dict[str, int]:
    """-> what Ray gives each actor: its cores; and where the runtime computes on a GPU, one of its own, so
    that it is started where there is one and sees no other."""
    settings = run.shards.manifest.settings
    needs = {"num_cpus": settings.threads * settings.streams}
    return needs | ({"num_gpus": 1} if runtime_named(run.shards.manifest.request.runtime).gpu else {})


def actor_count(needs: dict[str, int], cluster: dict[str, float], shards: int) -> int:
    """-> how many actors the cluster has room for, at least one, and not more than there are shards.

    Raises UsageError where each needs a GPU and the cluster has none.
    """
    room = int(cluster.get("CPU", 1)) // needs["num_cpus"]
    if "num_gpus" in needs:
        gpus = int(cluster.get("GPU", 0)) // needs["num_gpus"]
        if gpus < 1:
            raise UsageError(
                "no node of the Ray cluster has a GPU; start Ray where there is one (ray start "
                "--num-gpus=N), or use a --runtime on the processor."
            )
        room = min(room, gpus)
    return max(1, min(shards, room))
