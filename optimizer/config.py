"""Configuration: one frozen dataclass per pass, with overrides by module pattern.

Plain dictionaries (and so YAML) are accepted everywhere; every name in them is checked against
the passes and the model before any work starts.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from fxpress.errors import PlanError
from fxpress.recover import RecoverConfig
from fxpress.rewrite import Pass

__all__ = ["OptimizeConfig", "nearest"]


def nearest(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` or the list of what there is, for error messages."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"there are {', '.join(names)}"


@dataclass(frozen=True)
class OptimizeConfig:
    """Settings of a run.

    Attributes:
        passes: settings by pass name: a mapping of fields, or False to leave the pass out.
        overrides: module pattern -> `{"enable": False}`, or settings by pass name.
        judge_seconds: how long the judge may take in all.
        recover: settings of recovery, or None for none.
    """

    passes: Mapping[str, Any] = field(default_factory=dict)
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    judge_seconds: float = 150.0
    recover: RecoverConfig | None = field(default_factory=RecoverConfig)

    @staticmethod
    def of(wish: Any, passes: Mapping[str, type[Pass]], model: nn.Module) -> OptimizeConfig:
        """Read a configuration and check every name and value in it.

        Args:
            wish: None, an `OptimizeConfig`, a mapping, or the path of a YAML file.
            passes: the passes that there are.
            model: its module paths are what patterns are matched against.

        Raises:
            PlanError: an unknown pass, setting or module pattern, or a value out of range.
        """
        config = wish if isinstance(wish, OptimizeConfig) else _parse(_mapping(wish), passes)
        paths = [path for path, _ in model.named_modules()]
        for name in config.passes:
            if name not in passes:
                raise PlanError(f"unknown pass {name!r} in config: {nearest(name, passes)}")
            config.settings(name, passes[name])
        for pattern, override in config.overrides.items():
            if not fnmatch.filter(paths, pattern):
                raise PlanError(f"config: no module matches {pattern!r}: {nearest(pattern, paths)}")
            _check_override(pattern, override, passes)
        return config

    def enables(self, name: str) -> bool:
        """Whether a pass runs at all."""
        wish = self.passes.get(name, True)
        return not (wish is False or (isinstance(wish, Mapping) and wish.get("enable") is False))

    def enables_at(self, name: str, path: str) -> bool:
        """Whether a pass may rewrite something in the module at `path`."""
        for pattern, override in self.overrides.items():
            if fnmatch.fnmatch(path, pattern):
                specific = override.get(name, override)
                if isinstance(specific, Mapping) and specific.get("enable") is False:
                    return False
        return True

    def settings(self, name: str, kind: type[Pass], path: str | None = None) -> Any:
        """The settings dataclass of a pass, with the overrides for a module path."""
        wish = self.passes.get(name)
        fields = dict(wish) if isinstance(wish, Mapping) else {}
        if path is not None:
            for pattern, override in self.overrides.items():
                if fnmatch.fnmatch(path, pattern) and isinstance(override.get(name), Mapping):
                    fields |= override[name]
        fields.pop("enable", None)
        if kind.config_type is None:
            if fields:
                raise PlanError(f"config: {name} has no settings, but was given {sorted(fields)}")
            return None
        return _settings(name, kind.config_type, fields)


def _mapping(wish: Any) -> Mapping[str, Any]:
    if wish is None:
        return {}
    if isinstance(wish, Mapping):
        return wish
    if isinstance(wish, (str, Path)):
        import yaml

        try:
            loaded = yaml.safe_load(Path(wish).read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise PlanError(f"config {wish}: {' '.join(str(error).split())}") from error
        return _mapping(loaded)
    raise PlanError(f"config is a {type(wish).__name__}: give a mapping or an OptimizeConfig")


def _parse(wish: Mapping[str, Any], passes: Mapping[str, type[Pass]]) -> OptimizeConfig:
    settings = dict(wish)
    seconds = settings.pop("judge_seconds", OptimizeConfig.judge_seconds)
    if not isinstance(seconds, (int, float)) or seconds <= 0:
        raise PlanError(f"config: judge_seconds is {seconds!r}: give a positive number")
    recover = _recover(settings.pop("recover", True))
    chosen: dict[str, Any] = {}
    overrides: dict[str, Mapping[str, Any]] = {}
    for key, value in settings.items():
        is_pattern = key not in passes and any(mark in key for mark in ".*?[")
        if is_pattern:
            overrides[key] = value
        else:
            chosen[key] = dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value  # type: ignore[arg-type]
    return OptimizeConfig(chosen, overrides, float(seconds), recover)


def _recover(wish: Any) -> RecoverConfig | None:
    if wish is False or isinstance(wish, RecoverConfig):
        return wish or None
    if wish is True:
        return RecoverConfig()
    if not isinstance(wish, Mapping):
        raise PlanError(f"config: recover is {wish!r}: give True, False or its settings")
    settings: RecoverConfig = _settings("recover", RecoverConfig, wish)
    return settings


def _settings(name: str, kind: type, fields: Mapping[str, Any]) -> Any:
    known = [f.name for f in dataclasses.fields(kind)]
    for key in fields:
        if key not in known:
            raise PlanError(f"config: {name} has no setting {key!r}: {nearest(key, known)}")
    return kind(**fields)


def _check_override(pattern: str, override: Any, passes: Mapping[str, type[Pass]]) -> None:
    if not isinstance(override, Mapping):
        raise PlanError(f"config: {pattern!r} needs a mapping, such as {{'enable': False}}")
    for name, value in override.items():
        if name == "enable":
            continue
        if name not in passes:
            raise PlanError(f"config: {pattern!r} names {name!r}: {nearest(name, passes)}")
        if isinstance(value, Mapping) and (kind := passes[name].config_type) is not None:
            _settings(name, kind, {k: v for k, v in value.items() if k != "enable"})
