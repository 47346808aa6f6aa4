"""From rows of logits to what a cache keeps of them: the top k, the mass of the rest, the label. Pure torch.

One pass in bounded memory, a block of rows at a time while they are in the processor's cache:

* top-k in two stages. The row is cut into groups, and the k + 1 groups with the largest maxima hold the k + 1 largest
  values; a second top-k over those and a few more groups finds them. The last of them is the largest value of the rest.
* The rest is summed by itself, around its own largest value: the tail mass is never 1 − Σ.
* The normaliser is put together from both, in float64.

Where the logits at the k-th place are equal, the smallest ids are chosen.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import starmap

import torch
from torch import Tensor

_GROUP = 64  # ids per group
_CPU_BLOCK_BYTES = 4 << 20  # what stays in a core's cache between the passes
_CUDA_BLOCK_BYTES = 1 << 27
_local = threading.local()
_MOST_THREADS = 16  # beyond, Python's own share of the work is what counts
_set_num_threads = torch.set_num_threads  # vLLM's CPU worker puts a stub in its place


def reduce_rows(logits: Tensor, label_ids: Tensor, top_k: int, extras: Sequence[str] = ()) -> dict[str, Tensor]:
    """What is kept of each row of logits, which are overwritten where they are float32.

    logits: [n, V] of any floating dtype. label_ids: [n] int64, the token that follows each row.
    Returns on the same device top_ids [n, k] int32, top_logprobs [n, k] float32 (nats, descending), log_tail_mass,
    label_logprob and each of `extras`, all [n] float32. A row with a NaN or +inf comes out as NaN. Nothing is copied
    to the host on CUDA, so nothing waits.
    """
    count, vocab_size = logits.shape
    assert 1 <= top_k <= vocab_size
    block = max(1, (_CUDA_BLOCK_BYTES if logits.is_cuda else _CPU_BLOCK_BYTES) // (4 * vocab_size))
    blocks = [
        (logits[at : at + block], label_ids[at : at + block], top_k, tuple(extras)) for at in range(0, count, block)
    ]
    pool = None if logits.is_cuda or len(blocks) == 1 else _pool(torch.get_num_threads())
    parts = list(pool.map(_reduce_block, *zip(*blocks, strict=True)) if pool else starmap(_reduce_block, blocks))
    return _normalise({name: torch.cat([part[name] for part in parts]) for name in parts[0]})


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor | None:
    """Threads that work on a block each. Within an operation they do not share the work: a block takes two dozen
    short ones, and at the barrier behind each of them OpenMP's threads would spin, several times the work itself as
    soon as anything else runs on the machine."""
    threads = min(threads, _MOST_THREADS)
    if threads < 2:
        return None
    started = threading.Barrier(threads + 1)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="topk")

    def begin() -> None:
        _set_num_threads(1)
        started.wait()

    before = torch.get_num_threads()
    for _ in range(threads):
        pool.submit(begin)
    started.wait()
    _set_num_threads(before)  # the number is a thread's own, but for MKL, which has one for all
    return pool


@torch.inference_mode()
def _reduce_block(logits: Tensor, label_ids: Tensor, top_k: int, extras: Sequence[str]) -> dict[str, Tensor]:
    """Unnormalised pieces of a few rows: every access to their V columns is in here and in what it calls."""
    rows = _as_float32(logits)
    raw = {"label_logit": rows.gather(1, label_ids[:, None])[:, 0]}
    if top_k == rows.shape[1]:
        values, ids = rows.sort(dim=1, descending=True, stable=True)
        nothing = torch.full_like(values[:, 0], -torch.inf, dtype=torch.float64)
        return raw | {"top_logits": values, "top_ids": ids, "log_rest": nothing} | dict.fromkeys(extras, nothing)
    spare = 0 if logits.dtype == torch.float32 else top_k // 8 + 4  # half precision ties as a rule
    values, ids = _select(rows, top_k + 1, spare)
    raw |= {"top_logits": values[:, :top_k], "top_ids": ids[:, :top_k]}
    # The softmax of the rest is its shift, exponentials and sum in one pass, in place on the CPU. Its own sum strays
    # by up to 1e-5, so its entries are summed again, and its largest, which stands for exp(0), tells the scale.
    rows.scatter_(1, raw["top_ids"], -torch.inf)
    rest = torch.softmax(rows, 1) if rows.is_cuda else torch.softmax(rows, 1, out=rows)
    total = rest.sum(dim=1).double()
    peak = rest.gather(1, ids[:, top_k:])[:, 0].double()
    empty = values[:, top_k].isneginf()
    raw["log_rest"] = torch.where(empty, -torch.inf, values[:, top_k] + (total / peak).log())
    if "entropy" in extras:
        raw["entropy"] = torch.special.entr(rest).sum(dim=1).double() / total + total.log()
    if "log_rest_sqrt_sum" in extras:
        raw["log_rest_sqrt_sum"] = rest.sqrt().sum(dim=1).double().log() - total.log() / 2
    return raw


def _as_float32(logits: Tensor) -> Tensor:
    """The logits themselves, to be overwritten, or a copy in this thread's own scratch memory."""
    if logits.is_cuda or (logits.dtype == torch.float32 and logits.is_contiguous()):
        return logits.float().contiguous()
    scratch: Tensor | None = getattr(_local, "scratch", None)
    if scratch is None or scratch.numel() < logits.numel():  # fresh memory for each block costs as much as the copy
        scratch = _local.scratch = torch.empty(logits.numel(), dtype=torch.float32)
    return scratch[: logits.numel()].view(logits.shape).copy_(logits)


def _normalise(raw: dict[str, Tensor]) -> dict[str, Tensor]:
    """Log-probabilities from the pieces, in float64. The extras come in as those of the rest by itself."""
    top_logits = raw["top_logits"].double()
    log_sum = torch.logaddexp(top_logits.logsumexp(dim=1), raw["log_rest"])
    logprobs = top_logits - log_sum[:, None]
    log_tail = raw["log_rest"] - log_sum
    kept = {
        "top_ids": raw["top_ids"].int(),
        "top_logprobs": logprobs.float(),
        "log_tail_mass": log_tail.float(),
        "label_logprob": (raw["label_logit"] - log_sum).float(),
    }
    if "entropy" in raw:  # of k + 1 outcomes, and of the rest within its mass
        of_rest = torch.where(log_tail.isneginf(), 0.0, log_tail.exp() * (raw["entropy"] - log_tail))
        kept["entropy"] = (torch.special.entr(logprobs.exp()).sum(dim=1) + of_rest).float()
    if "log_rest_sqrt_sum" in raw:
        of_rest = log_tail / 2 + raw["log_rest_sqrt_sum"]
        kept["log_rest_sqrt_sum"] = torch.where(log_tail.isneginf(), -torch.inf, of_rest).float()
    return kept


@dataclass(frozen=True)
class _Shortlist:
    """The groups of each row with the largest maxima, side by side.

    values: [n, m]. groups: [n, g] int64, whose ids are the first g × _GROUP columns, followed by the ids from `whole`
    on, which no group holds; None where the columns are the row itself. bound: [n], the largest value that may be
    missing, or None.
    """

    values: Tensor
    groups: Tensor | None
    whole: int
    bound: Tensor | None

    def ids(self, row: Tensor, column: Tensor) -> Tensor:
        """The ids at these places."""
        if self.groups is None:
            return column
        listed = self.groups.shape[1] * _GROUP
        group = self.groups[row, (column // _GROUP).clamp(max=self.groups.shape[1] - 1)]
        return torch.where(column < listed, group * _GROUP + column % _GROUP, column - listed + self.whole)


def _shortlist(rows: Tensor, count: int) -> _Shortlist:
    """Where the `count` largest values of each row are."""
    vocab_size = rows.shape[1]
    groups = vocab_size // _GROUP
    whole = groups * _GROUP
    if groups < 2 * count:  # it would be most of the row again
        return _Shortlist(rows, None, 0, None)
    grouped = rows[:, :whole].view(-1, groups, _GROUP)
    maxima = grouped.amax(dim=2).topk(count + 1, dim=1)
    chosen = maxima.indices[:, :count]
    listed = grouped.gather(1, chosen[:, :, None].expand(-1, -1, _GROUP)).flatten(1)
    return _Shortlist(torch.cat([listed, rows[:, whole:]], dim=1), chosen, whole, maxima.values[:, -1])


def _select(rows: Tensor, count: int, spare: int) -> tuple[Tensor, Tensor]:
    """The `count` largest values [n, count] of each row, descending, and their ids.

    Of the values that equal the last but one the smallest ids are taken, in order. spare: how many more groups to
    list, so that the equals of that value need not be looked for in the whole row.
    """
    shortlist = _shortlist(rows, count + spare)
    values, columns = shortlist.values.topk(count, dim=1)
    ids = shortlist.ids(torch.arange(len(rows), device=rows.device)[:, None], columns)
    if rows.is_cuda:  # asking which rows are tied would wait for the device
        return values, _choose_by_key(rows, values, ids)
    tied = values[:, -2] == values[:, -1]
    if not bool(tied.any()):
        return values, ids
    row, column = (shortlist.values == values[:, -2:-1]).nonzero().T
    ids = _place_smallest(values, ids, row, shortlist.ids(row, column))
    if shortlist.bound is not None:
        rest = (tied & (shortlist.bound == values[:, -2])).nonzero()[:, 0]
        if len(rest):  # equals in groups that are not listed
            row, column = (rows[rest] == values[rest, -2:-1]).nonzero().T
            ids[rest] = _place_smallest(values[rest], ids[rest], row, column)
    return values, ids


def _place_smallest(values: Tensor, ids: Tensor, row: Tensor, token_id: Tensor) -> Tensor:
    """ids with the smallest of each row's token_id, which share its last value but one, where that value stands."""
    keys = ((row << 32) | token_id).sort().values
    row, token_id = keys >> 32, keys & 0xFFFFFFFF
    place = torch.arange(len(row)) - torch.searchsorted(row, row)
    place += (values > values[:, -2:-1]).sum(dim=1)[row]
    fits = place < values.shape[1]
    return ids.index_put((row[fits], place[fits]), token_id[fits])


def _choose_by_key(rows: Tensor, values: Tensor, ids: Tensor) -> Tensor:
    """ids with the smallest of those that share each row's last value but one, without waiting for a device.

    The smallest ids are the largest of their negatives, so the two stages find them as well.
    """
    width = values.shape[1]
    threshold = values[:, -2:-1]
    order = torch.arange(rows.shape[1], dtype=torch.float32, device=rows.device)  # exact below 2^24 ids
    keys = torch.where(rows == threshold, -order, -torch.inf)
    smallest = -_shortlist(keys, width).values.topk(width, dim=1).values.clamp(min=-order[-1])
    rank = torch.arange(width, device=rows.device) - (values > threshold).sum(dim=1, keepdim=True)
    return torch.where(values == threshold, smallest.gather(1, rank.clamp(min=0)).long(), ids)
