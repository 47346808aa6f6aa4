"""What to assume about the teacher's probabilities that were not stored: four choices behind one interface."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from distiller.outcomes import FLOOR, Known, Powers, Tail, is_one, scale
from distiller.rows import StudentReduction


@dataclass
class StudentTail(Tail):
    """Off the stored ids p_j = λ q_j with the student's present q, λ = m / Q: exact where the student is right there.

    kappa: correct for how much p/q varies inside the rest. log(p/q) is taken as normal with variance 2κ, so that
    Σ_rest p^t q^(1-t) = m^t Q^(1-t) exp(-κ t (1-t)); it enters as a few outcomes of equal shape (Gauss-Hermite nodes)
    and thereby serves every divergence. κ is measured in the row itself, on the stored ranks k/2..k.

    cap: no id off the stored ones has more mass than the smallest stored one, p_j = min(p_k, λ q_j). The student's
    `cap` largest other ids become outcomes of their own for it; 0 is without.

    The defaults are what scripts/measure_tail.py found best; more candidates do not help.
    """

    kappa: bool = True
    cap: int = 8
    _warned: bool = field(init=False, default=False)

    name = "student"
    NODES = 5
    SPREAD = 1.5
    """How much wider log(p/q) varies in the rest than in the ranks k/2..k; measured."""

    @property
    def candidates(self) -> int:  # type: ignore[override]
        return self.cap

    def _powers(self, student: StudentReduction, known: Known, exponent: float | Tensor) -> Powers:
        log_p, log_q = scale(known.log_p, exponent), scale(known.log_q, exponent)
        stored, without_label = known.teacher.top_ids.shape[1], known.label_outside is not None
        log_rest = student.log_rest_power(1.0, without_label=without_label).detach()
        log_rest_power = student.log_rest_power(exponent, without_label=without_label)
        log_ratio = known.log_rest_mass - log_rest  # log λ
        candidates = self._candidates(student, known)
        if candidates.shape[1]:
            log_ratio, capped = _fill_below(
                known.log_p[:, stored - 1], known.log_rest_mass, candidates.detach(), log_rest
            )
            log_p = torch.cat([log_p, scale(capped, exponent)], 1)
            log_q = torch.cat([log_q, scale(candidates, exponent)], 1)
        if student.explicit_ids.shape[1] == student.vocab_size:
            return Powers(log_p, log_q)  # there is no rest
        shift, log_weights = self._nodes(student, known, exponent)
        # Σ p^a = λ^a Σ q^a, with a λ of each node
        log_mass = log_ratio + log_rest  # of what is left to the rest
        shape = log_rest_power.detach() - exponent * log_rest  # log Σ_rest (q/Q)^a
        rest_p = (exponent * log_mass + shape)[:, None] + shift + log_weights
        rest_q = log_rest_power[:, None] + log_weights
        rest_p = self._settle(known, log_p[:, stored:], rest_p, exponent)
        apart = -(log_weights.exp() * log_weights).sum()  # the entropy that the nodes themselves show

        def inner_entropy(weights: Tensor) -> Tensor:
            return weights[:, -len(log_weights) :].sum(1) * (student.rest_entropy(exponent).detach() - apart)

        return Powers(torch.cat([log_p, rest_p], 1), torch.cat([log_q, rest_q], 1), len(log_weights), inner_entropy)

    @staticmethod
    def _candidates(student: StudentReduction, known: Known) -> Tensor:
        """[R, c] log q, descending, of the ids that may be capped; a label that stands for itself is not among them."""
        stored = known.teacher.top_ids.shape[1]
        candidates = student.log_q[:, stored:]
        if known.label_outside is None or not candidates.shape[1]:
            return candidates
        labels = student.explicit_ids[:, stored:] == known.teacher.label_ids[:, None]
        return candidates.masked_fill(labels, FLOOR).sort(1, descending=True).values

    def _nodes(self, student: StudentReduction, known: Known, exponent: float | Tensor) -> tuple[Tensor, Tensor]:
        """[R, nodes] shifts of log((p/q)^a) and [nodes] log-weights; Σ weight · exp(shift) = 1.

        κ is the spread where the mass lies. The many small ids that a power a < 1 counts have another, so that it says
        nothing of Σ p^a itself: that stays the student's.
        """
        stored = known.teacher.top_ids.shape[1]
        if not self.kappa:
            return student.log_rest.new_zeros(len(known.log_p), 1), student.log_rest.new_zeros(1)
        late = slice(stored // 2, stored)
        kappa = self.SPREAD * spread(known.log_p[:, late], student.log_q[:, late].detach())
        points, weights = np.polynomial.hermite_e.hermegauss(self.NODES)
        log_weights = torch.as_tensor(np.log(weights / weights.sum())).to(kappa)
        shift = scale(torch.as_tensor(points).to(kappa) * (2 * kappa).sqrt()[:, None], exponent)
        return shift - (shift + log_weights).logsumexp(1, keepdim=True), log_weights

    def _settle(self, known: Known, others: Tensor, rest: Tensor, exponent: float | Tensor) -> Tensor:
        """Where the cache holds log Σ_rest √p, the rest at temperature 2 has its true size; else a word of warning."""
        if is_one(exponent):
            return rest
        exact = known.teacher.extras.get("log_rest_sqrt_sum")
        if isinstance(exponent, float) and exponent == 0.5 and exact is not None:
            total = exact.to(rest.dtype)
            if others.shape[1]:
                total = total + torch.log1p(-(others.logsumexp(1) - total).clamp(max=-1e-3).exp())
            return rest + (total - rest.logsumexp(1))[:, None]
        if not self._warned:
            self._warned = True
            self._warn(known, rest, exponent)
        return rest

    @staticmethod
    def _warn(known: Known, rest: Tensor, exponent: float | Tensor) -> None:
        """Say what a temperature above 1 leaves to the model of the rest."""
        inside = scale(known.log_p, exponent).logsumexp(1)
        share = float(torch.sigmoid(rest.logsumexp(1) - inside).detach().mean())
        temperature = float((1.0 / torch.as_tensor(exponent)).detach().mean())
        if temperature > 1.2 and share > 0.1:
            remedy = (
                "the cache holds what makes temperature 2 exact: use 2"
                if "log_rest_sqrt_sum" in known.teacher.extras
                else 'build the cache with the extra "log_rest_sqrt_sum" and use temperature 2, or store more ids'
            )
            warnings.warn(
                f"at temperature {temperature:.2g} the ids that were not stored hold {share:.0%} of the teacher's "
                "mass, as estimated from the student: off by 1 to 3 % of the whole mass where the student is near the "
                f"teacher, by much more where it is not; {remedy}, or lower the temperature",
                stacklevel=2,
            )


def spread(log_p: Tensor, log_q: Tensor) -> Tensor:
    """[R] κ of the ids given: 4 (½ log Σp + ½ log Σq - log Σ√(pq)) >= 0, half the variance of log(p/q) where normal."""
    apart = 0.5 * (log_p.logsumexp(1) + log_q.logsumexp(1)) - (0.5 * (log_p + log_q)).logsumexp(1)
    return (4 * apart).clamp(min=0.0)


def _fill_below(log_cap: Tensor, log_mass: Tensor, log_q: Tensor, log_rest: Tensor) -> tuple[Tensor, Tensor]:
    """Spread the mass as p_j = min(cap, λ q_j): ([R] log λ, [R, c] log p of the candidates).

    log_q: [R, c] the candidates, descending. log_rest: [R] the student's mass beyond them, which is never capped.
    """
    count = log_q.shape[1]
    beyond = torch.cat([log_q, log_rest[:, None]], 1).flip(1).logcumsumexp(1).flip(1)  # q at and after each candidate
    at_cap = torch.arange(count + 1, device=log_q.device, dtype=log_q.dtype)
    left = (1 - at_cap * (log_cap - log_mass).exp()[:, None]).clamp(min=1e-30).log() + log_mass[:, None]
    log_ratio = left - beyond  # λ if exactly the first 0, 1, ..., c candidates are at the cap
    fits = torch.cat(
        [log_ratio[:, :-1] + log_q <= log_cap[:, None], torch.ones_like(log_q[:, :1], dtype=torch.bool)], 1
    )
    chosen = log_ratio.gather(1, fits.int().argmax(1, keepdim=True))
    return chosen[:, 0], torch.minimum(log_cap[:, None], chosen + log_q)


class UniformTail(Tail):
    """Every id off the stored ones has the same probability m / (V - k). Needs whole rows: slow, for comparison."""

    name = "uniform"

    def _powers(self, student: StudentReduction, known: Known, exponent: float | Tensor) -> Powers:
        teacher = known.teacher
        log_q = student.dense_log_q()
        count = torch.full_like(known.log_rest_mass, student.vocab_size - teacher.top_ids.shape[1])
        ids, log_p = teacher.top_ids, known.log_p
        if known.label_outside is not None:
            count = count - known.label_outside.to(log_p.dtype)
            label = torch.where(known.label_outside, teacher.label_ids, ids[:, 0])
            log_label = torch.where(known.label_outside, log_p[:, -1], log_p[:, 0])
            ids, log_p = torch.cat([ids, label[:, None]], 1), torch.cat([log_p[:, :-1], log_label[:, None]], 1)
            known.target = teacher.label_ids
        log_each = known.log_rest_mass - count.clamp(min=1).log()
        dense = log_each[:, None].expand_as(log_q).scatter(1, ids, log_p)
        return Powers(scale(dense, exponent), scale(log_q, exponent))


class RenormalisedTail(Tail):
    """There is no rest: both sides are renormalised over the stored ids. What top-k caches usually do; biased."""

    name = "renormalised"
    normalised = False

    def _powers(self, student: StudentReduction, known: Known, exponent: float | Tensor) -> Powers:
        return Powers(scale(known.log_p, exponent), scale(known.log_q, exponent))


class DroppedTail(Tail):
    """Sums run over the stored ids only, with full-vocabulary probabilities on both sides. Temperature 1 only."""

    name = "dropped"
    temperatures = False

    def _powers(self, student: StudentReduction, known: Known, exponent: float | Tensor) -> Powers:
        return Powers(scale(known.log_p, exponent), scale(known.log_q, exponent))


TAILS: dict[str, type[Tail]] = {tail.name: tail for tail in (StudentTail, UniformTail, RenormalisedTail, DroppedTail)}
