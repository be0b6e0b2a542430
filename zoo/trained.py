"""The models that recipes train: one in the registry for each recipe, with weights where they ship.

What a run leaves is NAME.safetensors, a card NAME.json that says where the weights come from and
what they score, and what its task needs beside them, such as a tokenizer.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import hashlib
import importlib.util
import json
import platform
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fxpress.errors import CalibrationError
from fxpress.zoo import objectives, recipe, registry, training
from fxpress.zoo.pretrained import PretrainedError, no_pretrained
from fxpress.zoo.recipe import Recipe
from fxpress.zoo.registry import Calibration, Entry

__all__ = ["SHIPPED", "Card", "entries", "evaluate", "load_card", "load_module", "train"]

SHIPPED = Path(__file__).parent / "trained"
ROWS = 4  # sequences of a batch for calibration
Card = dict[str, Any]


def train(
    plan: Recipe,
    out: Path,
    *,
    data: Path | None = None,
    device: str = "cpu",
    progress: training.Progress = lambda _: None,
) -> Card:
    """Train by a recipe and write weights and card into a folder; goes on where it was killed.

    Args:
        plan: the recipe.
        out: the folder; also of the checkpoint.
        data: a folder with a file for each split, in place of the recipe's own data.
        device: cpu or cuda.
        progress: called after each checkpoint.

    Returns:
        The card: recipe, sha256 of data and weights, scores on the test split, and what to compare
        them with. Empty in all but the first of the processes that `torchrun` started.

    Raises:
        RecipeError: the recipe cannot be followed, or the checkpoint is another's.
        CalibrationError: the data cannot be read.
    """
    task = objectives.task_of(plan, data)
    checkpoint = out / f"{plan.name}.checkpoint.safetensors"
    module, state = training.train(plan, task, checkpoint, device=device, progress=progress)
    if not training.is_first_process():
        return {}
    frozen = _frozen(module)
    trained = {name: x for name, x in module.state_dict().items() if name not in frozen}
    weights = {name: _stored(x, plan) for name, x in trained.items()}
    module.load_state_dict(frozen | weights)
    _write(out / f"{plan.name}.safetensors", lambda path: save_file(weights, path))
    for name, text in task.beside.items():
        _write(out / name, partial(_write_text, text))
    card = {
        "recipe": dataclasses.asdict(plan),
        "parameters": sum(p.numel() for p in module.parameters()),
        "data_sha256": task.sha256,
        "weights_sha256": _sha256(out / f"{plan.name}.safetensors"),
        "headline": task.headline,
        "scores": _scores(module, task),
        "baselines": task.baselines,
        "seconds": round(state.seconds, 1),
        "cpu_seconds": round(state.cpu_seconds, 1),
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "processes": state.processes,
        "machine": _machine(device),
        "torch": torch.__version__,
        "history": state.history,
    }
    text = json.dumps(card, indent=1) + "\n"
    _write(out / f"{plan.name}.json", partial(_write_text, text))
    return card


def evaluate(name: str, folder: Path = SHIPPED, data: Path | None = None) -> dict[str, Any]:
    """Score trained weights on the test split of their recipe's data, or of another folder's.

    A model trained elsewhere, which has no card, is scored as its entry in the registry says.

    Returns:
        The metrics, and the headline metric of what to compare them with.

    Raises:
        PretrainedError: there are no weights, or others than the card says.
    """
    known = registry.entries().get(name)
    if folder == SHIPPED and known is not None and known.score is not None:
        if data is not None:
            raise PretrainedError(f"{name} is scored on data of its own: it takes no {data}")
        scores = known.score.measure(known.build(pretrained=True))
        return {"scores": scores, "baselines": known.score.baselines()}
    plan = Recipe(**load_card(name, folder)["recipe"])
    task = objectives.task_of(plan, data)
    return {"scores": _scores(load_module(name, folder), task), "baselines": task.baselines}


def load_card(name: str, folder: Path = SHIPPED) -> Card:
    """The card of a trained model.

    Raises:
        PretrainedError: there is none.
    """
    path = folder / f"{name}.json"
    if not path.is_file():
        raise PretrainedError(
            f"{folder} has no trained {name}: `fxpress zoo train {name}` makes it"
        )
    card: Card = json.loads(path.read_text(encoding="utf-8"))
    return card


def load_module(name: str, folder: Path = SHIPPED) -> nn.Module:
    """A trained model, in eval mode.

    Raises:
        PretrainedError: there are no weights, or others than the card says.
    """
    card, path = load_card(name, folder), folder / f"{name}.safetensors"
    if not path.is_file() or _sha256(path) != card["weights_sha256"]:
        raise PretrainedError(f"{path} is missing, or is not what its card was written for")
    module = registry.create_model(**card["recipe"]["model"])
    module.load_state_dict(_frozen(module) | load_file(path))
    return module.eval()


def _frozen(module: nn.Module) -> dict[str, torch.Tensor]:
    """The weights that are not trained, and not written: they come with the model."""
    return {name: p.detach() for name, p in module.named_parameters() if not p.requires_grad}


def _stored(x: torch.Tensor, plan: Recipe) -> torch.Tensor:
    """A weight as it is written."""
    kind = getattr(torch, plan.stored) if x.is_floating_point() else x.dtype
    return x.to("cpu", kind).contiguous()


def _scores(module: nn.Module, task: objectives.Task) -> dict[str, float]:
    return task.metrics(*training.evaluate(module, task, "test")) | task.decoded(module)


def _machine(device: str) -> str:
    """What computed, in words."""
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, bfloat16"
    return f"{device}, {torch.get_num_threads()} thread(s), {platform.machine()}"


def _write_text(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _write(path: Path, write: Any) -> None:
    """All of a file, or nothing."""
    unfinished = path.with_suffix(".partial")
    write(unfinished)
    unfinished.replace(path)


# --- the registry ---------------------------------------------------------------------------


def entries() -> tuple[Entry, ...]:
    """An entry for each recipe, in its reduced form: it is what ships. None without PyYAML."""
    if importlib.util.find_spec("yaml") is None:
        return ()
    return tuple(_entry(recipe.load(name, reduced=True)) for name in recipe.list_recipes())


def _entry(plan: Recipe) -> Entry:
    has_weights = (SHIPPED / f"{plan.name}.json").is_file()

    def build(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        if not pretrained:
            return registry.create_model(**plan.model | {"pretrained": False} | kwargs)
        if not has_weights:
            raise no_pretrained(plan.name)
        if kwargs:
            raise PretrainedError(
                f"{plan.name}: the weights fix the sizes: drop {', '.join(kwargs)}"
            )
        return load_module(plan.name)

    return Entry(
        plan.name,
        plan.description,
        "Apache-2.0" if has_weights else "none",
        f"{plan.source}; trained by `fxpress zoo train {plan.name} --reduced`",
        build,
        _calibration(plan),
        has_weights,
    )


def _calibration(plan: Recipe) -> Calibration:
    """What the objective makes of a file or of its sample; else what is drawn in training."""

    def read(path: Path | None = None, limit: int = 32) -> list[Any]:
        if (own := objectives.objective_of(plan).calibration) is not None:
            return own(plan.data, path, limit)
        if path is not None:
            raise CalibrationError(f"{plan.name} draws its sequences: it reads no {path}")
        draw = objectives.task_of(plan).draw
        generator = torch.Generator().manual_seed(objectives.seed_of("calibration"))
        return [objectives.call_of(draw(ROWS, generator)) for _ in range(limit)]

    return read


TRAINED = entries()
