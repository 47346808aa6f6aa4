import pytest

from storage_schemas.errors import RequestError
from storage_schemas.settings import Settings, load_settings, write_settings


class Inner(Settings):
    max_length: int = 8
    name: str | None = None


class Outer(Settings):
    inner: Inner
    rate: float = 0.5
    words: tuple[str, ...] = ()


def test_file_then_overrides_in_order(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text('rate = 0.25\n[inner]\nmax_length = 16\nname = "file"\n')
    overrides = ["inner.name=org/name", "inner.max_length=1", "inner.max_length=2", 'words=["a", "b"]']
    got = load_settings(Outer, path=str(path), overrides=overrides)
    assert got == Outer(rate=0.25, inner=Inner(max_length=2, name="org/name"), words=("a", "b"))


def test_what_is_written_reads_back(tmp_path):
    settings = Outer(inner=Inner(max_length=3), words=("x",))
    write_settings(settings, tmp_path / "c.toml")
    assert load_settings(Outer, path=str(tmp_path / "c.toml")) == settings


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["inner.max_lenght=3"], "unknown setting 'inner.max_lenght'; did you mean 'max_length'"),
        (["inner={}", "zzz=3"], "unknown setting 'zzz'; known here: inner, rate, words"),
        (["inner.max_length=many"], "setting inner.max_length: .*integer.*got 'many'"),
        ([], "setting inner: field required"),
        (["inner.max_length"], "expected section.key=value, got 'inner.max_length'"),
        (["rate=1", "rate.x=1"], "goes into 'rate', which is a value"),
    ],
)
def test_mistakes_are_named(overrides, message):
    with pytest.raises(RequestError, match=message):
        load_settings(Outer, overrides=overrides)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(RequestError, match="cannot read the configuration"):
        load_settings(Outer, path=str(tmp_path / "none.toml"))
    (tmp_path / "bad.toml").write_text("= nothing")
    with pytest.raises(RequestError, match="not valid TOML"):
        load_settings(Outer, path=str(tmp_path / "bad.toml"))
