import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from molegrad.gpt.data import sources


def words(parts):
    return "\n".join(d.text for part in parts for d in part.documents()).split()


def write_parquet(path, texts, group=3, column="text"):
    pq.write_table(pa.table({column: texts}), path, row_group_size=group)
    return path


def paragraphs(count):
    return "\n\n".join(f"Paragraph {i} has " + f"word{i} " * 20 for i in range(count)) + "\n"


def test_text_splits_at_a_paragraph_and_loses_nothing(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(paragraphs(400))
    train, val, rule = sources.split_files([path], 0.1)
    assert train[-1].stop == val[0].start and val[-1].stop == path.stat().st_size
    assert abs(val[0].start / path.stat().st_size - 0.9) < 0.02
    documents = [d.text for d in val[0].documents()]
    assert documents[0].startswith("Paragraph ")
    assert words(train) + words(val) == path.read_text().split()
    assert "last 10.0%" in rule


def test_documents_end_at_blank_lines_and_separators(tmp_path):
    path = tmp_path / "a.txt"
    long = "line of text\n" * 400
    path.write_text(f"first\n\nstill first\n<|endoftext|>\n{long}\nafter the blank line\n")
    (part,) = sources.whole(path)
    texts = [d.text for d in part.documents()]
    assert texts == ["first\n\nstill first", long.strip(), "after the blank line"]


def test_one_endless_line_is_cut_and_characters_survive(tmp_path):
    path = tmp_path / "a.txt"
    text = "aé漢😀" * 50_000
    path.write_text(text, encoding="utf-8")
    (part,) = sources.whole(path)
    texts = [d.text for d in part.documents()]
    assert len(texts) > 5 and "".join(texts) == text
    assert max(map(len, texts)) <= sources.MAX_DOC_CHARS + (1 << 16)


def test_large_text_becomes_several_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PART_BYTES", 5000)
    path = tmp_path / "a.txt"
    path.write_text(paragraphs(200))
    parts = sources.whole(path)
    assert len(parts) > 3
    assert all(a.stop == b.start for a, b in zip(parts, parts[1:], strict=False))
    assert words(parts) == path.read_text().split()
    assert len({part.fingerprint() for part in parts}) == len(parts)


def test_several_text_files(tmp_path):
    for i in range(4):
        (tmp_path / f"{i}.txt").write_text(paragraphs(50))
    files = sources.find_files(tmp_path)
    train, val, _ = sources.split_files(files, 0.25)
    assert {p.path.name for p in train} == {"0.txt", "1.txt", "2.txt"}
    assert {p.path.name for p in val} <= {"2.txt", "3.txt"} and val[-1].path.name == "3.txt"
    assert len(words(train) + words(val)) == 4 * len(paragraphs(50).split())


def test_parquet_one_file_by_rows_several_by_file(tmp_path):
    texts = [f"row {i}" for i in range(10)]
    one = write_parquet(tmp_path / "a.parquet", texts)
    train, val, _ = sources.split_files([one], 0.3)
    assert [d.text for d in train[0].documents()] == texts[:7]
    assert [d.text for d in val[0].documents()] == texts[7:]
    two = write_parquet(tmp_path / "b.parquet", ["", None, "last"])
    train, val, rule = sources.split_files([one, two], 0.3)
    assert len(words(train)) == 20 and words(val) == ["last"]
    assert "last parquet file" in rule


def test_parquet_errors_name_the_file(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", ["x"], column="content")
    with pytest.raises(ValueError, match="no column 'text'.*content"):
        sources.whole(path)
    path.write_bytes(b"PAR1 nonsense")
    with pytest.raises(ValueError, match="not a readable parquet file.*fetch it again"):
        sources.whole(path)


def test_parquet_fingerprint_sees_content(tmp_path):
    prints = []
    for name, texts in {"a": ["x", "y"], "b": ["x", "y"], "c": ["x", "z"]}.items():
        (tmp_path / name).mkdir()
        (part,) = sources.whole(write_parquet(tmp_path / name / "a.parquet", texts))
        prints.append(part.fingerprint())
    assert prints[0] == prints[1] != prints[2]


def test_missing_and_mixed_sources(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        sources.find_files(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="no .txt or .parquet"):
        sources.find_files(tmp_path)
    (tmp_path / "a.txt").write_text("x")
    write_parquet(tmp_path / "a.parquet", ["x"])
    with pytest.raises(ValueError, match="1 .txt and 1 .parquet"):
        sources.find_files(tmp_path)


def test_too_small_to_split(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one line")
    with pytest.raises(ValueError, match="can't be split.*--val-data"):
        sources.split_files([path], 0.1)
    one = write_parquet(tmp_path / "a.parquet", ["x"])
    with pytest.raises(ValueError, match="1 rows, too few"):
        sources.split_files([one], 0.1)
