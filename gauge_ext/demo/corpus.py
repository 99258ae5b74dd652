"""The demo's data: what the standard library says about itself.

A pair is the first sentence of a docstring and the name that a user would type to reach the
function, method or class which it documents. The sources of the running Python are parsed with
``ast``; nothing is imported, so no module of the corpus runs (``antigravity`` opens a browser,
``this`` prints a poem) and none needs its C half. What is written in C has no source here and is
left out.
"""

from __future__ import annotations

import ast
import os
import random
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from gauge_ext.errors import GaugeError

# Tests and test data, applications, vendored code; distutils left the library in 3.12; ntpath says
# what posixpath says, in the same words.
_SKIPPED_PARTS = frozenset(
    (
        *("__pycache__", "site-packages", "dist-packages", "test", "tests", "idlelib"),
        *("turtledemo", "lib2to3", "distutils", "ensurepip", "pydoc_data", "ntpath"),
    )
)
_KNOWN_AS = {"posixpath": "os.path", "genericpath": "os.path"}
_SHORTEST_SENTENCE = 4  # words of two letters or more: "Same as a + b." describes too little
_PROSE = re.compile(r"[A-Za-z]{2,}")
_SENTENCE_END = re.compile(r"(?<!\be\.g)(?<!\bi\.e)(?<!\betc)(?<!\bvs)[.!?](?=\s|$)")
_MARKUP = re.compile(r":\w+:|[`*]")
_WORDS = re.compile(r"(?:[A-Z]+(?![a-z])|[A-Z]?[a-z]+)\d*|\d+")
_SIGNATURE = re.compile(r"^[\w.]+\(.*?\)\s*(?:->\s*[\w\[\]., ]+?)?\s*(?:[-:.]+\s+|\n|$)", re.DOTALL)
_NO_DESCRIPTION = re.compile(r">>>|^(deprecated|internal|undocumented|todo)\b", re.IGNORECASE)


@dataclass(frozen=True, order=True)
class Pair:
    """One example: ``sentence`` should lead to ``name``.

    Attributes:
        name: Qualified name, as a user would write it: ``json.JSONDecoder.decode``.
        sentence: First sentence of its docstring, without markup.
    """

    name: str
    sentence: str


@dataclass(frozen=True)
class Split:
    """Training pairs and the pairs held out for the measurement; no name or sentence in both."""

    train: list[Pair]
    held_out: list[Pair]


@dataclass
class _Module:
    """One parsed source: its dotted name, documented definitions, and what it passes on."""

    name: str
    is_package: bool
    documented: list[tuple[tuple[str, ...], str]] = field(default_factory=list)
    public: list[str] = field(default_factory=list)
    imports: list[tuple[str, str, str]] = field(default_factory=list)  # (module, name, as)


def stdlib_pairs(root: Path | None = None) -> list[Pair]:
    """Collects every documented public name of the standard library.

    Names are the public ones: what a package or a public module re-exports is called by that
    (``json.JSONDecoder``, not ``json.decoder.JSONDecoder``). Of several names with one sentence the
    shortest stays, since a query with several right answers measures nothing.

    Args:
        root: Folder of the library's sources; default: the running Python's.

    Returns:
        Pairs sorted by name; names are unique, and so are sentences (up to case).

    Raises:
        GaugeError: There are no sources, as in a Python that ships only byte code.
    """
    root = Path(os.__file__).parent if root is None else root
    modules = [_read(path, root) for path in _sources(root)]
    if not any(module.documented for module in modules):
        raise GaugeError(
            f"no documented Python sources under {root}, which the demo learns from.",
            hint="Run it with a Python that ships its library as .py files.",
        )
    public_name = _exports(modules)
    found: dict[str, str] = {}
    for module in modules:
        for path, docstring in module.documented:
            home = public_name.get((module.name, path[0]), f"{module.name}.{path[0]}")
            name = ".".join((home, *path[1:]))
            sentence = first_sentence(docstring)
            if sentence is not None and not _is_private(name):
                found.setdefault(name, sentence)  # of a property and its setter, the first speaks
    return _deduplicated(Pair(name, sentence) for name, sentence in found.items())


def split_pairs(pairs: list[Pair], held_out: int, seed: int) -> Split:
    """Draws ``held_out`` pairs for the measurement; the rest is for training.

    Args:
        pairs: Deduplicated pairs, as ``stdlib_pairs`` returns them.
        held_out: How many are kept from training.
        seed: The draw; equal pairs and seeds give equal splits.

    Raises:
        GaugeError: Fewer than one pair would be left to train on.
    """
    if not 0 < held_out < len(pairs):
        raise GaugeError(
            f"held_out must lie between 1 and {len(pairs) - 1} for {len(pairs)} pairs, "
            f"got {held_out}."
        )
    shuffled = random.Random(seed).sample(sorted(pairs), len(pairs))
    return Split(train=sorted(shuffled[held_out:]), held_out=sorted(shuffled[:held_out]))


def first_sentence(docstring: str) -> str | None:
    """Returns the first sentence as plain words, or None when it describes nothing.

    A leading signature (``popen(cmd) -> pipe``) is dropped, for it would give the name away; so is
    markup. What is left must have a few words and be neither an example nor an excuse.
    """
    text = _SIGNATURE.sub("", docstring.strip(), count=1)
    paragraph = " ".join(text.strip().split("\n\n")[0].split())
    end = _SENTENCE_END.search(paragraph)
    sentence = paragraph[: end.start()] if end else paragraph.rstrip(":;,.")
    sentence = " ".join(_MARKUP.sub("", sentence).split())
    if len(_PROSE.findall(sentence)) < _SHORTEST_SENTENCE or _NO_DESCRIPTION.search(sentence):
        return None
    return sentence


def words_of(name: str) -> str:
    """Writes ``json.JSONDecoder.raw_decode`` as ``json JSON Decoder raw decode``.

    The encoder was trained on prose, and its tokenizer cuts ``JSONDecoder`` into pieces without
    meaning: as words, names are found better before and after training (recall@1 0.55 and 0.66
    against 0.52 and 0.65, one epoch of one seed).
    """
    return " ".join(_WORDS.findall(name))


def _sources(root: Path) -> Iterator[Path]:
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if not any(part in _SKIPPED_PARTS or "-" in part for part in parts):
            yield path


def _read(path: Path, root: Path) -> _Module:
    parts = path.relative_to(root).with_suffix("").parts
    is_package = parts[-1] == "__init__"
    name = ".".join(parts[:-1] if is_package else parts)
    module = _Module(_KNOWN_AS.get(name, name), is_package)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old sources
            tree = ast.parse(path.read_bytes())
    except SyntaxError:  # templates and samples that were never meant to be parsed
        return module
    declared: list[str] | None = None
    for node in _statements(tree.body):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            module.documented.extend(_documented(node, ()))
            module.public.append(node.name)
        elif isinstance(node, ast.ImportFrom):
            source = _absolute(node, module)
            module.imports += [(source, a.name, a.asname or a.name) for a in node.names]
        elif isinstance(node, (ast.Assign, ast.AugAssign)):
            declared = _declared(node, declared)
    module.public = [n for n in module.public if n[0] != "_"] if declared is None else declared
    return module


def _statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Yields a module's statements, those inside its top-level ``try`` and ``if`` included."""
    for node in body:
        yield node
        if isinstance(node, (ast.If, ast.Try)):
            yield from _statements(node.body)
            yield from _statements(node.orelse)
            for handler in getattr(node, "handlers", ()):
                yield from _statements(handler.body)


def _documented(
    node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, prefix: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], str]]:
    path = (*prefix, node.name)
    docstring = ast.get_docstring(node)
    if docstring:
        yield path, docstring
    if isinstance(node, ast.ClassDef):
        for child in node.body:
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                yield from _documented(child, path)


def _declared(node: ast.Assign | ast.AugAssign, before: list[str] | None) -> list[str] | None:
    """Returns what ``__all__`` holds after ``node``, as far as it is written out as strings."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    names_all = any(isinstance(t, ast.Name) and t.id == "__all__" for t in targets)
    if not names_all or not isinstance(node.value, (ast.List, ast.Tuple)):
        return before
    names = [e.value for e in node.value.elts if isinstance(e, ast.Constant)]
    kept = (before or []) if isinstance(node, ast.AugAssign) else []
    return kept + [n for n in names if isinstance(n, str)]


def _absolute(node: ast.ImportFrom, module: _Module) -> str:
    """Returns the dotted name of the module that ``node`` imports from."""
    if node.level == 0:
        return node.module or ""
    parts = module.name.split(".")
    base = parts[: len(parts) - node.level + module.is_package]
    return ".".join([*base, *([node.module] if node.module else [])])


def _exports(modules: list[_Module]) -> dict[tuple[str, str], str]:
    """Maps (defining module, name) to the public name, where another module passes it on.

    A package speaks for the modules in it (``json`` for ``json.decoder``), and a module for a
    private one that it passes on as a whole or by its own ``__all__`` (``decimal`` for
    ``_pydecimal``). Any other import is mere use.
    """
    by_name = {module.name: module for module in modules}
    public: dict[tuple[str, str], str] = {}
    for exporter in modules:
        for source, name, alias in exporter.imports:
            around = exporter.is_package and source.startswith(exporter.name + ".")
            passes = _is_private(source) and (name == "*" or alias in exporter.public)
            if source not in by_name or not (around or passes):
                continue
            names = by_name[source].public if name == "*" else [name]
            for passed_on in names:
                candidate = f"{exporter.name}.{passed_on if name == '*' else alias}"
                key = (source, passed_on)
                if not _is_private(candidate):
                    public[key] = min(public.get(key, candidate), candidate, key=_brevity)
    return public


def _is_private(name: str) -> bool:
    return any(part.startswith("_") for part in name.split("."))


def _brevity(name: str) -> tuple[int, str]:
    return name.count("."), name


def _deduplicated(pairs: Iterable[Pair]) -> list[Pair]:
    by_sentence: dict[str, Pair] = {}
    for pair in sorted(pairs, key=lambda p: _brevity(p.name)):
        by_sentence.setdefault(pair.sentence.lower(), pair)
    return sorted(by_sentence.values())
