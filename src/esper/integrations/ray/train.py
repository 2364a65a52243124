"""``train``: a training function in several processes of a Ray cluster, begun again where one of them failed.

The function is the one that torchrun would start. Ray has made the process group before it is called, and
every process knows its ``RANK`` and ``WORLD_SIZE``. Checkpoints are the function's own: called again it goes
on from them by itself, so Ray is told of none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypedDict, TypeVar

from esper.errors import ConfigError, MissingExtraError, ProcessError

try:
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer
except ImportError:
    raise MissingExtraError("ray[train]", "ray", "training on a Ray cluster") from None

GLOO, NCCL = "gloo", "cpu:gloo,cuda:nccl"  # growth's records travel between CPUs

Result = TypeVar("Result")


class Told(TypedDict):
    """What a process of the cluster is told."""

    function: Callable[..., object]
    arguments: dict[str, object]


def train(
    function: Callable[..., Result],
    arguments: Mapping[str, object] | None = None,
    *,
    workers: int | tuple[int, int] = 2,
    restarts: int = 3,
    gpus: bool = False,
    resources: Mapping[str, float] | None = None,
    storage: str | Path | None = None,
    address: str | None = None,
) -> Result:
    """Train on a Ray cluster: the one this program has joined, or else a running one, or one started here.

    When a process fails, or is lost with its node, Ray ends the others and calls the function anew in fresh
    ones. It goes on from its newest checkpoint if it begins with ``Trainer.resume()`` or
    ``CheckpointManager.resume()``; all nodes must then share the checkpoints' folder, or use a bucket.

    A cluster that is started here asks for a token and stays until ``ray.shutdown()`` or the program's end.

    Args:
        function: Function every process calls; found by name on all nodes, or defined in the program's own
            file.
        arguments: Its keyword arguments, by name.
        workers: Number of processes; or the fewest and the most of them, for a cluster whose nodes come and
            go. Ray waits until there is room for them.
        restarts: Number of times a failed run begins again.
        gpus: True where each process has a GPU.
        resources: Share of the cluster each process takes, as Ray counts it; by default one CPU, or one GPU.
        storage: Folder of Ray's own notes of the run; all nodes must share it. None: as Ray does.
        address: Address of the cluster, as ``ray.init`` takes it.

    Returns:
        What the function returned in the first process.

    Raises:
        ConfigError: A number is out of range.
        ProcessError: The run failed once more than it may begin again.
    """
    fewest, most = workers if isinstance(workers, tuple) else (workers, workers)
    if not 1 <= fewest <= most:
        raise ConfigError(f"workers={workers!r}: give at least one, or the fewest and the most, (2, 8)")
    if restarts < 0:
        raise ConfigError(f"restarts={restarts!r}: 0 or more")
    if not ray.is_initialized():
        ray.init(address=address, include_dashboard=False)
    trainer = TorchTrainer(
        begin,
        train_loop_config={"function": function, "arguments": dict(arguments or {})},
        torch_config=TorchConfig(backend=NCCL if gpus else GLOO),
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=gpus,
            resources_per_worker=None if resources is None else {**resources},
        ),
        run_config=RunConfig(
            storage_path=None if storage is None else str(storage),
            failure_config=FailureConfig(max_failures=restarts),
        ),
    )
    try:
        return trainer.fit().return_value
    except TrainingFailedError as error:
        raise ProcessError(
            f"the run failed {restarts + 1} times on the Ray cluster, which is as often as it may; the same "
            f"call goes on from its newest checkpoint: {error}"
        ) from error


def begin(told: Told) -> object:
    """Call the function, in a process of the cluster."""
    return told["function"](**told["arguments"])
