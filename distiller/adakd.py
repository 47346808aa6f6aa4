"""AdaKD: token-adaptive distillation over any base loss (Xie et al., 2025, arXiv 2510.11615).

LATF keeps the hardest tokens, more or fewer as the loss stalls or falls; IDTS gives hard tokens a lower temperature
and easy ones a higher one. Both rank tokens against all others of the micro-batch, so they need a pass of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from storage_schemas.errors import RequestError


def hellinger(log_p: Tensor, log_q: Tensor) -> Tensor:
    """[R] sqrt(1 - Σ √(p q)), between 0 and 1; written as sqrt(½ Σ (√p - √q)²), which float32 can tell from 0."""
    return ((0.5 * log_p).exp() - (0.5 * log_q).exp()).square().sum(1).mul(0.5).sqrt()


@dataclass
class AdaKD:
    """Which rows count, and at what temperature.

    latf, idts: loss-driven filtering and inverse-difficulty temperature, each on or off. strength: c of
    τ = τ_base exp(-c ŝ) (the authors take .5, and .3 on-policy). momentum, tolerance, rate: β, ε, δ of the filter.
    warmup: the part of training through which every token is kept. min_keep: the fraction never gone below.

    State: the running loss, the reference it is compared with, and the fraction kept; moved once per optimiser step.
    """

    latf: bool = True
    idts: bool = True
    strength: float = 0.5
    momentum: float = 0.99
    tolerance: float = 0.05
    rate: float = 0.05
    warmup: float = 0.05
    min_keep: float = 0.1
    keep: float = field(init=False, default=1.0)
    average: float | None = field(init=False, default=None)
    reference: float | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        for name in ("momentum", "tolerance", "rate", "warmup"):
            if not 0 <= getattr(self, name) < 1:
                raise RequestError(f"adakd expects 0 <= {name} < 1, got {getattr(self, name)}")
        if not 0 < self.min_keep <= 1:
            raise RequestError(f"adakd expects 0 < min_keep <= 1, got {self.min_keep}")
        if self.strength < 0:
            raise RequestError(f"adakd expects strength >= 0, got {self.strength}")
        if not (self.latf or self.idts):
            raise RequestError("adakd without latf and idts is its base: choose the base objective itself")

    def plan(self, difficulty: Tensor, temperature: float) -> dict[str, Tensor]:
        """[N] weight and temperature of each row from its difficulty, ranked against all rows of all ranks.

        The weights make a mean over all rows the mean over those kept.
        """
        dtype, difficulty = difficulty.dtype, difficulty.double()  # one dtype on every rank
        everywhere = gather_rows(difficulty)
        total = len(everywhere)
        threshold = everywhere.new_zeros(())
        if self.latf and self.keep < 1:
            count = max(1, round(self.keep * total))
            threshold = everywhere.topk(count).values[-1]
        kept = everywhere >= threshold  # tied rows are kept together
        weight = (difficulty >= threshold) * (total / kept.sum(dtype=difficulty.dtype))
        if not self.idts:
            return {"weight": weight.to(dtype)}
        tiny = torch.finfo(difficulty.dtype).tiny
        ranked = everywhere.masked_fill(~kept, torch.nan).nanmedian().clamp(min=tiny)
        relative = (difficulty.clamp(min=tiny) / ranked).log().tanh()
        return {
            "weight": weight.to(dtype),
            "temperature": temperature * (-self.strength * relative).exp().to(dtype),
        }

    def update(self, mean_loss: float, step: int, total_steps: int) -> None:
        """Move the fraction kept. mean_loss: over all rows, before selection. step: optimiser steps done before."""
        average = mean_loss if self.average is None else self.average
        self.average = average = self.momentum * average + (1 - self.momentum) * mean_loss
        if step < self.warmup * total_steps:
            return
        if self.reference is None:
            self.reference = average
        elif average < self.reference * (1 - self.tolerance):
            self.keep, self.reference = max(self.min_keep, self.keep * (1 - self.rate)), average
        elif average > self.reference * (1 + self.tolerance):
            self.keep, self.reference = min(1.0, self.keep * (1 + self.rate)), average

    def metrics(self) -> dict[str, float]:
        return {"keep": self.keep} if self.latf else {}

    def state_dict(self) -> dict[str, Any]:
        return {"keep": self.keep, "average": self.average, "reference": self.reference}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.keep = float(state["keep"])
        self.average = None if state["average"] is None else float(state["average"])
        self.reference = None if state["reference"] is None else float(state["reference"])


def gather_rows(values: Tensor) -> Tensor:
    """[N_r] of each rank → the values of all ranks, in the order of ranks. Every rank must call it, rows or not."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return values
    count = torch.tensor([len(values)], device=values.device)
    counts = [torch.zeros_like(count) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, count)
    sizes = [int(size) for size in counts]
    padded = torch.nn.functional.pad(values, (0, max(sizes) - len(values)))
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
