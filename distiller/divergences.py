"""Divergences between the teacher p and the student q: pure functions of log-probabilities over outcomes.

log_p, log_q: [R, n] nats, each row's mass 1 (tails that drop the rest give less); log_p carries no gradient. Each
function returns [R] nats. Outcomes may be groups of ids inside which both sides are proportional: there every one of
these sums equals the sum over the group's members.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return (log_a.exp() * (log_a - log_b)).sum(1)


def _mixture(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """log(share · p + (1 - share) · q), 0 < share < 1."""
    return torch.logaddexp(log_p + math.log(share), log_q + math.log1p(-share))


def forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) (Hinton et al., 2015, arXiv 1503.02531)."""
    return _kl(log_p, log_q)


def reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(q || p) (MiniLLM: Gu et al., 2024, arXiv 2306.08543)."""
    return _kl(log_q, log_p)


def jsd(log_p: Tensor, log_q: Tensor, beta: float = 0.5) -> Tensor:
    """β KL(p || M) + (1 - β) KL(q || M), M = β p + (1 - β) q (GKD: Agarwal et al., 2024, arXiv 2306.13649).

    β = 0 is the forward, β = 1 the reverse KL: the limits after division by β and 1 - β, as TRL takes them.
    """
    if beta == 0:
        return _kl(log_p, log_q)
    if beta == 1:
        return _kl(log_q, log_p)
    log_m = _mixture(log_p, log_q, beta)
    return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)


def tvd(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Total variation ½ Σ |p - q|, between 0 and 1 (Wen et al., 2023, arXiv 2307.15190)."""
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(1)


def skew_kl(log_p: Tensor, log_q: Tensor, skew: float = 0.1) -> Tensor:
    """KL(p || λ p + (1 - λ) q) (DistiLLM: Ko et al., 2024, arXiv 2402.03898)."""
    return _kl(log_p, _mixture(log_p, log_q, skew))


def skew_rkl(log_p: Tensor, log_q: Tensor, skew: float = 0.1) -> Tensor:
    """KL(q || (1 - λ) p + λ q) (DistiLLM: Ko et al., 2024, arXiv 2402.03898)."""
    return _kl(log_q, _mixture(log_p, log_q, 1 - skew))


def adaptive_kl(log_p: Tensor, log_q: Tensor, head_mass: float = 0.5, rest_columns: int = 1) -> Tensor:
    """w KL(p || q) + (1 - w) KL(q || p), w the head's share of Σ |p - q| (AKL: Wu et al., 2024, arXiv 2404.02657).

    The head is the smallest set of ids with teacher mass >= head_mass; w has no gradient. The last `rest_columns`
    are groups of ids less probable than the others: where the head reaches into one, it takes that part of its gap.
    """
    with torch.no_grad():
        p = log_p.exp()
        gap = (p - log_q.exp()).abs()
        single = p.shape[1] - rest_columns
        p_single, order = p[:, :single].sort(1, descending=True)
        p = torch.cat([p_single, p[:, single:]], dim=1)
        gap = torch.cat([gap[:, :single].gather(1, order), gap[:, single:]], dim=1)
        missing = head_mass - (p.cumsum(1) - p)  # what the head lacks before each outcome
        part = torch.cat([(missing[:, :single] > 0).to(p.dtype), (missing / p)[:, single:].clamp(0, 1)], dim=1)
        head, total = (part * gap).sum(1), gap.sum(1)
        share = torch.where(total > 0, head / total, 0.5)
    return share * _kl(log_p, log_q) + (1 - share) * _kl(log_q, log_p)


def dkd(log_p: Tensor, log_q: Tensor, target: Tensor, alpha: float = 1.0, beta: float = 1.0) -> Tensor:
    """α TCKD + β NCKD (Decoupled KD: Zhao et al., 2022, arXiv 2203.08679).

    target: [R] the label's column. TCKD is the KL between (label, everything else), NCKD the one among the others.
    """
    column = target[:, None]

    def split(log_x: Tensor) -> tuple[Tensor, Tensor]:
        others = log_x.scatter(1, column, -math.inf)
        log_others = others.logsumexp(1, keepdim=True)
        # 0 instead of -inf in the label's own column: both sides agree there, and exp(-inf) weighs it with nothing.
        return torch.cat([log_x.gather(1, column), log_others], dim=1), others - log_others

    binary_p, others_p = split(log_p)
    binary_q, others_q = split(log_q)
    others_q = others_q.scatter(1, column, 0.0)
    inside = others_p.exp() * (others_p.scatter(1, column, 0.0) - others_q)
    return alpha * _kl(binary_p, binary_q) + beta * inside.sum(1)


def ab_divergence(log_p_power: Tensor, log_q_power: Tensor, alpha: float = 0.2, beta: float = 0.7) -> Tensor:
    """-1/(αβ) Σ [p^α q^β - α/(α+β) p^(α+β) - β/(α+β) q^(α+β)] (ABKD: Wang et al., 2025, arXiv 2505.04560).

    Takes log Σ p^s and log Σ q^s of each outcome, s = α + β: for a single id s log p and s log q. In a group where p
    and q are proportional Σ p^α q^β = (Σ p^s)^(α/s) (Σ q^s)^(β/s). α, β > 0.
    """
    power = alpha + beta
    cross = ((alpha * log_p_power + beta * log_q_power) / power).exp()
    own = (alpha * log_p_power.exp() + beta * log_q_power.exp()) / power
    return (own - cross).sum(1) / (alpha * beta)
