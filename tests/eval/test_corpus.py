"""Corpora: the two parts are disjoint, deterministic, and what is missing is said."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest

from compress.errors import UserError
from compress.eval import corpus


def paragraphs(text: str) -> set[str]:
    return {" ".join(one.split()) for one in re.split(r"\n\s*\n", text)} - {""}


def test_pydoc_parts_share_no_paragraph() -> None:
    calibration, test = corpus.load("pydoc", "calibration"), corpus.load("pydoc", "test")
    assert not paragraphs(calibration.text) & paragraphs(test.text)
    assert min(len(calibration.text), len(test.text)) > 150_000  # 16 windows of 2048 tokens and some
    assert calibration.sha256 != test.sha256
    assert corpus.load("pydoc", "test") == test
    assert test.sha256 == hashlib.sha256(test.text.encode()).hexdigest()


def test_a_file_is_cut_at_a_line_break(text_file: Path) -> None:
    calibration = corpus.load(text_file, "calibration").text
    test = corpus.load(str(text_file), "test").text
    assert calibration + test == text_file.read_text()
    assert calibration.endswith("\n")
    assert test.startswith("line ")
    assert 0.79 < len(calibration) / len(calibration + test) < 0.81


def test_a_file_of_one_line_is_cut_too(tmp_path: Path) -> None:
    path = tmp_path / "one.md"
    path.write_text("abcde" * 20)
    assert len(corpus.load(path, "calibration").text) == 80
    assert len(corpus.load(path, "test").text) == 20


@pytest.mark.parametrize(
    "names",
    [
        ("test.raw.txt", "valid.calibration.txt"),
        ("wiki.test.raw", "wiki.train.raw"),
        ("wiki.test.raw", "wiki.valid.raw"),
        ("Test.txt", "validation.txt"),
    ],
)
def test_a_folder_with_named_parts(tmp_path: Path, names: tuple[str, str]) -> None:
    for name, content in zip(names, ("test words", "other words"), strict=True):
        (tmp_path / name).write_text(content)
    (tmp_path / "README.md").write_text("not part of it")
    assert corpus.load(tmp_path, "test").text == "test words"
    assert corpus.load(tmp_path, "calibration").text == "other words"


def test_a_name_within_a_word_is_no_part(tmp_path: Path) -> None:
    path = tmp_path / "latest-training-manual.txt"
    path.write_text("x\n" * 100)
    with pytest.raises(UserError, match=r"calibration part of a corpus, and test text was asked for"):
        corpus.load(path, "test")
    other = tmp_path / "latest-contest.txt"  # 'test' inside words
    other.write_text("x\n" * 100)
    assert len(corpus.load(other, "calibration").text) == 162  # cut, at the line break after 80%


def test_train_comes_before_validation(tmp_path: Path) -> None:
    for name in ("test.txt", "train.txt", "valid.txt"):
        (tmp_path / name).write_text(name)
    assert corpus.load(tmp_path, "calibration").text == "train.txt"


def test_a_folder_without_named_parts_is_cut(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt"):
        (tmp_path / name).write_text(f"{name}\n" * 50)
    calibration, test = (corpus.load(tmp_path, part).text for part in ("calibration", "test"))
    assert calibration.startswith("a.txt")
    assert set(test.split()) == {"b.txt"}
    assert calibration + test == "a.txt\n" * 50 + "\n\n" + "b.txt\n" * 50


def test_a_file_named_after_its_part_is_that_part_whole(tmp_path: Path) -> None:
    path = tmp_path / "test.raw.txt"
    path.write_text("all of it\n" * 10)
    assert corpus.load(path, "test").text == path.read_text()
    with pytest.raises(UserError, match=r"by its name this is the test part .* calibration text was asked for"):
        corpus.load(path, "calibration")


def test_line_ends_of_other_systems_are_the_same_text(tmp_path: Path) -> None:
    for name, end in (("unix", b"\n"), ("windows", b"\r\n")):
        (tmp_path / f"{name}.md").write_bytes(end.join([b"one", b"two"] * 40))
    assert corpus.load(tmp_path / "unix.md", "test").sha256 == corpus.load(tmp_path / "windows.md", "test").sha256


@pytest.mark.parametrize("part", ["calibration", "test"])
def test_what_is_missing_is_said(tmp_path: Path, part: corpus.Part) -> None:
    with pytest.raises(UserError, match=r"corpus pydocs: no such corpus.*pydoc, wikitext2"):
        corpus.load("pydocs", part)
    with pytest.raises(UserError, match=r"no text file in this folder; wanted files ending in \.txt or \.raw"):
        corpus.load(tmp_path, part)
    bad = tmp_path / "latin1.md"
    bad.write_bytes(b"caf\xe9\n" * 10)
    with pytest.raises(UserError, match="can't be read as UTF-8"):
        corpus.load(bad, part)


def test_half_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "test.txt").write_text("words")
    with pytest.raises(UserError, match=r"named as its calibration part; got test\.txt; wanted .*calibration.*train"):
        corpus.load(tmp_path, "calibration")


def test_wikitext2_out_of_reach_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def refuse(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach 'Salesforce/wikitext' on the Hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(
        UserError, match=r"corpus wikitext2: can't be fetched .*Couldn't reach.*pass the path of a folder"
    ):
        corpus.load("wikitext2", "test")


def test_wikitext2_rows_are_joined_by_two_newlines(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, split: {"text": ["", " = Title = \n", split]})
    assert corpus.load("wikitext2", "test").text == "\n\n = Title = \n\n\ntest"
    assert corpus.load("wikitext2", "calibration").text.endswith("train")
