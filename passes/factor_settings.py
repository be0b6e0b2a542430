"""Settings of `factor-vvma`, read by the pass and by what chooses its forms."""

from __future__ import annotations

from dataclasses import dataclass

from fxpress.errors import PlanError

__all__ = ["FactorVvmaConfig"]

_CHOICES = {
    "form": ("auto", "vvma", "low-rank"),
    "share": ("matrix", "layer", "row"),
    "moment": ("diagonal", "full", "none"),
}


@dataclass(frozen=True)
class FactorVvmaConfig:
    """Settings.

    Attributes:
        form: `"vvma"`, `"low-rank"`, or `"auto"`: whichever loses less at equal cost.
        block: k of the vector-vector-matrix form; None: 32, 64 or 128, whichever loses least.
        terms: r of it. Stated (or `rank`): that form everywhere; else as far as the budget allows.
        rank: of the low-rank form.
        share: which tiles share a core: those of a `"matrix"`, of all matrices of a `"layer"` that
            read one input, or of a `"row"` of tiles.
        moment: second moment of the inputs that weights the fit: its `"diagonal"`, `"full"`
            (n x n numbers per site), or `"none"`.
        max_error: relative error of a map's outputs up to which a form is looked at in a search.
    """

    form: str = "auto"
    block: int | None = None
    terms: int | None = None
    rank: int | None = None
    share: str = "matrix"
    moment: str = "diagonal"
    max_error: float = 0.5

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise PlanError(
                    f"factor-vvma: {name} is {getattr(self, name)!r}: give one of {allowed}"
                )
        for name in ("block", "terms", "rank"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise PlanError(f"factor-vvma: {name} is {value!r}: give a whole number >= 1")
        if self.terms is not None and self.rank is not None:
            raise PlanError("factor-vvma: terms= and rank= are of different forms: give one")
        if self.terms is not None and self.terms > (self.block or 32):
            raise PlanError(
                f"factor-vvma: terms is {self.terms}, more than block = {self.block or 32}, "
                "where the form is exact already"
            )
        if (self.terms is not None and self.form == "low-rank") or (
            self.rank is not None and self.form == "vvma"
        ):
            raise PlanError(f"factor-vvma: form={self.form!r} does not take the other form's size")

    @property
    def is_stated(self) -> bool:
        """Whether one form is stated, rather than a search."""
        return self.terms is not None or self.rank is not None
