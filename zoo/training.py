"""One trainer for every recipe of the zoo.

The batch of a step, and whatever else is random in it, is drawn from the recipe's seed and the
number of the step. So a checkpoint needs weights, optimizer and counters only, and a run that was
killed goes on to the same weights, bit for bit where the device computes alike twice, as one that
was not. Under `torchrun` each process takes its share of every batch.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

from fxpress.zoo.objectives import IGNORED, Batch, Task, seed_of
from fxpress.zoo.recipe import Recipe, RecipeError
from fxpress.zoo.registry import create_model

__all__ = [
    "Progress",
    "State",
    "evaluate",
    "is_first_process",
    "recurrent_layers_in_float32",
    "train",
]

Progress = Callable[["State"], None]


@dataclass
class State:
    """Where a run stands."""

    step: int = 0
    processes: int = 1  # in the last piece of the run
    seconds: float = 0.0  # of training, over all the pieces of a run
    cpu_seconds: float = 0.0  # of them, those that all threads together had a core for
    best: float = math.inf  # least validation loss, nats
    history: list[dict[str, float]] = field(default_factory=list)  # step, train and valid loss


def train(
    recipe: Recipe,
    task: Task,
    checkpoint: Path,
    *,
    device: str = "cpu",
    progress: Progress = lambda _: None,
) -> tuple[nn.Module, State]:
    """Train, or go on from the checkpoint; the weights of the least validation loss.

    Args:
        recipe: how; with a seed.
        task: on what.
        checkpoint: a safetensors file, written whenever the model is evaluated.
        device: cpu or cuda; there the forward pass is in bfloat16.
        progress: called after each checkpoint.

    Returns:
        The trained module in eval mode, and how the run went.

    Raises:
        RecipeError: the checkpoint is of another recipe or other data.
    """
    with _processes(device) as (place, rank, world):
        if recipe.batch % world:
            raise RecipeError(f"{recipe.name}: {recipe.batch} sequences for {world} processes")
        run = Run(recipe, task, place, rank, world)
        run.resume(checkpoint)
        run.state.processes = world
        forward = DistributedDataParallel(run.module) if world > 1 else run.module
        with recurrent_layers_in_float32(run.module):
            while run.state.step < recipe.steps:
                run.advance(forward)
                if rank == 0:
                    run.save(checkpoint)
                    progress(run.state)
        run.module.load_state_dict(run.best)
        return run.module.eval(), run.state


@contextmanager
def _processes(device: str) -> Iterator[tuple[torch.device, int, int]]:
    """Device, rank and number of processes; those that `torchrun` started join a group."""
    if not distributed.is_torchelastic_launched():
        yield torch.device(device), 0, 1
        return
    if device == "cuda":  # what names no device is then meant for this process's own, too
        place = torch.device("cuda", distributed.get_node_local_rank())
        torch.cuda.set_device(place)
        distributed.init_process_group("nccl", device_id=place)
    else:
        place = torch.device(device)
        distributed.init_process_group("gloo")
    try:
        yield place, distributed.get_rank(), distributed.get_world_size()
    finally:
        distributed.destroy_process_group()


def is_first_process() -> bool:
    """Whether this process is the one that writes; true without `torchrun`."""
    return not distributed.is_torchelastic_launched() or os.environ["RANK"] == "0"


class Run:
    """The parts of a run that change: module, optimizer, best weights, counters."""

    def __init__(
        self, recipe: Recipe, task: Task, device: torch.device, rank: int = 0, world: int = 1
    ) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.task, self.device = recipe, task, device
        self.rank, self.world = rank, world
        self.module = create_model(**recipe.model).to(device)
        self.optimizer = _optimizer(recipe, self.module)
        self.best = _copy(self.module)
        self.state = State()

    def advance(self, forward: nn.Module) -> None:
        """Train up to the next evaluation, evaluate, and keep the weights if they are the best."""
        start, cpu_start, state = time.perf_counter(), time.process_time(), self.state
        stop = min(state.step + self.recipe.evaluate_every, self.recipe.steps)
        losses = [self._step(forward, step) for step in range(state.step, stop)]
        valid, _ = evaluate(self.module, self.task, "valid")
        if valid < state.best:
            state.best, self.best = valid, _copy(self.module)
        trained = torch.stack(losses).mean()
        if self.world > 1:
            distributed.all_reduce(trained)
        history = {"step": stop, "train": trained.item() / self.world, "valid": valid}
        state.history.append(history)
        state.step, state.seconds = stop, state.seconds + time.perf_counter() - start
        state.cpu_seconds += time.process_time() - cpu_start

    def _step(self, forward: nn.Module, step: int) -> Tensor:
        """One step on this process's share of the batch.

        Returns:
            The share's loss, so weighted that the mean over processes is the loss of the batch:
            one that got the shorter sequences has fewer targets. So is then the mean of gradients,
            which `DistributedDataParallel` takes.
        """
        seed = seed_of("train", self.recipe.seed, step)
        torch.manual_seed(seed + self.rank)  # for what is random in the model
        whole = self.task.draw(self.recipe.batch, torch.Generator().manual_seed(seed))
        share = _shared(whole, slice(self.rank, None, self.world))
        weight = self.world * _count(share) / _count(whole)
        forward.train()
        with torch.autocast("cuda", torch.bfloat16, enabled=self.device.type == "cuda"):
            loss = weight * _loss(forward, share, self.device, self.recipe.label_smoothing)[0]
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.module.parameters(), self.recipe.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate * _schedule(self.recipe, step)
        self.optimizer.step()
        return loss.detach()

    def save(self, path: Path) -> None:
        """Write a checkpoint: the old one, or the new one, is there at every moment."""
        tensors = {f"module.{name}": x for name, x in self.module.state_dict().items()}
        tensors |= {f"best.{name}": x for name, x in self.best.items()}
        for index, slots in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": x for name, x in slots.items()}
        about = {"identity": self._identity(), "state": json.dumps(dataclasses.asdict(self.state))}
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        save_file({name: x.contiguous() for name, x in tensors.items()}, partial, about)
        partial.replace(path)

    def resume(self, path: Path) -> None:
        """Take up a checkpoint, if there is one.

        Raises:
            RecipeError: it is of another recipe or other data.
        """
        if not path.exists():
            return
        parts: dict[str, dict[str, Tensor]] = {"module": {}, "best": {}, "optimizer": {}}
        # To the CPU: from there everything is copied to where it belongs, and AdamW's count of
        # steps belongs on the CPU. On a GPU it would be waited for, for each tensor of each step.
        with safe_open(path, "pt") as file:
            about = file.metadata()
            if about["identity"] != self._identity():
                raise RecipeError(
                    f"{path} is of another recipe or other data than {self.recipe.name}: "
                    "remove it, or write elsewhere"
                )
            for key in file.keys():  # noqa: SIM118
                part, _, name = key.partition(".")
                parts[part][name] = file.get_tensor(key)
        self.module.load_state_dict(parts["module"])
        self.best = parts["best"]
        self._restore_optimizer(parts["optimizer"])
        self.state = State(**json.loads(about["state"]))

    def _restore_optimizer(self, tensors: dict[str, Tensor]) -> None:
        slots: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            index, _, name = key.partition(".")
            slots.setdefault(int(index), {})[name] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": slots, "param_groups": groups})

    def _identity(self) -> str:
        facts = dataclasses.asdict(self.recipe) | {"sha256": self.task.sha256}
        return json.dumps(facts, sort_keys=True)


@torch.no_grad()
def evaluate(module: nn.Module, task: Task, split: str) -> tuple[float, float]:
    """Mean loss in nats over all targets of a split, and accuracy over those that count for it."""
    module.eval()
    device = next(module.parameters()).device
    total, right, targets_seen, asked_seen = 0.0, 0, 0, 0
    for batch in task.splits[split]:
        loss, logits, targets = _loss(module, batch, device)
        count, asked = _count(batch), task.asked(targets)
        total, targets_seen = total + loss.item() * count, targets_seen + count
        right += int((logits.argmax(-1) == targets)[asked].sum())
        asked_seen += int(asked.sum())
    return total / targets_seen, right / asked_seen


def _shared(batch: Batch, share: slice) -> Batch:
    """The rows that one of several processes takes."""
    inputs, targets = batch
    return tuple(x[share] for x in inputs), targets[share]


def _count(batch: Batch) -> int:
    """Targets that count."""
    return int((batch[1] != IGNORED).sum())


def _loss(
    module: nn.Module, batch: Batch, device: torch.device, smoothing: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean cross-entropy in nats; logits (B, ..., V) and targets (B, ...)."""
    inputs, targets = tuple(x.to(device) for x in batch[0]), batch[1].to(device)
    logits = module(*inputs)
    loss = F.cross_entropy(
        logits.flatten(0, -2),
        targets.flatten(),
        ignore_index=IGNORED,
        label_smoothing=smoothing,
    )
    return loss, logits, targets


def _schedule(recipe: Recipe, step: int) -> float:
    """Share of the learning rate: a linear rise, then half a cosine."""
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    return 0.5 * (1 + math.cos(math.pi * (step - recipe.warmup) / (recipe.steps - recipe.warmup)))


def _optimizer(recipe: Recipe, module: nn.Module) -> torch.optim.Optimizer:
    kinds: dict[str, Any] = {"adamw": torch.optim.AdamW, "rmsprop": torch.optim.RMSprop}
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer: torch.optim.Optimizer = kinds[recipe.optimizer](
        trained, lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    return optimizer


def _copy(module: nn.Module) -> dict[str, Tensor]:
    return {name: x.detach().clone() for name, x in module.state_dict().items()}


@contextmanager
def recurrent_layers_in_float32(module: nn.Module) -> Iterator[None]:
    """Leave torch's recurrent layers out of autocast, in the type of their weights.

    On CUDA autocast gives them float16, whatever type it was asked for: without scaling of the loss
    small gradients would become zero there.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, nn.RNNBase)]
    for layer in layers:
        layer.forward = _in_float32(layer.forward)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _in_float32(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(x: Tensor, state: Any = None) -> Any:
        with torch.autocast(x.device.type, enabled=False):
            return forward(x.float(), pytree.tree_map_only(Tensor, Tensor.float, state))

    return run
