"""The two sides of a distillation loss, row by row: what the cache holds, and what the student's logits reduce to.

A row is one position that carries loss. Its outcomes are the stored ids, each by itself ("explicit"), and everything
else together ("the rest"). `StudentReduction` is made from a chunk of logits and knows the way back: an objective
works on its small arrays with autograd, and `logit_gradient` carries the result to the logits in closed form.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

ABSENT = -1e6
"""Logit of a column that is not there: far below any logit, so that its exp is 0, yet finite, so that 0 · log 0 is 0
without a special case, and small enough for differences between such values to keep some digits."""


@dataclass(frozen=True)
class TeacherRows:
    """The teacher's stored distributions at N rows, on the student's device.

    top_ids: [N, k] int64, no id twice in a row. top_logprobs: [N, k] float32 nats, descending. log_tail_mass: [N]
    float32, log of the teacher's mass off the stored ids. label_ids: [N] int64, the token that follows.
    label_logprob: [N] float32, the teacher's log-probability of it. extras: name -> [N] float32, a subset of
    `storage_schemas.records.EXTRAS`.
    """

    top_ids: Tensor
    top_logprobs: Tensor
    log_tail_mass: Tensor
    label_ids: Tensor
    label_logprob: Tensor
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.top_ids.shape[0]

    def __getitem__(self, rows: slice) -> TeacherRows:
        return TeacherRows(
            self.top_ids[rows],
            self.top_logprobs[rows],
            self.log_tail_mass[rows],
            self.label_ids[rows],
            self.label_logprob[rows],
            {name: values[rows] for name, values in self.extras.items()},
        )


@dataclass
class _RestTerm:
    """A quantity of the rest that an objective asked for: log Σ exp(a z), or the mean of z under exp(a z)."""

    exponent: float | Tensor
    log_sum: Tensor
    without_label: bool = False
    mean: Tensor | None = None


class StudentReduction:
    """R rows of student logits, reduced to explicit outcomes and the rest; everything in nats and differentiable.

    explicit_ids: [R, n] the stored ids, then the student's `candidates` largest other ids. log_q: [R, n] their
    log-probabilities. log_rest: [R] log of the student's mass on all other ids, summed there (never 1 - Σ, which in
    float32 is 19 % wrong at a mass of 1e-7).

    The logits [R, V] belong to this object from here on: it overwrites them. `work` is scratch of the same shape.
    """

    def __init__(
        self,
        logits: Tensor,
        top_ids: Tensor,
        label_ids: Tensor,
        *,
        candidates: int = 0,
        differentiable: bool = False,
        work: Tensor | None = None,
    ) -> None:
        self._logits = logits
        self._work = torch.empty_like(logits) if work is None else work
        self._differentiable = differentiable
        self._label_ids = label_ids[:, None]
        self._label_logit = self._leaf(logits.gather(1, self._label_ids)[:, 0])
        self.explicit_ids = top_ids
        explicit = self._take(top_ids)
        if candidates:
            largest = largest_ids(logits, candidates)
            explicit = torch.cat([explicit, self._take(largest)], dim=1)
            self.explicit_ids = torch.cat([top_ids, largest], dim=1)
        self._explicit = self._leaf(explicit)
        rest = self._leaf(self._sum_rest(1.0)[0])
        self._rest_terms = [_RestTerm(1.0, rest)]
        self._dense: list[Tensor] = []  # at most one; shared with `unnormalised` views, as the rest terms are
        with torch.set_grad_enabled(differentiable):
            self._log_norm = torch.logaddexp(self._explicit.logsumexp(1), rest)
            self.log_q = self._explicit - self._log_norm[:, None]
            self.log_rest = rest - self._log_norm

    @property
    def vocab_size(self) -> int:
        return self._logits.shape[1]

    def label_log_q(self) -> Tensor:
        """[R] log q of the token that follows."""
        return self._label_logit - self._log_norm

    def unnormalised(self) -> StudentReduction:
        """The same rows where the softmax's normaliser counts as a constant: for quantities that will be normalised
        anyway (temperatures), which then cost one pass over the logits less."""
        view = copy.copy(self)
        view._log_norm = self._log_norm.detach()
        with torch.set_grad_enabled(self._differentiable):
            view.log_q = self._explicit - view._log_norm[:, None]
            view.log_rest = self._rest_terms[0].log_sum - view._log_norm
        return view

    def log_rest_power(self, exponent: float | Tensor, *, without_label: bool = False) -> Tensor:
        """[R] log Σ_rest q^a, a = exponent > 0: a number, or [R]. Differentiable to a [R] exponent too.

        With `without_label` the label's id is left out of the sum where it lies in the rest.
        """
        if isinstance(exponent, float) and exponent == 1.0 and not without_label:
            return self.log_rest
        fixed = exponent.detach() if isinstance(exponent, Tensor) else exponent
        tracks = isinstance(exponent, Tensor) and exponent.requires_grad
        value, mean = self._sum_rest(fixed, with_mean=tracks, without_label=without_label)
        term = _RestTerm(fixed, self._leaf(value), without_label)
        self._rest_terms.append(term)
        log_sum = term.log_sum
        if tracks:
            assert mean is not None
            log_sum = log_sum + (exponent - fixed) * mean  # d/da log Σ exp(a z) is the mean of z
        return log_sum - exponent * self._log_norm

    def rest_entropy(self, exponent: float | Tensor = 1.0) -> Tensor:
        """[R] entropy of the rest's own shape, q^a normalised over the rest; meaningless where there is no rest."""
        assert not (isinstance(exponent, Tensor) and exponent.requires_grad)
        log_sum, mean = self._sum_rest(exponent, with_mean=True)
        assert mean is not None
        term = _RestTerm(exponent, self._leaf(log_sum), mean=self._leaf(mean))
        self._rest_terms.append(term)
        assert term.mean is not None
        return term.log_sum - exponent * term.mean

    def entropy(self) -> Tensor:
        """[R] entropy of the student's whole row."""
        inside = self.log_rest.exp() * (self.rest_entropy() - self.log_rest)
        return inside - (self.log_q.exp() * self.log_q).sum(1)

    def dense_log_q(self) -> Tensor:
        """[R, V] the whole row, in the order of ids: for tails that cannot be summed up. Costs several [R, V]."""
        if not self._dense:
            self._dense.append(self._leaf(self._logits.scatter(1, self.explicit_ids, self._explicit.detach())))
        return self._dense[0].log_softmax(1)

    def logit_gradient(self, loss: Tensor, *, softcap: float | None = None) -> Tensor:
        """[R, V] the gradient of a scalar loss to the logits, in memory that this object owned; ends its life.

        With `softcap` c the logits are c·tanh(x/c), and the gradient is the one to x.
        """
        sources = [self._explicit, self._label_logit]
        sources += [term.log_sum for term in self._rest_terms]
        sources += [term.mean for term in self._rest_terms if term.mean is not None]
        sources += self._dense
        found = torch.autograd.grad(loss, sources, allow_unused=True)
        gradients = {id(leaf): gradient for leaf, gradient in zip(sources, found, strict=True) if gradient is not None}
        terms = [term for term in self._rest_terms if id(term.log_sum) in gradients or id(term.mean) in gradients]
        dense = gradients.get(id(self._dense[0])) if self._dense else None
        if dense is None and len(terms) == 1 and terms[0].mean is None:
            term = terms[0]
            result = self._shape_of(term, out=self._logits if softcap is None else self._work)
            result.mul_((term.exponent * gradients[id(term.log_sum)])[:, None])
        else:
            result = torch.zeros_like(self._logits) if dense is None else dense
            for term in terms:
                result += self._rest_gradient(term, gradients)
        # The explicit columns hold 0 by now: exp(ABSENT) is 0 under any exponent.
        for ids, leaf in ((self.explicit_ids, self._explicit), (self._label_ids, self._label_logit)):
            if id(leaf) in gradients:
                result.scatter_add_(1, ids, gradients[id(leaf)].view(len(ids), -1))
        if softcap is not None:
            logits = self._logits.scatter_(1, self.explicit_ids, self._explicit.detach())
            result.mul_(logits.div_(softcap).square_().neg_().add_(1.0))  # tanh' = 1 - tanh²
        return result

    def _rest_gradient(self, term: _RestTerm, gradients: Mapping[int, Tensor]) -> Tensor:
        shape = self._shape_of(term, out=self._work)
        log_sum, mean = gradients.get(id(term.log_sum)), gradients.get(id(term.mean))
        row = torch.zeros_like(term.log_sum) if log_sum is None else term.exponent * log_sum
        if mean is None:
            return shape.mul_(row[:, None])
        assert term.mean is not None
        # d mean / dz_j = w_j (1 + a (z_j - mean)), w the normalised exp(a z)
        slope = term.exponent * mean
        offset = row + mean - slope * term.mean.detach()
        return shape.mul_(torch.addcmul(offset[:, None], self._logits, slope[:, None]))

    def _shape_of(self, term: _RestTerm, *, out: Tensor) -> Tensor:
        """exp(a z) normalised over the rest, written to `out`, which may be the logits themselves."""
        hidden = self._hide_label(term.without_label)
        torch.mul(self._logits, _column(term.exponent), out=out)
        out.sub_(term.log_sum.detach()[:, None]).exp_()
        if out is not self._logits:
            self._restore_label(hidden)
        return out

    def _sum_rest(
        self, exponent: float | Tensor, *, with_mean: bool = False, without_label: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """[R] log Σ exp(a z) over the rest, and the mean of z under it."""
        hidden = self._hide_label(without_label)
        peak = self._logits.amax(1)
        torch.sub(self._logits, peak[:, None], out=self._work)
        if not isinstance(exponent, float) or exponent != 1.0:
            self._work.mul_(_column(exponent))
        total = self._work.exp_().sum(1)
        mean = None
        if with_mean:
            mean = torch.bmm(self._work[:, None], self._logits[:, :, None])[:, 0, 0] / total
        self._restore_label(hidden)
        return exponent * peak + total.log(), mean

    def _hide_label(self, hide: bool) -> Tensor | None:
        if not hide:
            return None
        value = self._logits.gather(1, self._label_ids)
        self._logits.scatter_(1, self._label_ids, ABSENT)
        return value

    def _restore_label(self, value: Tensor | None) -> None:
        if value is not None:
            self._logits.scatter_(1, self._label_ids, value)

    def _take(self, ids: Tensor) -> Tensor:
        """The logits at `ids`, which thereby leave the rest."""
        taken = self._logits.gather(1, ids)
        self._logits.scatter_(1, ids, ABSENT)
        return taken

    def _leaf(self, values: Tensor) -> Tensor:
        return values.detach().requires_grad_(self._differentiable)


def _column(values: float | Tensor) -> float | Tensor:
    return values[:, None] if isinstance(values, Tensor) else values


def largest_ids(values: Tensor, count: int, groups: int = 32) -> Tensor:
    """[R, count] ids of the `count` largest of [R, V] values, descending; exact.

    Two stages: the largest of each strided group of ids, then the members of the best groups; one topk over a large
    vocabulary would sort far more.
    """
    rows, width = values.shape
    stride = width // groups
    if stride < 2 * count:
        return values.topk(count, dim=1).indices
    body = values[:, : stride * groups].view(rows, groups, stride)
    best = body.amax(1).topk(count, dim=1).indices
    offsets = torch.arange(groups, device=values.device) * stride
    members = (best[:, :, None] + offsets).view(rows, -1)
    leftover = torch.arange(stride * groups, width, device=values.device).expand(rows, -1)
    members = torch.cat([members, leftover], dim=1)
    return members.gather(1, values.gather(1, members).topk(count, dim=1).indices)
