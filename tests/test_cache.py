"""Writer and reader together: what goes in comes out, and nothing else ever does."""

import dataclasses
import hashlib
import json
import logging
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import zarr

from storage_schemas.codecs import decode_sequence, get_codec
from storage_schemas.errors import CacheError, CorruptShard, IdentityMismatch, IncompleteCache, UnsupportedFormat
from storage_schemas.reader import CacheReader
from storage_schemas.writer import CacheWriter
from tests.records import make_identity, make_plan, make_record

SHARDS = [[make_record(10 * s + i, tokens=3 + i) for i in range(3)] for s in range(3)]
CONTAINERS = ("arrow", "zarr")


def build(path, *, shards=SHARDS, order=None, **identity):
    plan = make_plan(shards)
    writer = CacheWriter.open(str(path), make_identity(**identity))
    plan = writer.plan(plan.segment) or writer.store_plan(plan)
    for ordinal in order if order is not None else writer.pending(plan):
        writer.commit(ordinal, shards[ordinal])
    return writer, plan, writer.seal(plan)


def contents(path):
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(Path(path).rglob("*")) if file.is_file()}


def assert_same(got, expected, *, bound):
    for field in ("sequence_id", "document_id"):
        assert getattr(got, field) == getattr(expected, field)
    for field in ("token_ids", "completion_mask", "top_ids"):
        np.testing.assert_array_equal(getattr(got, field), getattr(expected, field))
    np.testing.assert_allclose(got.top_logprobs, expected.top_logprobs, atol=bound)
    np.testing.assert_allclose(got.log_tail_mass, expected.log_tail_mass, atol=bound)
    np.testing.assert_allclose(got.label_logprob, expected.label_logprob, atol=bound)


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize(("codec", "bound"), [("ld8", 0.05), ("ld16", 2e-4)])
def test_what_goes_in_comes_out(tmp_path, container, codec, bound):
    build(tmp_path / "c", container=container, codec=codec)
    cache = CacheReader.open(str(tmp_path / "c"))
    expected = [record for shard in SHARDS for record in shard]
    assert len(cache) == len(expected)
    assert cache.token_count == sum(map(len, expected))
    assert cache.lengths.tolist() == [len(record) for record in expected]
    assert cache.shard_of.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    for got, record in zip(cache, expected, strict=True):
        assert_same(got, record, bound=bound)


def test_both_containers_hold_equal_arrays(tmp_path):
    for container in CONTAINERS:
        build(tmp_path / container, container=container)
    left, right = (CacheReader.open(str(tmp_path / container)) for container in CONTAINERS)
    for a, b in zip(left, right, strict=True):
        for field in dataclasses.fields(a):
            if field.name != "extras":
                np.testing.assert_array_equal(getattr(a, field.name), getattr(b, field.name))


def test_plain_libraries_open_the_shards(tmp_path):
    for container in CONTAINERS:
        build(tmp_path / container, container=container)
    record, codec, layout = SHARDS[0][1], get_codec("ld8"), make_identity().layout
    names = {"tokens": len(record), "sequence_id": record.sequence_id, "document_id": record.document_id}
    (arrow,) = (tmp_path / "arrow" / "shards").glob("00000-*.arrow")
    row = pa.ipc.open_file(pa.memory_map(str(arrow))).read_all().to_pylist()[1]
    payload = row.pop("payload")
    assert row == names
    assert_same(decode_sequence(codec, layout, payload, **names), record, bound=0.05)
    (zipped,) = (tmp_path / "zarr" / "shards").glob("00000-*.zarr.zip")
    store = zarr.storage.ZipStore(zipped, mode="r")
    group = zarr.open_group(store, mode="r")
    start, stop = group["offset"][1:3]
    assert group.attrs["sequence_ids"][1] == record.sequence_id
    assert group["tokens"][1] == len(record)
    assert group["payload"][int(start) : int(stop)].tobytes() == payload
    store.close()


@pytest.mark.parametrize("container", CONTAINERS)
def test_an_interrupted_build_ends_in_the_same_bytes(tmp_path, container):
    build(tmp_path / "whole", container=container)
    _, _, sealed = build(tmp_path / "halves", container=container, order=[2])
    assert sealed is None
    with pytest.raises(IncompleteCache, match="no manifest; finish it with the same cache-builder build"):
        CacheReader.open(str(tmp_path / "halves"))
    writer, plan, sealed = build(tmp_path / "halves", container=container)
    assert sealed is not None
    assert writer.pending(plan) == []
    assert contents(tmp_path / "halves") == contents(tmp_path / "whole")


def test_a_shard_committed_twice_counts_once(tmp_path):
    writer, _, _ = build(tmp_path / "c", order=[0, 1])
    before = contents(tmp_path / "c")
    assert not writer.commit(0, SHARDS[0])
    assert contents(tmp_path / "c") == before
    # Another machine's low bits: the loser's file goes, the winner's stays.
    other = [make_record(99 + i, tokens=3 + i, name=record.sequence_id) for i, record in enumerate(SHARDS[1])]
    assert not writer.commit(1, other)
    assert contents(tmp_path / "c") == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 3}, r"capture\.top_k: the cache has 4, asked for 3"),
        ({"codec": "ld16", "container": "zarr"}, "codec: the cache has 'ld8', asked for 'ld16'; container"),
        ({"vocab_size": 51}, r"tokenizer\.vocab_size: the cache has 50, asked for 51"),
    ],
)
def test_another_identity_is_refused_and_nothing_written(tmp_path, change, message):
    build(tmp_path / "c", order=[0])
    before = contents(tmp_path / "c")
    with pytest.raises(IdentityMismatch, match=message + ".*or choose another output"):
        CacheWriter.open(str(tmp_path / "c"), make_identity(**change))
    assert contents(tmp_path / "c") == before


def test_another_corpus_is_refused(tmp_path):
    writer, _, _ = build(tmp_path / "c", order=[0])
    with pytest.raises(IdentityMismatch, match="max_length: the cache has None, asked for 7"):
        writer.plan({"dataset": "made up", "max_length": 7})


def test_another_provenance_is_a_warning(tmp_path, caplog):
    writer, _, _ = build(tmp_path / "c")
    writer.record_provenance({"vllm": "0.32.0"})
    with caplog.at_level(logging.WARNING):
        writer.record_provenance({"vllm": "0.33.0"})
    assert "vllm: the cache has '0.32.0', asked for '0.33.0'" in caplog.text
    assert CacheReader.open(str(tmp_path / "c")).provenance == {"vllm": "0.32.0"}


def test_an_engine_that_breaks_an_invariant_makes_no_shard(tmp_path):
    broken = dataclasses.replace(SHARDS[0][0], log_tail_mass=np.full(3, np.log(0.5), np.float32))
    writer = CacheWriter.open(str(tmp_path / "c"), make_identity())
    with pytest.raises(CorruptShard, match=r"sequence 0/0/0 .* mass of 1\.\d+, expected 1"):
        writer.commit(0, [broken])
    assert not (tmp_path / "c" / "shards").exists()


def test_a_reader_can_be_sent_to_another_process(tmp_path):
    build(tmp_path / "c")
    cache = pickle.loads(pickle.dumps(CacheReader.open(str(tmp_path / "c"))))
    assert_same(cache.read(4), SHARDS[1][1], bound=0.05)
    with pytest.raises(IndexError):
        cache.read(9)


@pytest.mark.parametrize("container", CONTAINERS)
def test_every_flipped_byte_is_found_or_changes_nothing(tmp_path, container):
    """Every byte in turn. Nothing reads plan.json, or a container around its payloads; all else is found."""
    build(tmp_path / "c", shards=[[make_record(1, tokens=4), make_record(2, tokens=2)]], container=container)
    expected = list(CacheReader.open(str(tmp_path / "c")))
    index = json.loads((tmp_path / "c" / "shards" / "00000.index").read_bytes())
    payloads = {
        position
        for offset, length in zip(index["offsets"], index["lengths"], strict=True)
        for position in range(offset, offset + length)
    }
    for name, original in contents(tmp_path / "c").items():
        file = tmp_path / "c" / name
        for position in range(len(original)):
            damaged = bytearray(original)
            damaged[position] ^= 1 << (position % 8)
            file.write_bytes(damaged)
            harmless = name == "plan.json" or (name == index["file"] and position not in payloads)
            try:
                got = list(CacheReader.open(str(tmp_path / "c")))
            except CacheError:
                assert not harmless
            else:
                assert harmless, f"{name} byte {position}"
                for a, b in zip(got, expected, strict=True):
                    assert_same(a, b, bound=0)
        file.write_bytes(original)


def test_lost_and_cut_files_are_named(tmp_path):
    build(tmp_path / "c")
    (file,) = (tmp_path / "c" / "shards").glob("00001-*")
    original = file.read_bytes()
    file.write_bytes(original[:-1])
    with pytest.raises(CorruptShard, match=r"shard 00001 is damaged: .*bytes, expected .*restore that file"):
        CacheReader.open(str(tmp_path / "c"))
    file.write_bytes(original)
    cache = CacheReader.open(str(tmp_path / "c"))
    file.unlink()
    with pytest.raises(IncompleteCache, match="shard 00001 is missing"):
        cache.read(3)
    with pytest.raises(IncompleteCache, match="shard 00001 is missing"):
        CacheReader.open(str(tmp_path / "c"))
    for name in ("identity.json", "manifest-1.json"):
        (tmp_path / "c" / name).unlink()
        with pytest.raises(IncompleteCache):
            CacheReader.open(str(tmp_path / "c"))


def test_swapped_shards_are_found(tmp_path):
    shards = [[make_record(s, tokens=5)] for s in range(2)]
    build(tmp_path / "c", shards=shards)
    first, second = sorted((tmp_path / "c" / "shards").glob("*.arrow"))
    a, b = first.read_bytes(), second.read_bytes()
    first.write_bytes(b)
    second.write_bytes(a)
    with pytest.raises(CorruptShard):
        list(CacheReader.open(str(tmp_path / "c")))


@pytest.mark.parametrize("digest", ["kept", "made anew"])
def test_edited_manifests(tmp_path, digest):
    """A careless edit fails the manifest's own digest; a stranger's careful one still cannot leave the cache."""
    build(tmp_path / "c")
    path = tmp_path / "c" / "manifest-1.json"
    original = path.read_bytes()

    def edit(**changes):
        table = json.loads(original)
        table["shards"][0].update(changes)
        if digest != "kept":
            table["digest"] = None
            plain = json.dumps(table, sort_keys=True, indent=1, ensure_ascii=False).encode() + b"\n"
            table["digest"] = hashlib.sha256(plain).hexdigest()
        path.write_text(json.dumps(table))

    for changes in (
        {"file": "../secret"},
        {"index": "/etc/passwd"},
        {"tokens": 5000},
        {"sequences": 1},
        {"file_bytes": 3},
        {"index_sha256": "f" * 64},
        {"unknown": 1},
        {"tokens": "many"},
    ):
        edit(**changes)
        with pytest.raises(CacheError):
            list(CacheReader.open(str(tmp_path / "c")))


def test_a_newer_format_says_so(tmp_path):
    build(tmp_path / "c")
    path = tmp_path / "c" / "manifest-1.json"
    path.write_text(path.read_text().replace('"schema_version": 1', '"schema_version": 2'))
    with pytest.raises(UnsupportedFormat, match="schema version 2, known here: 1; update logitcask"):
        CacheReader.open(str(tmp_path / "c"))


def test_what_is_no_cache(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "none", tmp_path / "file"):
        with pytest.raises(IncompleteCache, match="no manifest; give a cache's path"):
            CacheReader.open(str(path))
