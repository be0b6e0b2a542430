"""The command line: `fxpress optimize` and `fxpress explain`.

Bad input ends with exit code 2 and one clear line; a traceback is a bug (`FXPRESS_DEBUG=1` shows
where it comes from).
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from fxpress import environment
from fxpress.errors import CalibrationError, FxpressError, PlanError

__all__ = ["main"]

_LIMIT = 64  # calibration batches that are read from a file


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; exits with 0, or with 2 on bad input."""
    try:
        import typer
    except ImportError:
        sys.exit("the command line needs typer and rich: pip install 'fxpress[cli]'")
    try:
        status = typer.main.get_command(_app(typer)).main(
            list(argv) if argv is not None else None, prog_name="fxpress", standalone_mode=False
        )
    except (FxpressError, ImportError, OSError) as error:
        _fail(error)
    except Exception as error:
        # click's own usage errors print themselves in one line.
        if not hasattr(error, "format_message"):
            raise
        _fail(error)
    sys.exit(status if isinstance(status, int) else 0)


def _fail(error: Exception) -> None:
    if environment.debug_level() >= 1:
        raise error
    text = error.format_message() if hasattr(error, "format_message") else str(error)
    print(f"error: {' '.join(str(text).split())}", file=sys.stderr)
    sys.exit(2)


def _app(typer: Any) -> Any:
    app = typer.Typer(add_completion=False, no_args_is_help=True, help="Optimize trained models.")
    model = typer.Option(
        ..., "--model", help="zoo:NAME (pretrained), package.module:function, hf-config:FILE"
    )

    @app.command()  # type: ignore[untyped-decorator]
    def optimize(
        model: str = model,
        calib: Path = typer.Option(None, help="texts (.txt, .jsonl) or a folder of recordings"),
        config: Path = typer.Option(None, help="settings, a YAML file"),
        max_divergence: float = typer.Option(None, help="budget: mean divergence of outputs"),
        judge: str = typer.Option("measured", help="measured, modelled or off"),
        objective: str = typer.Option("latency", help="latency or memory"),
        device: str = typer.Option(None, help="cpu or cuda"),
        batches: int = typer.Option(_LIMIT, min=1, help="calibration batches to read at most"),
        report: Path = typer.Option(None, help="write the report as HTML"),
        plan: Path = typer.Option(None, help="folder to write the plan into"),
        as_json: bool = typer.Option(False, "--json", help="print the report as JSON"),
    ) -> None:
        """Optimize a model on calibration data and print the report."""
        _optimize(
            model,
            calib,
            batches,
            {
                "config": config,
                "max_divergence": max_divergence,
                "judge": judge,
                "objective": objective,
                "device": device,
            },
            report,
            plan,
            as_json,
        )

    @app.command()  # type: ignore[untyped-decorator]
    def explain(
        model: str = model,
        calib: Path = typer.Option(None, help="where the example input comes from"),
        as_json: bool = typer.Option(False, "--json", help="print JSON"),
    ) -> None:
        """List every attention, matmul and recurrence, recognised or why not."""
        _explain(model, calib, as_json)

    @app.command()  # type: ignore[untyped-decorator]
    def passes(as_json: bool = typer.Option(False, "--json", help="print JSON")) -> None:
        """List the passes in the order in which they run."""
        _passes(as_json)

    return app


def _optimize(
    model: str,
    calib: Path | None,
    batches: int,
    options: dict[str, Any],
    report: Path | None,
    plan: Path | None,
    as_json: bool,
) -> None:
    import fxpress

    module, read = _load(model)
    data = read(_existing(calib), batches)
    optimized = fxpress.optimize(module, data, **options)
    if report is not None:
        optimized.report.to_html(report)
    if plan is not None:
        optimized.plan.save(plan)
    print(optimized.report.to_json() if as_json else optimized.report)


def _explain(model: str, calib: Path | None, as_json: bool) -> None:
    import fxpress

    module, read = _load(model)
    batch = read(_existing(calib), 1)[0]
    kwargs = batch if isinstance(batch, dict) else {}
    args = batch if isinstance(batch, tuple) else () if kwargs else (batch,)
    found = fxpress.explain(module, args, kwargs)
    print(json.dumps(found.as_dict(), indent=1) if as_json else found)


def _passes(as_json: bool) -> None:
    from fxpress.passes import all_passes
    from fxpress.pipeline import resolve_order

    rows = [
        {
            "name": kind.name,
            "phase": kind.phase,
            "after": "; ".join(f"after {name}: {why}" for name, why in kind.after.items()),
        }
        for kind in resolve_order(all_passes().values())
    ]
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    for row in rows:
        print(f"{row['name']:<18} {row['phase']:<13} {row['after'] or ''}".rstrip())


def _existing(path: Path | None) -> Path | None:
    if path is not None and not path.exists():
        raise CalibrationError(f"{path} does not exist: give a file or folder of calibration data")
    return path


Reader = Callable[[Path | None, int], list[Any]]


def _load(wish: str) -> tuple[nn.Module, Reader]:
    """The model that a `--model` names, and how calibration data is read for it."""
    kind, _, name = wish.partition(":")
    if not name:
        raise PlanError(f"--model {wish!r}: give zoo:NAME or package.module:function")
    if kind == "zoo":
        from fxpress.zoo import registry

        entry = registry.entry(name)
        return entry.build(pretrained=entry.has_weights), entry.calibration
    if kind == "hf-config":
        return _from_config(Path(name)), _read_tokens
    return _from_function(kind, name), _read_batches


def _from_function(module: str, function: str) -> nn.Module:
    sys.path.insert(0, str(Path.cwd()))
    try:
        built = getattr(importlib.import_module(module), function)()
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        raise PlanError(f"--model {module}:{function} cannot be built: {what}") from error
    finally:
        sys.path.pop(0)
    if not isinstance(built, nn.Module):
        raise PlanError(f"--model {module}:{function} gave a {type(built).__name__}, no nn.Module")
    return built.eval()


def _from_config(path: Path) -> nn.Module:
    from transformers import AutoConfig, AutoModel

    if not path.is_file():
        raise PlanError(f"--model hf-config:{path}: no such file")
    try:
        built: nn.Module = AutoModel.from_config(AutoConfig.from_pretrained(path)).eval()
    except Exception as error:
        raise PlanError(f"--model hf-config:{path}: {error}") from error
    return built


def _read_tokens(path: Path | None, limit: int) -> list[Any]:
    """Token ids for a model without a tokenizer: bytes of a text, or a fixed sequence."""
    import torch

    text = path.read_bytes() if path is not None else bytes(range(32, 127)) * 4
    ids = torch.tensor(list(text[: 64 * limit * 2]))
    rows = ids[: len(ids) // 64 * 64].view(-1, 64)
    return [{"input_ids": row[None]} for row in rows[:limit]]


def _read_batches(path: Path | None, limit: int) -> list[Any]:
    """Batches of a model of the user's own: JSON lines, each a mapping of nested numbers."""
    import torch

    if path is None:
        raise CalibrationError("give --calib: a .jsonl file, one mapping of inputs per line")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path} is no text: {error}") from error
    batches = []
    for number, line in enumerate(lines[:limit], 1):
        try:
            row = json.loads(line)
            batches.append({key: torch.tensor(value) for key, value in row.items()})
        except (ValueError, TypeError, AttributeError) as error:
            raise CalibrationError(f"{path}:{number} is no mapping of inputs: {error}") from error
    return batches
