"""One sequence ↔ one byte string.

A payload is a header, the lengths of its sections (little-endian uint32), and the sections: planes of one kind, each
its own zstd frame, so that a byte histogram is learned per plane and not once for all. How the log-probabilities become
planes is the codec's business; ids, token ids, mask and label are the same for all.

A codec is named in a cache's identity. Its `error_bound` says how far a decoded log-probability may be from the
encoded one, and holds for every input.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from storage_schemas.errors import CorruptShard, RequestError, UnsupportedFormat
from storage_schemas.records import Bool, Float32, Int32, SequenceTopK

MAX_SEQUENCE_TOKENS = 1 << 24
"""More tokens than any model reads at once; bounds what a damaged header can make a reader allocate."""

_ZSTD = pa.Codec("zstd", compression_level=3)
_U8 = np.dtype("u1")
_ZERO_BELOW = -1e4  # nats; exp of it is 0 in float64, so these are stored as probability 0

Float64 = NDArray[np.float64]
Plane = NDArray[Any]
PlaneShape = tuple[np.dtype[np.generic], tuple[int, ...]]


@dataclass(frozen=True)
class RowLayout:
    """What every row of a cache has in common: its k, the vocabulary its ids come from, its extra scalars."""

    top_k: int
    vocab_size: int
    extras: tuple[str, ...] = ()

    @property
    def token_dtype(self) -> np.dtype[np.generic]:
        return np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<u4")

    @property
    def high_bits(self) -> int:
        """Bits of an id beyond its two low bytes."""
        return max(0, (self.vocab_size - 1).bit_length() - 16)


class ValueCodec(Protocol):
    """How the log-probabilities of [T, k] rows, their tail and the scalars beside them become planes."""

    name: str
    scalar_dtype: np.dtype[Any]
    """Of the label's log-probability, the tail mass and the extras."""

    def planes(self, tokens: int, top_k: int) -> list[PlaneShape]:
        """dtype and shape of each plane, one section each."""

    def encode(self, top_logprobs: Float32) -> list[Plane]: ...

    def decode(self, planes: Sequence[Plane]) -> Float32: ...

    def error_bound(self, top_logprobs: Float32) -> Float32:
        """[T, k]: the largest |decoded − encoded| in nats for each value that is not stored as −∞."""


class Linear:
    """Linear quantisation of each row between its first and its last value, stored as differences of the levels.

    The top level is probability 0; the range R is that of the finite values, so a row with zeros keeps its
    resolution. With L = 2^bits − 2 steps, |Δ| ≤ R / 2L + (rounding of the first value):

    * `ld8`: 8 bits, first value, range and scalars in float16: |Δ| ≤ R / 508 + |l₀| / 2048;
    * `ld16`: 16 bits, the rest in float32: |Δ| ≤ R / 131,068 + float32's rounding. The exact one for all practice:
      float16 log-probabilities would be off by 4e-3 nats below −8.
    """

    def __init__(self, name: str, level_dtype: str, scalar_dtype: str) -> None:
        self.name = name
        self.scalar_dtype: np.dtype[Any] = np.dtype(scalar_dtype)
        self._level_dtype = np.dtype(level_dtype)
        self._zero = int(np.iinfo(self._level_dtype).max)
        self._steps = self._zero - 1

    def planes(self, tokens: int, top_k: int) -> list[PlaneShape]:
        return [(self.scalar_dtype, (2, tokens)), *[(_U8, (top_k - 1, tokens))] * self._level_dtype.itemsize]

    def encode(self, top_logprobs: Float32) -> list[Plane]:
        values, first, span, zero = self._scale(top_logprobs)
        offsets = (first - values) * (self._steps / span)
        levels = np.clip(np.rint(offsets), 0, self._steps).astype(self._level_dtype)
        levels[:, 0] = 0
        levels[zero] = self._zero
        steps = np.ascontiguousarray(np.diff(levels, axis=1).T)
        split = steps.view(np.uint8).reshape(*steps.shape, steps.itemsize)
        return [np.stack([first, span])[..., 0].astype(self.scalar_dtype), *np.moveaxis(split, 2, 0)]

    def decode(self, planes: Sequence[Plane]) -> Float32:
        first, span = planes[0].astype(np.float32)
        steps = np.stack(planes[1:], axis=2).view(self._level_dtype)[..., 0].T
        levels = np.zeros((len(first), steps.shape[1] + 1), self._level_dtype)
        np.cumsum(steps, axis=1, dtype=self._level_dtype, out=levels[:, 1:])
        values = levels.astype(np.float32)
        values *= (span / np.float32(-self._steps))[:, None]
        values += first[:, None]
        values[levels == self._zero] = -np.inf
        return values

    def error_bound(self, top_logprobs: Float32) -> Float32:
        _, first, span, _ = self._scale(top_logprobs)
        rounding = np.abs(first) * float(np.finfo(self.scalar_dtype.type).eps) / 2
        # 2⁻²² covers the float32 arithmetic of the decoder: one product and one sum of numbers up to |first| + R.
        bound = span / (2 * self._steps) + rounding + (np.abs(first) + span) * 2**-22
        return np.broadcast_to(bound, top_logprobs.shape).astype(np.float32)

    def _scale(self, top_logprobs: Float32) -> tuple[Float32, Float64, Float64, Bool]:
        """Values with zeros put aside; first value and range, [T, 1] as stored; where the zeros are."""
        zero = top_logprobs < _ZERO_BELOW
        values = np.where(zero, np.float32(0), top_logprobs)
        first = top_logprobs[:, :1].astype(self.scalar_dtype).astype(np.float64)
        # 1.0005 outweighs the rounding of R to float16, so that the last value is never clipped.
        span = (1.0005 * (first - values.min(axis=1, keepdims=True))).astype(self.scalar_dtype)
        return values, first, np.maximum(span, self.scalar_dtype.type(1e-4)).astype(np.float64), zero


CODECS: dict[str, ValueCodec] = {
    codec.name: codec for codec in (Linear("ld8", "u1", "<f2"), Linear("ld16", "<u2", "<f4"))
}


def get_codec(name: str) -> ValueCodec:
    """Raises RequestError for a name that is not in the registry."""
    if name not in CODECS:
        raise RequestError(f"expected a codec among {', '.join(sorted(CODECS))}, got {name!r}; choose one of them")
    return CODECS[name]


def encode_sequence(codec: ValueCodec, layout: RowLayout, record: SequenceTopK) -> bytes:
    """The payload of one record; the same record gives the same bytes wherever the same zstd runs."""
    ids = record.top_ids.astype(np.uint32)
    scalars = [record.label_logprob, record.log_tail_mass, *(record.extras[name] for name in sorted(layout.extras))]
    with np.errstate(over="ignore"):  # a magnitude beyond float16 is a probability of 0
        packed_scalars = np.stack(scalars).astype(codec.scalar_dtype)
    sections: list[Plane] = [
        record.token_ids.astype(layout.token_dtype),
        np.packbits(record.completion_mask, bitorder="little"),
        (ids & 0xFF).astype(np.uint8),
        (ids >> 8 & 0xFF).astype(np.uint8),
        _pack_high_bits(ids, layout.high_bits),
        packed_scalars,
        *codec.encode(record.top_logprobs),
    ]
    frames = [_ZSTD.compress(section.tobytes(), asbytes=True) if section.nbytes else b"" for section in sections]
    return struct.pack(f"<{1 + len(frames)}I", len(record), *map(len, frames)) + b"".join(frames)


def decode_sequence(
    codec: ValueCodec,
    layout: RowLayout,
    payload: bytes | memoryview,
    *,
    tokens: int,
    sequence_id: str,
    document_id: str,
) -> SequenceTopK:
    """The record of a payload whose checksum has passed.

    Nothing is allocated beyond what `tokens` and the layout say. Raises CorruptShard where the payload says otherwise.
    """
    k, high = layout.top_k, layout.high_bits
    shapes = _section_shapes(codec, layout, tokens)
    header = struct.Struct(f"<{1 + len(shapes)}I")
    if not 0 < tokens <= MAX_SEQUENCE_TOKENS or len(payload) < header.size:
        raise CorruptShard(f"sequence {sequence_id}: {tokens} tokens in {len(payload)} bytes cannot be a payload")
    count, *lengths = header.unpack_from(payload)
    if count != tokens or header.size + sum(lengths) != len(payload):
        raise CorruptShard(f"sequence {sequence_id}: its payload's header disagrees with the index")
    view, start, planes = memoryview(payload), header.size, []
    for length, (dtype, shape) in zip(lengths, shapes, strict=True):
        planes.append(_open_section(view[start : start + length], dtype, shape, sequence_id))
        start += length
    token_ids, mask, low, middle, extended, scalars, *values = planes
    ids = middle.astype(np.int32)
    ids <<= 8
    ids |= low.astype(np.int32)
    if high:
        ids |= _unpack_high_bits(extended, k, high)
    return SequenceTopK(
        sequence_id=sequence_id,
        document_id=document_id,
        token_ids=token_ids.astype(np.int32),
        completion_mask=np.unpackbits(mask.view(np.uint8), count=tokens, bitorder="little").astype(bool),
        top_ids=ids,
        top_logprobs=codec.decode(values),
        label_logprob=scalars[0].astype(np.float32),
        log_tail_mass=scalars[1].astype(np.float32),
        extras={name: scalars[2 + i].astype(np.float32) for i, name in enumerate(sorted(layout.extras))},
    )


def bound_payload(codec: ValueCodec, layout: RowLayout, tokens: int) -> int:
    """Bytes that the payload of a sequence of so many tokens cannot exceed: its sections as if none of them could be
    compressed, and zstd's own bound on what a frame adds."""
    sizes = [_plane_bytes(*section) for section in _section_shapes(codec, layout, tokens)]
    frames = [size + (size >> 8) + max(0, (1 << 17) - size >> 11) for size in sizes if size]  # ZSTD_COMPRESSBOUND
    return 4 * (1 + len(sizes)) + sum(frames)


def _section_shapes(codec: ValueCodec, layout: RowLayout, tokens: int) -> list[PlaneShape]:
    """dtype and shape of each section of a payload, in its order."""
    k = layout.top_k
    return [
        (layout.token_dtype, (tokens,)),
        (_U8, (-(-tokens // 8),)),
        (_U8, (tokens, k)),
        (_U8, (tokens, k)),
        (_U8, (tokens, -(-k * layout.high_bits // 8))),
        (codec.scalar_dtype, (2 + len(layout.extras), tokens)),
        *codec.planes(tokens, k),
    ]


def _plane_bytes(dtype: np.dtype[np.generic], shape: tuple[int, ...]) -> int:
    return math.prod(shape) * dtype.itemsize


def _open_section(frame: memoryview, dtype: np.dtype[np.generic], shape: tuple[int, ...], sequence_id: str) -> Plane:
    size = _plane_bytes(dtype, shape)
    if size == 0:
        return np.zeros(shape, dtype)
    try:
        content = _ZSTD.decompress(frame, decompressed_size=size, asbytes=True)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise CorruptShard(f"sequence {sequence_id}: a section does not decompress to {size} bytes") from error
    if len(content) != size:
        raise CorruptShard(f"sequence {sequence_id}: a section decompresses to {len(content)} bytes, expected {size}")
    return np.frombuffer(content, dtype).reshape(shape)


def _pack_high_bits(ids: NDArray[np.uint32], bits: int) -> NDArray[np.uint8]:
    if bits == 0:
        return np.zeros((len(ids), 0), np.uint8)
    planes = (ids[:, :, None] >> (16 + np.arange(bits, dtype=np.uint32))) & 1
    return np.packbits(planes.reshape(len(ids), -1).astype(np.uint8), axis=1, bitorder="little")


def _unpack_high_bits(packed: Plane, top_k: int, bits: int) -> Int32:
    planes = np.unpackbits(packed.view(np.uint8), axis=1, count=top_k * bits, bitorder="little")
    weights = np.int32(1) << (16 + np.arange(bits, dtype=np.int32))
    return np.asarray((planes.reshape(len(packed), top_k, bits).astype(np.int32) * weights).sum(axis=2), np.int32)


def check_codec_version(name: str) -> ValueCodec:
    """The codec of a stored cache; raises UnsupportedFormat where a newer version wrote it."""
    if name not in CODECS:
        raise UnsupportedFormat(
            f"this cache's codec is {name!r}, known here: {', '.join(sorted(CODECS))}; update logitcask"
        )
    return CODECS[name]
