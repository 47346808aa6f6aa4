"""Every objective on full distributions, written down naively in probabilities and float64: what the head must equal.

p, z: [N, V] the teacher's probabilities (no gradient) and the student's logits; labels: [N]. Returns [N] nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _entropic(a: Tensor, b: Tensor) -> Tensor:
    """Σ a log(a/b), 0 where a is 0."""
    safe = torch.where(a > 0, a, 1.0)
    return torch.where(a > 0, a * (safe.log() - b.clamp(min=1e-300).log()), 0.0).sum(1)


def at_temperature(p: Tensor, z: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
    """Both sides' probabilities; temperature is a number or [N, 1]."""
    powered = p ** (1 / temperature)
    return powered / powered.sum(1, keepdim=True), (z / temperature).softmax(1)


def forward_kl(p: Tensor, q: Tensor, labels: Tensor) -> Tensor:
    return _entropic(p, q)


def reverse_kl(p: Tensor, q: Tensor, labels: Tensor) -> Tensor:
    return _entropic(q, p)


def jsd(p: Tensor, q: Tensor, labels: Tensor, beta: float = 0.5) -> Tensor:
    m = beta * p + (1 - beta) * q
    return beta * _entropic(p, m) + (1 - beta) * _entropic(q, m)


def tvd(p: Tensor, q: Tensor, labels: Tensor) -> Tensor:
    return (p - q).abs().sum(1) / 2


def skew_kl(p: Tensor, q: Tensor, labels: Tensor, skew: float = 0.1) -> Tensor:
    return _entropic(p, skew * p + (1 - skew) * q)


def skew_rkl(p: Tensor, q: Tensor, labels: Tensor, skew: float = 0.1) -> Tensor:
    return _entropic(q, (1 - skew) * p + skew * q)


def adaptive_kl(p: Tensor, q: Tensor, labels: Tensor, head_mass: float = 0.5) -> Tensor:
    shares = []
    for p_row, q_row in zip(p.tolist(), q.detach().tolist(), strict=True):
        gaps, reached, head = [], 0.0, 0.0
        for value, other in sorted(zip(p_row, q_row, strict=True), reverse=True):
            gaps.append(abs(value - other))
            head += gaps[-1] if reached < head_mass else 0.0
            reached += value
        shares.append(head / sum(gaps))
    share = torch.tensor(shares, dtype=p.dtype)
    return share * _entropic(p, q) + (1 - share) * _entropic(q, p)


def dkd(p: Tensor, q: Tensor, labels: Tensor, alpha: float = 1.0, beta: float = 1.0) -> Tensor:
    column = labels[:, None]
    others = torch.ones_like(p).scatter(1, column, 0.0)
    p_label, q_label = p.gather(1, column), q.gather(1, column)
    p_other, q_other = (p * others).sum(1, keepdim=True), (q * others).sum(1, keepdim=True)
    target = _entropic(torch.cat([p_label, p_other], 1), torch.cat([q_label, q_other], 1))
    return alpha * target + beta * _entropic(p * others / p_other, q * others / q_other)


def abkd(p: Tensor, q: Tensor, labels: Tensor, alpha: float = 0.2, beta: float = 0.7) -> Tensor:
    power = alpha + beta
    inside = p**alpha * q**beta - alpha / power * p**power - beta / power * q**power
    return -inside.sum(1) / (alpha * beta)


def taid(p: Tensor, q: Tensor, labels: Tensor, t: float = 0.4) -> Tensor:
    mixed = q.detach() ** (1 - t) * p**t
    return _entropic(mixed / mixed.sum(1, keepdim=True), q)


def taid_cross_entropy(p: Tensor, q: Tensor, labels: Tensor, t: float = 0.4) -> Tensor:
    mixed = q.detach() ** (1 - t) * p**t
    return -(mixed / mixed.sum(1, keepdim=True) * q.log()).sum(1)


DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    "abkd": abkd,
    "adaptive_kl": adaptive_kl,
    "dkd": dkd,
    "forward_kl": forward_kl,
    "jsd": jsd,
    "reverse_kl": reverse_kl,
    "skew_kl": skew_kl,
    "skew_rkl": skew_rkl,
    "taid": taid,
    "tvd": tvd,
}


def dense_loss(
    name: str, p: Tensor, z: Tensor, labels: Tensor, temperature: float | Tensor = 1.0, **options: Any
) -> Tensor:
    """[N] the objective `name` at a temperature, times its square."""
    if name == "cross_entropy":
        return -z.log_softmax(1).gather(1, labels[:, None])[:, 0]
    if name == "ctkd":
        name, temperature = "forward_kl", temperature * (1 + 20 / (1 + math.exp(-1)))
    if name == "adakd":
        base = options.pop("base", "forward_kl")
        weight, temperature = adakd_plan(p, z.softmax(1).detach(), temperature, **options)
        return weight * dense_loss(base, p, z, labels, temperature)
    p, q = at_temperature(p, z, temperature)
    squared = temperature.squeeze(1) ** 2 if isinstance(temperature, Tensor) else temperature**2
    return DIVERGENCES[name](p, q, labels, **options) * squared


def adakd_plan(
    p: Tensor, q: Tensor, temperature: float | Tensor, keep: float = 1.0, strength: float = 0.5
) -> tuple[Tensor, Tensor]:
    """[N] weights and [N, 1] temperatures from the Hellinger distance."""
    difficulty = (1 - (p * q).sqrt().sum(1)).sqrt()
    order = difficulty.argsort(descending=True)
    count = max(1, round(keep * len(p)))
    chosen = order[:count]
    weight = torch.zeros_like(difficulty)
    weight[chosen] = len(p) / count
    median = difficulty[chosen].sort().values[(count - 1) // 2]
    relative = torch.tanh((difficulty / median).log())
    return weight, temperature * torch.exp(-strength * relative)[:, None]


def written_out(
    p: Tensor, top_ids: Tensor, q: Tensor, tail: str = "student", cap: int = 0, label: Tensor | None = None
) -> Tensor:
    """[N, V] the teacher that the tail assumes, where only `top_ids` (and perhaps the label) of p are known."""
    known = torch.zeros_like(p, dtype=torch.bool).scatter(1, top_ids, True)
    if label is not None:
        known.scatter_(1, label[:, None], True)
    mass = (p * ~known).sum(1, keepdim=True)
    if tail == "uniform":
        rest = mass * (~known) / (~known).sum(1, keepdim=True).clamp(min=1)
        return torch.where(known, p, rest)
    stored = torch.zeros_like(known).scatter(1, top_ids, True)
    candidates = q.detach().masked_fill(stored, -1.0).topk(cap, dim=1).indices  # only these can be capped
    q = q.detach() * ~known
    limit = torch.full_like(p, math.inf)
    limit.scatter_(1, candidates, p.gather(1, top_ids).amin(1, keepdim=True).expand(-1, cap))
    low, high = torch.full_like(mass, -300.0), torch.full_like(mass, 300.0)
    for _ in range(100):  # bisect log λ of min(limit, λ q) until the mass is right
        middle = (low + high) / 2
        small = torch.minimum(limit, middle.exp() * q).sum(1, keepdim=True) < mass
        low, high = torch.where(small, middle, low), torch.where(small, high, middle)
    return torch.where(known, p, torch.minimum(limit, high.exp() * q))
