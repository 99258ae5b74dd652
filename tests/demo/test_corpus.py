from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from gauge_ext.demo.corpus import Pair, first_sentence, split_pairs, stdlib_pairs, words_of
from gauge_ext.errors import GaugeError


def library(root: Path, **sources: str) -> Path:
    """Write sources: ``package__module="text"`` becomes package/module.py."""
    for name, text in sources.items():
        path = root / (name.replace("__", "/", 1) + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def define(*names: str, says: str = "Does something useful with {}") -> str:
    return "\n".join(f'def {n}():\n    """{says.format(n)}."""' for n in names)


def names(root: Path) -> list[str]:
    return [pair.name for pair in stdlib_pairs(root)]


@dataclass(frozen=True)
class Library:
    pairs: list[Pair]
    imported_before: set[str]
    imported_by_reading: set[str]


@pytest.fixture(scope="module")
def read() -> Library:
    before = set(sys.modules)
    pairs = stdlib_pairs()
    return Library(pairs, before, set(sys.modules) - before)


@pytest.fixture
def real(read: Library) -> list[Pair]:
    return read.pairs


def test_nothing_of_the_library_is_imported(read: Library) -> None:
    assert read.imported_by_reading == set()
    described = {pair.name.split(".")[0] for pair in read.pairs}
    assert len(described - read.imported_before) > 10  # else nothing was left to import


def test_real_library_is_large_unique_and_sorted(real: list[Pair]) -> None:
    assert len(real) > 2500
    assert real == sorted(real)
    assert len({pair.name for pair in real}) == len(real)
    assert len({pair.sentence.lower() for pair in real}) == len(real)
    assert not any(part.startswith("_") for pair in real for part in pair.name.split("."))
    assert not {"test", "idlelib", "lib2to3"} & {pair.name.split(".")[0] for pair in real}


def test_real_library_by_public_names(real: list[Pair]) -> None:
    sentences = {pair.name: pair.sentence for pair in real}
    assert sentences["shutil.rmtree"] == "Recursively delete a directory tree"
    assert sentences["threading.Thread.join"] == "Wait until the thread terminates"
    for name in ("json.JSONDecoder", "unittest.TestCase.assertRaises", "decimal.Decimal"):
        assert name in sentences
    assert "json.decoder.JSONDecoder" not in sentences


def test_sources_are_parsed_and_not_run(tmp_path: Path) -> None:
    library(tmp_path, bomb="raise SystemExit('imported')\n" + define("f"))
    assert names(tmp_path) == ["bomb.f"]


def test_equal_libraries_give_equal_pairs(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        library(tmp_path / folder, b=define("g", "f"), a__c=define("h"))
    assert stdlib_pairs(tmp_path / "one") == stdlib_pairs(tmp_path / "two")
    assert names(tmp_path / "one") == ["a.c.h", "b.f", "b.g"]


def test_of_one_sentence_the_shortest_name_stays(tmp_path: Path) -> None:
    shared = "Does the very same thing"
    library(tmp_path, a__deep=define("f", says=shared), b=define("g", says=shared.upper()))
    assert stdlib_pairs(tmp_path) == [Pair("b.g", shared.upper())]


def test_property_and_setter_are_one_name(tmp_path: Path) -> None:
    getter = '    @x\n    def size(self):\n        """Gets the size of it all."""\n'
    library(tmp_path, m="class C:\n" + getter + getter.replace("Gets", "Sets"))
    assert stdlib_pairs(tmp_path) == [Pair("m.C.size", "Gets the size of it all")]


def test_tests_private_names_and_unparsable_files_are_left_out(tmp_path: Path) -> None:
    library(
        tmp_path,
        test__test_a=define("f1"),
        tests__b=define("f2"),
        idlelib__c=define("f3"),
        a__d=define("f4", "_hidden"),
        a__e="class _C:\n    def m(self):\n        'Does a lot of useful things.'",
        broken="def (:",
    )
    (tmp_path / "_private.py").write_text(define("f5"))
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "p.py").write_text(define("f6"))
    assert names(tmp_path) == ["a.d.f4"]


def test_reexported_names_are_the_public_ones(tmp_path: Path) -> None:
    library(
        tmp_path,
        package____init__="from .inner import f as renamed\nfrom package.star import *\n",
        package__inner=define("f", "g"),
        package__star="__all__ = ['h']\n__all__ += ['i']\n" + define("h", "i", "j"),
        public="try:\n    from _fast import *\nexcept ImportError:\n    from _slow import *\n",
        user="from _slow import k\n",
        declares="__all__ = ('m',)\nfrom _slow import m\n",
    )
    (tmp_path / "_slow.py").write_text("__all__ = ['k']\n" + define("k", "m"))
    assert names(tmp_path) == [
        "declares.m",  # passed on by __all__
        "package.h",
        "package.i",
        "package.inner.g",
        "package.renamed",
        "package.star.j",
        "public.k",  # not user.k, which merely imports it
    ]


def test_no_sources_is_an_error_that_says_where(tmp_path: Path) -> None:
    with pytest.raises(GaugeError, match="no documented Python sources") as caught:
        stdlib_pairs(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        ("Open a file, e.g. a text file. Then more.", "Open a file, e.g. a text file"),
        (
            "Return the *last* ``item``\nof a :class:`list`.\n\nDetails.",
            "Return the last item of a list",
        ),
        ("Is this the real life? Or not.", "Is this the real life"),
        ("popen(cmd, mode='r') -> pipe\n\nOpen a pipe to a command.", "Open a pipe to a command"),
        ("match(pattern): find the first match in it", "find the first match in it"),
        ("Returns version 3.11 of the thing. Yes.", "Returns version 3.11 of the thing"),
        ("One of the following values:\n\n* a", "One of the following values"),
        ("Emit a record.", None),
        ("Same as a + b.", None),
        ("Deprecated since version three, do not use it.", None),
        (">>> import os as the operating system", None),
        ("", None),
    ],
)
def test_first_sentence(docstring: str, sentence: str | None) -> None:
    assert first_sentence(docstring) == sentence


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("json.JSONDecoder.raw_decode", "json JSON Decoder raw decode"),
        ("base64.b64encode", "base64 b64 encode"),
        ("imaplib.IMAP4_SSL", "imaplib IMAP4 SSL"),
        ("http.client.HTTPConnection", "http client HTTP Connection"),
    ],
)
def test_words_of(name: str, words: str) -> None:
    assert words_of(name) == words


def test_split_is_disjoint_complete_and_repeatable(pairs: list[Pair]) -> None:
    split = split_pairs(pairs, 8, seed=3)
    assert len(split.held_out) == 8
    assert sorted(split.train + split.held_out) == sorted(pairs)
    assert split == split_pairs(list(reversed(pairs)), 8, seed=3)
    assert split != split_pairs(pairs, 8, seed=4)


@pytest.mark.parametrize("held_out", [0, -1, 50, 51])
def test_split_refuses_an_empty_side(pairs: list[Pair], held_out: int) -> None:
    with pytest.raises(GaugeError, match=f"between 1 and 49 for 50 pairs, got {held_out}"):
        split_pairs(pairs, held_out, seed=0)
