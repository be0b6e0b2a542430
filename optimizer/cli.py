"""The command line: one function per verb.

Results go to standard output, progress to standard error. Bad input ends with exit code 2 and one
clear line, a check that fails with 1; a traceback is a bug (`FXPRESS_DEBUG=1` shows where an error
comes from).
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import fxpress
from fxpress import cli_bench, cli_inputs, cli_inspect, cli_kernels, cli_zoo, environment
from fxpress.bisection import bisect as find_first_bad
from fxpress.cli_inputs import Subject
from fxpress.cli_tables import show, table
from fxpress.errors import FxpressError, PlanError
from fxpress.lowered import lower

try:
    import typer
except ImportError:  # nothing but the command line imports this module
    sys.exit("the command line needs typer and rich: pip install 'fxpress[cli]'")

__all__ = ["main"]

_BATCHES = 64  # calibration batches that are read from a file
_PROBED = 2  # batches that `inspect` calibrates on

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Optimize trained models.")
zoo_app = typer.Typer(no_args_is_help=True, help="Models to try fxpress on.")
app.add_typer(zoo_app, name="zoo")

_MODEL = "zoo:NAME, package.module:function, file.py:function or hf-config:FILE"
Json = Annotated[bool, typer.Option("--json", help="print JSON, and nothing else")]
Model = Annotated[str, typer.Option("--model", help=_MODEL)]
AnyModel = Annotated[str | None, typer.Option("--model", help=_MODEL)]
Calib = Annotated[
    Path | None,
    typer.Option(help="texts (.txt, .jsonl), arrays (.json, .npy, .safetensors), or recordings"),
]
Config = Annotated[Path | None, typer.Option(help="settings of passes, a YAML file")]
SavedPlan = Annotated[Path | None, typer.Option(help="folder of a plan to apply, without data")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda")]
Threads = Annotated[int | None, typer.Option(min=1, help="threads of the CPU")]
Artifact = Annotated[Path, typer.Argument(help="what `optimize --out` wrote")]
AnyArtifact = Annotated[Path | None, typer.Argument(help="what `optimize --out` wrote")]
TextFolder = Annotated[
    Path | None, typer.Option(help="folder with a file for each split, for the recipe's data")
]
Judge = Annotated[str, typer.Option(help="measured, modelled or off")]
Budget = Annotated[float | None, typer.Option(help="budget: mean divergence of outputs")]
Batches = Annotated[int, typer.Option(min=1, help="batches to read at most")]
Seed = Annotated[int, typer.Option(help="of everything random")]
Out = Annotated[Path | None, typer.Option(help="write the artifact here")]
Report = Annotated[Path | None, typer.Option(help="write the report here, as HTML")]
PlanFolder = Annotated[Path | None, typer.Option(help="folder to write the plan into")]
Html = Annotated[Path | None, typer.Option(help="write a page here")]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; exits with 0, with 1 for a failed check, with 2 on bad input."""
    command = typer.main.get_command(app)
    arguments = list(argv) if argv is not None else None
    try:
        status = command.main(arguments, prog_name="fxpress", standalone_mode=False)
    except typer.Abort:
        sys.exit(130)  # interrupted
    except BrokenPipeError:
        # The reader of the output has left; Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
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


# --- verbs ----------------------------------------------------------------------------------


@app.command()
def optimize(
    model: Model,
    calib: Calib = None,
    validation: Annotated[Path | None, typer.Option(help="data to judge on, as --calib")] = None,
    plan: SavedPlan = None,
    config: Config = None,
    objective: Annotated[str, typer.Option(help="latency or memory")] = "latency",
    judge: Judge = "measured",
    max_divergence: Budget = None,
    validation_fn: Annotated[
        str | None, typer.Option(help="module:function that scores a model, higher is better")
    ] = None,
    max_drop: Annotated[float, typer.Option(help="budget of --validation-fn, absolute")] = 0.01,
    batches: Batches = _BATCHES,
    device: Device = None,
    threads: Threads = None,
    seed: Seed = 0,
    out: Out = None,
    report: Report = None,
    save_plan: PlanFolder = None,
    as_json: Json = False,
) -> None:
    """Optimize a model on calibration data and print the report."""
    _use_threads(threads)
    subject = _subject(model)
    optimized = fxpress.optimize(
        subject.module,
        None if plan is not None and calib is None else subject.read(calib, batches),
        validation_data=subject.read(validation, batches) if validation is not None else None,
        plan=_plan(plan),
        config=config,
        objective=objective,
        judge=judge,
        max_divergence=max_divergence,
        validation_fn=cli_inputs.named(validation_fn, "--validation-fn") if validation_fn else None,
        max_drop=max_drop,
        device=device,
        seed=seed,
    )
    if report is not None:
        optimized.report.to_html(report)
    if save_plan is not None:
        optimized.plan.save(save_plan)
    if out is not None:
        optimized.save(out)
    show(optimized.report.as_dict(), optimized.report, as_json)


@app.command()
def explain(model: Model, calib: Calib = None, html: Html = None, as_json: Json = False) -> None:
    """List every attention, matmul and recurrence, recognised or why not, what it could gain."""
    subject = _subject(model)
    args, kwargs = cli_inputs.as_call(_first_batch(subject, calib))
    found = fxpress.explain(subject.module, args, kwargs)
    if html is not None:
        found.to_html(html)
    show(found.as_dict(), found, as_json)


@app.command()
def inspect(
    artifact: AnyArtifact = None,
    model: AnyModel = None,
    calib: Calib = None,
    plan: SavedPlan = None,
    config: Config = None,
    pass_name: Annotated[str | None, typer.Option("--pass", help="only this pass")] = None,
    graph: Annotated[str | None, typer.Option(help="before, after or diff")] = None,
    masks: Annotated[bool, typer.Option("--masks", help="the compiled masks")] = False,
    kernels: Annotated[bool, typer.Option("--kernels", help="how each site runs")] = False,
    ledger: Annotated[bool, typer.Option("--ledger", help="figures of each site")] = False,
    device: Annotated[str | None, typer.Option(help="show kernels for cpu or cuda")] = None,
    as_json: Json = False,
) -> None:
    """Show what each pass did: of an artifact, or of a model that passes are run on now.

    With --model, the plan of the artifact (or --plan, or --config) is applied pass by pass; without
    any of them only the exact passes do something.
    """
    optimized = _applied(artifact, model, calib, plan, config)
    wish = cli_inspect.Wish(pass_name, graph, masks, kernels, ledger, _kind(device))
    facts = cli_inspect.inspect(optimized, wish)
    show(facts, cli_inspect.render(facts), as_json)


@app.command()
def bench(
    artifact: Artifact,
    against: Annotated[str | None, typer.Option(help=f"the original: {_MODEL}")] = None,
    rounds: Annotated[int, typer.Option(min=3, help="rounds at most")] = 15,
    seconds: Annotated[float, typer.Option(help="of each call, at most")] = 20.0,
    threads: Threads = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Time an artifact on the example calls of its plan, beside the model that it was made from."""
    _use_threads(threads)
    loaded = fxpress.load(artifact, device=device)
    others = {}
    if against is not None:
        original = _subject(against).module
        exact = fxpress.Plan(calls=loaded.plan.calls)
        others["original"] = original if device is None else original.to(device)
        others["dense"] = fxpress.optimize(others["original"], None, plan=exact)
    facts = cli_bench.measure(loaded, others, rounds, seconds)
    show(facts, cli_bench.render(facts), as_json)


@app.command()
def passes(as_json: Json = False) -> None:
    """List the passes in the order in which they run; with --json also their settings."""
    from fxpress.passes import all_passes
    from fxpress.pipeline import resolve_order

    facts = [_pass(kind) for kind in resolve_order(all_passes().values())]
    rows = [["pass", "phase", "exactness"]]
    rows += [[entry["name"], entry["phase"], entry["exactness"]] for entry in facts]
    order = [f"{e['name']} after {n}: {why}" for e in facts for n, why in e["after"].items()]
    show(facts, "\n".join([table(rows), "", *order]), as_json)


@app.command()
def kernels(
    artifact: AnyArtifact = None,
    site: Annotated[str | None, typer.Option(help="of this site only")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; it need not be here")] = None,
    dtype: Annotated[str | None, typer.Option(help="as if in this dtype")] = None,
    as_json: Json = False,
) -> None:
    """List the lowerings there are; of an artifact, the generated source of each site."""
    if dtype is not None and dtype not in cli_kernels.DTYPES:
        raise PlanError(f"--dtype is {dtype!r}: give one of {', '.join(cli_kernels.DTYPES)}")
    if artifact is None:
        found = cli_kernels.lowerings(_kind(device), dtype)
        show(found, cli_kernels.render_lowerings(found), as_json)
        return
    captured = fxpress.load(artifact).captured
    lowered = lower(captured, _kind(device), cli_kernels.DTYPES[dtype] if dtype else None)
    chosen = cli_kernels.of_site(lowered, site)
    show([vars(low) for low in chosen], cli_kernels.render_sites(chosen), as_json)


@app.command()
def bisect(
    script: Annotated[Path, typer.Argument(help="defines model(), calib_data(), check(optimized)")],
    as_json: Json = False,
) -> None:
    """Find the first rewrite that breaks a model, and show the graph around it before and after.

    Exit code 1 where there is none to be found.
    """
    verdict = find_first_bad(
        cli_inputs.import_file(script), fxpress.optimize, lambda line: print(line, file=sys.stderr)
    )
    show(verdict.as_dict(), verdict, as_json)
    raise typer.Exit(0 if verdict.culprit else 1)


@zoo_app.command("list")
def zoo_list(
    pattern: Annotated[str, typer.Argument(help="such as 'rum*'")] = "*", as_json: Json = False
) -> None:
    """List the models whose name matches a pattern."""
    from fxpress.zoo import registry

    found = [_entry(registry.entry(name)) for name in registry.list_models(pattern)]
    if not found:
        raise PlanError(f"no model of the zoo matches {pattern!r}: `fxpress zoo list` has all")
    rows = [[e["name"], "pretrained" if e["pretrained"] else "-", e["description"]] for e in found]
    show(found, table([["model", "weights", "description"], *rows]), as_json)


@zoo_app.command("show")
def zoo_show(
    name: Annotated[str, typer.Argument(help="one of `fxpress zoo list`")], as_json: Json = False
) -> None:
    """Show where a model comes from, and what it scores if the zoo has trained it."""
    from fxpress.zoo import registry

    facts = _entry(registry.entry(name))
    text = "\n".join(f"{key:<12} {value}" for key, value in facts.items())
    if card := _card(name):
        text += f"\n\n{cli_zoo.render_scores(card)}"
    show(facts | card, text, as_json)


@zoo_app.command("train")
def zoo_train(
    name: Annotated[str, typer.Argument(help="a recipe, such as austen-lstm")],
    reduced: Annotated[bool, typer.Option("--reduced", help="minutes on two CPU cores")] = False,
    data: TextFolder = None,
    out: Annotated[Path, typer.Option(help="folder of checkpoint, weights, card")] = Path("runs"),
    device: Device = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Train by a recipe, on from its checkpoint where it was killed; `torchrun` shares the work."""
    from fxpress.zoo import recipe, trained

    _use_threads(threads)
    plan = recipe.load(name, reduced=reduced)
    card = trained.train(
        plan, out, data=data, device=_kind(device) or "cpu", progress=cli_zoo.progress(plan)
    )
    if card:
        show(card, cli_zoo.render_scores(card), as_json)


@zoo_app.command("eval")
def zoo_eval(
    name: Annotated[str, typer.Argument(help="a recipe, such as austen-lstm")],
    weights: Annotated[Path | None, typer.Option(help="folder that `train` wrote")] = None,
    data: TextFolder = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Score trained weights, those shipped or those of a folder, on the test data."""
    from fxpress.zoo import trained

    _use_threads(threads)
    found = trained.evaluate(name, weights or trained.SHIPPED, data)
    show(found, cli_zoo.render_scores(found), as_json)


@zoo_app.command("optimize")
def zoo_optimize(
    name: Annotated[str, typer.Argument(help="one of `fxpress zoo list`")],
    calib: Calib = None,
    config: Config = None,
    judge: Judge = "measured",
    max_divergence: Budget = None,
    batches: Batches = _BATCHES,
    device: Device = None,
    threads: Threads = None,
    seed: Seed = 0,
    out: Out = None,
    report: Report = None,
    save_plan: PlanFolder = None,
    as_json: Json = False,
) -> None:
    """Optimize a model of the zoo, on its own sample if no --calib is given.

    As `fxpress optimize --model zoo:NAME`, which has more options.
    """
    optimize(
        f"zoo:{name}",
        calib=calib,
        config=config,
        judge=judge,
        max_divergence=max_divergence,
        batches=batches,
        device=device,
        threads=threads,
        seed=seed,
        out=out,
        report=report,
        save_plan=save_plan,
        as_json=as_json,
    )


# --- what verbs share -----------------------------------------------------------------------


def _subject(wish: str) -> Subject:
    """The model that a `--model` names."""
    kind, _, name = wish.partition(":")
    if not name:
        raise PlanError(f"--model {wish!r}: give {_MODEL}")
    if kind == "zoo":
        from fxpress.zoo import registry

        entry = registry.entry(name)
        return Subject(entry.build(pretrained=entry.has_weights), entry.calibration)
    if kind == "hf-config":
        return cli_inputs.from_config(Path(name))
    return cli_inputs.from_function(kind, name)


def _plan(folder: Path | None) -> fxpress.Plan | None:
    return None if folder is None else fxpress.Plan.load(folder)


def _first_batch(subject: Subject, calib: Path | None) -> Any:
    batches = subject.read(calib, 1)
    if not batches:
        raise PlanError(f"--calib {calib} is empty: one batch is needed")
    return batches[0]


def _applied(
    artifact: Path | None,
    model: str | None,
    calib: Path | None,
    plan: Path | None,
    config: Path | None,
) -> fxpress.OptimizedModule:
    """An artifact, or a model with its plan (or another) applied and nothing judged."""
    if model is None:
        if artifact is None:
            raise PlanError("give an artifact, or --model")
        return fxpress.load(artifact)
    subject = _subject(model)
    decided = _plan(plan)
    if artifact is not None:
        decided = fxpress.load(artifact).plan
    data = None if decided is not None else subject.read(calib, _PROBED)
    return fxpress.optimize(subject.module, data, plan=decided, config=config, judge="off")


def _kind(device: str | None) -> str | None:
    """The type of a device that need not be here."""
    if device not in (None, "cpu", "cuda"):
        raise PlanError(f"--device is {device!r}: give cpu or cuda")
    return device


def _use_threads(count: int | None) -> None:
    if count is not None:
        import torch

        torch.set_num_threads(count)


def _pass(kind: type[fxpress.Pass]) -> dict[str, Any]:
    fields = dataclasses.fields(kind.config_type) if kind.config_type is not None else ()
    return {
        "name": kind.name,
        "phase": kind.phase,
        "exactness": kind.exactness.name,
        "after": dict(kind.after),
        "settings": {f.name: f.default for f in fields},
    }


def _entry(entry: Any) -> dict[str, Any]:
    return {
        "name": entry.name,
        "description": entry.description,
        "license": entry.license,
        "source": entry.source,
        "pretrained": entry.has_weights,
    }


def _card(name: str) -> dict[str, Any]:
    """The card of a model of the zoo whose trained weights ship; empty for another."""
    from fxpress.zoo import trained

    return trained.load_card(name) if (trained.SHIPPED / f"{name}.json").is_file() else {}
