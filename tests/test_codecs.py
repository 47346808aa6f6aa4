import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage_schemas.codecs import CODECS, RowLayout, check_codec_version, decode_sequence, encode_sequence, get_codec
from storage_schemas.errors import CorruptShard, RequestError, UnsupportedFormat
from storage_schemas.records import EXTRAS, find_defect
from tests.records import make_record

VOCABULARIES = (1, 2, 50, 1 << 16, (1 << 16) + 1, 151_936, 262_144, (1 << 18) + 7)


def round_trip(codec, layout, record):
    payload = encode_sequence(codec, layout, record)
    return decode_sequence(
        codec, layout, payload, tokens=len(record), sequence_id=record.sequence_id, document_id=record.document_id
    )


@st.composite
def cases(draw):
    vocab_size = draw(st.sampled_from(VOCABULARIES))
    top_k = draw(st.integers(1, min(vocab_size, 70)))
    extras = tuple(sorted(draw(st.sets(st.sampled_from(EXTRAS)))))
    record = make_record(
        draw(st.integers(0, 2**32 - 1)),
        tokens=draw(st.integers(1, 20)),
        top_k=top_k,
        vocab_size=vocab_size,
        extras=extras,
        spread=draw(st.sampled_from([0.0, 1e-6, 0.1, 3.0, 30.0])),
        zeros=draw(st.booleans()),
    )
    return RowLayout(top_k, vocab_size, extras), record


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
@settings(deadline=None, max_examples=150)
@given(case=cases())
def test_round_trip_keeps_ids_and_the_stated_bound(codec, case):
    layout, record = case
    decoded = round_trip(codec, layout, record)
    np.testing.assert_array_equal(decoded.token_ids, record.token_ids)
    np.testing.assert_array_equal(decoded.completion_mask, record.completion_mask)
    np.testing.assert_array_equal(decoded.top_ids, record.top_ids)
    np.testing.assert_array_equal(np.isneginf(decoded.top_logprobs), np.isneginf(record.top_logprobs))
    finite = np.isfinite(record.top_logprobs)
    error = np.abs(np.where(finite, decoded.top_logprobs, 0) - np.where(finite, record.top_logprobs, 0))
    assert (error <= codec.error_bound(record.top_logprobs)).all()
    with np.errstate(invalid="ignore"):
        assert not (np.diff(decoded.top_logprobs, axis=1) > 0).any()
    # The scalars: float16's relative rounding (2^-11), or none.
    relative = 2**-11 if codec.scalar_dtype == np.float16 else 0
    for name, values in {"log_tail_mass": None, "label_logprob": None, **record.extras}.items():
        ours = record.extras[name] if values is not None else getattr(record, name)
        got = decoded.extras[name] if values is not None else getattr(decoded, name)
        np.testing.assert_allclose(got, ours, rtol=relative, atol=relative * 1e-4)


@pytest.mark.parametrize(("name", "bound"), [("ld8", 0.04), ("ld16", 2e-4)])
def test_the_bound_is_what_the_documentation_says(name, bound):
    # A range of 18 nats below a first value of −1: R / 508 + |l0| / 2048, and R / 131068.
    rows = np.linspace(-1, -19, 64, dtype=np.float32)[None]
    assert bound / 2 < get_codec(name).error_bound(rows).max() < bound


def test_zeros_cost_the_row_no_resolution():
    record = make_record(1, tokens=5, top_k=8, spread=1.0, zeros=True)
    assert np.isneginf(record.top_logprobs).any()
    bound = get_codec("ld8").error_bound(record.top_logprobs)
    assert bound.max() < 0.05  # a range of a few nats, not of the distance to a stand-in for −∞


def test_the_same_record_gives_the_same_bytes():
    layout, record = RowLayout(4, 50), make_record(3)
    copy = dataclasses.replace(record, top_ids=np.asfortranarray(record.top_ids))
    assert encode_sequence(get_codec("ld8"), layout, record) == encode_sequence(get_codec("ld8"), layout, copy)


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_damage_is_an_error_or_a_record_of_the_right_shape(data):
    # Decoding is reached only behind a checksum; a stranger's manifest can still vouch for nonsense.
    layout, record = RowLayout(4, 50), make_record(3)
    payload = bytearray(encode_sequence(get_codec("ld8"), layout, record))
    for _ in range(data.draw(st.integers(1, 3))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(payload)))
    tokens = data.draw(st.sampled_from([len(record), len(record) + 1, 1, 0, 1 << 31]))
    try:
        decoded = decode_sequence(
            get_codec("ld8"), layout, bytes(payload[:cut]), tokens=tokens, sequence_id="s", document_id="d"
        )
    except CorruptShard:
        return
    assert len(decoded) == tokens == len(record)
    find_defect(decoded, vocab_size=50, top_k=4)  # whatever it finds, it does not fail


def test_a_payload_that_claims_to_be_huge_allocates_nothing():
    layout, record = RowLayout(4, 50), make_record(3)
    payload = encode_sequence(get_codec("ld8"), layout, record)
    with pytest.raises(CorruptShard, match="cannot be a payload"):
        decode_sequence(get_codec("ld8"), layout, payload, tokens=1 << 40, sequence_id="s", document_id="d")


def test_unknown_codecs():
    with pytest.raises(RequestError, match="ld16, ld8, got 'ld9'"):
        get_codec("ld9")
    with pytest.raises(UnsupportedFormat, match="update logitcask"):
        check_codec_version("ld9")
