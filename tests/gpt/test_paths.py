import pytest

from molegrad.gpt import paths


def test_folders_lie_under_home(tmp_path, monkeypatch):
    monkeypatch.setenv(paths.ENV, str(tmp_path / "home"))
    assert paths.home() == tmp_path / "home"
    expected = {
        "tokenizer": paths.tokenizer_dir(),
        "tokenizers/bytes": paths.tokenizer_dir("bytes"),
        "data": paths.data_dir(),
        "report": paths.report_dir(),
        "runs/first-1.0_a": paths.run_dir("first-1.0_a"),
    }
    for name, path in expected.items():
        assert path == tmp_path / "home" / name
        assert path.is_dir()


def test_default_is_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.delenv(paths.ENV, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert paths.home() == tmp_path / ".cache" / "molegrad"


def test_tilde_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(paths.ENV, "~/here")
    assert paths.home() == tmp_path / "here"


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../x", "a b", "-x", "x.", "é", "a" * 101])
def test_bad_run_names(name):
    with pytest.raises(ValueError, match="run name") as info:
        paths.check_run_name(name)
    assert repr(name) in str(info.value)


def test_unwritable_home_names_the_variable(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(paths.ENV, str(tmp_path / "file" / "home"))
    with pytest.raises(OSError, match=paths.ENV):
        paths.home()
