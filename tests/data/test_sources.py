"""What the sources find, how files are cut, and what happens when there is nothing to find."""

import sysconfig

import pytest

from lowbit_jax.data import load_corpus


def documents(corpus):
    return [*corpus.train, *corpus.valid]


@pytest.fixture(scope="module")
def stdlib():
    return load_corpus("stdlib")


@pytest.fixture
def fake_stdlib(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    return tmp_path


def write(folder, **files):
    """Writes `folder/a/b.py` for the keyword a__b, as text or bytes."""
    for name, content in files.items():
        path = folder / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def test_stdlib_is_real_python_source_of_some_megabytes(stdlib):
    assert 5e6 < stdlib.byte_count("train") < 50e6
    # Files are of very different sizes, so that 5 % of them is only roughly 5 % of the bytes.
    share = stdlib.byte_count("valid") / stdlib.byte_count("train")
    assert 0.02 < share < 0.12
    assert any("class JSONDecoder" in text for text in documents(stdlib))


def test_stdlib_is_the_same_every_time(stdlib):
    again = load_corpus("stdlib")
    assert (again.sha256, again.train, again.valid) == (stdlib.sha256, stdlib.train, stdlib.valid)


def test_stdlib_leaves_out_what_is_not_the_library(fake_stdlib):
    write(fake_stdlib, os="os", json__decoder="json", email__mime__text="mime")
    kept = set(documents(load_corpus("stdlib")))
    sha256 = load_corpus("stdlib").sha256
    write(
        fake_stdlib,
        test__test_os="t",
        unittest__tests__x="t",
        idlelib__run="i",
        pydoc_data__topics="generated",
        _sysconfigdata_linux="of this machine",
    )
    (fake_stdlib / "notes.txt").write_text("not Python")
    for folder in ("site-packages", "dist-packages", "config-3.12-linux", "__pycache__"):
        (fake_stdlib / folder).mkdir()
        (fake_stdlib / folder / "x.py").write_text("x")
    assert set(documents(load_corpus("stdlib"))) == kept == {"os", "json", "mime"}
    assert load_corpus("stdlib").sha256 == sha256


def test_stdlib_order_and_fingerprint_follow_relative_names(fake_stdlib, tmp_path_factory):
    write(fake_stdlib, b="b", a__z="az", c="c", a="a")
    corpus = load_corpus("stdlib", valid_fraction=1e-9)  # exactly one file is for validation
    rest = [text for text in ["a", "az", "b", "c"] if text not in corpus.valid]
    assert list(corpus.train) == rest
    assert len(corpus.valid) == 1
    write(fake_stdlib, b="B")
    assert load_corpus("stdlib").sha256 != corpus.sha256


def test_stdlib_names_files_that_are_not_utf8(fake_stdlib):
    write(fake_stdlib, a="a", b="b", latin=b"# -*- coding: latin-1 -*-\nname = '\xe9'\n")
    corpus = load_corpus("stdlib")
    assert corpus.skipped == ("latin.py",)
    assert "latin.py" in str(corpus)
    assert sorted(documents(corpus)) == ["a", "b"]


def test_a_python_without_sources_is_an_error_that_says_so(fake_stdlib):
    with pytest.raises(FileNotFoundError, match=r"no \.py files in .*zipped.*text:GLOB"):
        load_corpus("stdlib")


def test_many_files_are_split_as_wholes(tmp_path):
    for i in range(40):
        (tmp_path / f"{i}.txt").write_text(f"{i} a\n\n{i} b\n\n\n\n{i} c")
    corpus = load_corpus(f"text:{tmp_path}/*.txt")
    numbers = [{text.split()[0] for text in split} for split in (corpus.train, corpus.valid)]
    assert not numbers[0] & numbers[1]
    assert len(documents(corpus)) == 120  # cut at the separator, blank documents dropped


def test_names_are_relative_so_that_a_corpus_can_move(tmp_path):
    for folder in ("here", "there/deep"):
        (tmp_path / folder).mkdir(parents=True)
        for i in range(40):
            (tmp_path / folder / f"{i}.txt").write_text(f"text {i}")
    here = load_corpus(f"text:{tmp_path}/here/*.txt")
    assert here.sha256 == load_corpus(f"text:{tmp_path}/there/deep/*.txt").sha256
    assert here.valid == load_corpus(f"text:{tmp_path}/there/deep/*.txt").valid
    everything = load_corpus(f"text:{tmp_path}/**/*.txt")
    assert len(documents(everything)) == 80


def test_one_file_is_cut_at_the_separator(tmp_path):
    stories = [f"story {i}, " + "word " * (i % 7) for i in range(300)]
    (tmp_path / "all.txt").write_text("<|end|>".join(stories))
    corpus = load_corpus(f"text:{tmp_path}/all.txt", separator="<|end|>")
    assert sorted(documents(corpus)) == sorted(stories)
    order = {story: i for i, story in enumerate(stories)}
    for split in (corpus.train, corpus.valid):
        assert [order[story] for story in split] == sorted(order[story] for story in split)


def test_one_file_without_separator_keeps_lines_whole_and_neighbours_together(tmp_path):
    lines = [f"{i:05} " + "x" * 50 + "\n" for i in range(4000)]
    (tmp_path / "lines.txt").write_text("".join(lines))
    corpus = load_corpus(f"text:{tmp_path}/lines.txt")
    found = [line for text in documents(corpus) for line in text.splitlines(keepends=True)]
    assert sorted(found) == lines
    # 228,000 characters in blocks of 4,096 are 56; cuts, which put a separator where the text had
    # none, are only where the side changes: at most on both sides of each validation block.
    assert len(corpus.train) <= len(corpus.valid) + 1
    assert 0 < corpus.byte_count("valid") < 0.2 * corpus.byte_count("train")


@pytest.mark.parametrize("text", ["word " * 2000, "x" * 10000], ids=["one line", "no space"])
def test_a_file_of_one_line_can_be_split(tmp_path, text):
    (tmp_path / "one.txt").write_text(text)
    corpus = load_corpus(f"text:{tmp_path}/one.txt")
    assert sum(len(t) for t in documents(corpus)) == len(text)
    assert {character for t in documents(corpus) for character in t} == set(text)


def test_real_text_splits_near_the_fraction_asked_for(assets):
    stories = load_corpus(
        f"text:{assets}/tinystories/train.txt", separator="<|endoftext|>", valid_fraction=0.1
    )
    assert len(documents(stories)) == 1500
    # 1.3 MB in blocks of 4,096 are 322 draws at 10 %: a standard deviation of 1.7 % of the text.
    share = stories.byte_count("valid") / (
        stories.byte_count("train") + stories.byte_count("valid")
    )
    assert abs(share - 0.1) < 4 * 0.017
    for split in ("train", "valid"):
        assert not any("<|endoftext|>" in text for text in stories.documents(split))


def test_no_matching_file_is_an_error_with_the_pattern(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"text:.*\*\.txt: no file matches .*quote"):
        load_corpus(f"text:{tmp_path}/*.txt")


def test_a_corpus_too_small_to_split_is_an_error_with_numbers(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match=r"the corpus has 1 separate piece"):
        load_corpus(f"text:{tmp_path}/a.txt")
    (tmp_path / "a.txt").write_text(" \n \n")
    with pytest.raises(ValueError, match=r"the corpus has 0 separate piece"):
        load_corpus(f"text:{tmp_path}/a.txt")


def test_text_that_is_not_utf8_is_an_error_with_file_and_byte(tmp_path):
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "image.txt").write_bytes(b"abc\xff\xfe")
    with pytest.raises(ValueError, match=r"image\.txt: not UTF-8 text \(.* at byte 3\)"):
        load_corpus(f"text:{tmp_path}/*.txt")


@pytest.mark.parametrize("source", ["stdlibs", "text:", "hf:", "", "file:a.txt", "stdlib:x"])
def test_an_unknown_source_lists_the_known_ones(source):
    with pytest.raises(ValueError, match=r"unknown source .*'stdlib', 'text:GLOB'.*'hf:NAME"):
        load_corpus(source)


def test_wrong_options_name_their_value():
    with pytest.raises(ValueError, match=r"valid_fraction is 1\.5"):
        load_corpus("stdlib", valid_fraction=1.5)
    with pytest.raises(ValueError, match="separator is empty"):
        load_corpus("stdlib", separator="")
