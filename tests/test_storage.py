import errno
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from storage_schemas.errors import CorruptShard, RequestError
from storage_schemas.storage import LocalStorage, open_storage


@pytest.fixture(params=["nameless", "hidden temporary file"])
def storage(request, tmp_path, monkeypatch):
    """Both ways of writing: file systems without O_TMPFILE take the second."""
    if request.param != "nameless":
        real = os.open

        def without_tmpfile(path, flags, *arguments, **options):
            if flags & os.O_TMPFILE == os.O_TMPFILE:
                raise OSError(errno.EOPNOTSUPP, "not supported")
            return real(path, flags, *arguments, **options)

        monkeypatch.setattr(os, "open", without_tmpfile)
    return LocalStorage(tmp_path / "cache")


def test_a_name_is_written_once(storage):
    assert storage.put_new("shards/a.index", b"first")
    assert not storage.put_new("shards/a.index", b"second")
    assert storage.get("shards/a.index") == b"first"
    assert storage.get_range("shards/a.index", 1, 3) == b"irs"
    assert storage.get_range("shards/a.index", 3, 100) == b"st"
    assert storage.sizes("shards") == {"shards/a.index": 5}
    assert storage.sizes() == {}
    assert sorted(path.name for path in storage.root.rglob("*") if path.is_file()) == ["a.index"]


def test_of_many_writers_exactly_one_wins(storage):
    contents = [bytes([i]) * 10_000 for i in range(16)]
    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(lambda content: storage.put_new("x", content), contents))
    assert sum(won) == 1
    assert storage.get("x") == contents[won.index(True)]
    assert [path.name for path in storage.root.iterdir()] == ["x"]


def test_a_full_disk_leaves_nothing_and_says_so(storage, monkeypatch):
    storage.put_new("kept", b"kept")

    def full(descriptor, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(RequestError, match=r"no space left for .*what was committed before is safe"):
        storage.put_new("lost", b"lost")
    assert [path.name for path in storage.root.iterdir()] == ["kept"]


def test_an_output_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RequestError, match=r"cannot write .*file/cache/x: .*choose an output"):
        LocalStorage(tmp_path / "file" / "cache").put_new("x", b"")


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "shards/../../x", "a/b/c", "", ".hidden", "shards/", "a\\b", "a\n"]
)
def test_no_name_leads_out_of_the_cache(tmp_path, name):
    for act in (lambda s: s.get(name), lambda s: s.put_new(name, b""), lambda s: s.get_range(name, 0, 1)):
        with pytest.raises(CorruptShard, match="not the name of a file"):
            act(LocalStorage(tmp_path))


def test_schemes(tmp_path):
    assert open_storage(f"file://{tmp_path}").root == tmp_path
    with pytest.raises(RequestError, match="expected a local path, got 's3://bucket/cache'"):
        open_storage("s3://bucket/cache")
