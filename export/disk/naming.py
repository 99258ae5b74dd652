"""One rule that takes the paths of modules to names in a file."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Rename:
    """Path -> path, with one prefix taken away and another put there.

    A model saved or exported without its head lacks the prefix that paths within the whole have
    (``bert.``, ``model.``), and a wrapper around it adds one.
    """

    strip: str = ""
    add: str = ""

    def __call__(self, path: str) -> str:
        """The renamed path."""
        return self.add + path.removeprefix(self.strip)


def renamings(path: str, known: Iterable[str]) -> list[Rename]:
    """Every rule that makes a path one of the known ones: none if it is one already."""
    known = set(known)
    if path in known:
        return [Rename()]
    longer = [Rename(add=name.removesuffix(path)) for name in known if name.endswith(f".{path}")]
    shorter = [Rename(strip=path.removesuffix(name)) for name in known if path.endswith(f".{name}")]
    return sorted(longer + shorter, key=lambda rule: (rule.strip, rule.add))


def best_renamings(paths: Collection[str], known: Collection[str]) -> list[Rename]:
    """The rules that find most of the paths; several if they are equally good, none if none does.

    Of two rules that name the same, the first is kept.
    """
    known = set(known)
    rules = dict.fromkeys(rule for path in paths for rule in renamings(path, known))
    found = {
        rule: frozenset((path, rule(path)) for path in paths if rule(path) in known)
        for rule in rules
    }
    most = max(map(len, found.values()), default=0)
    best = {pairs: rule for rule, pairs in reversed(found.items()) if len(pairs) == most}
    return list(best.values()) if most else []
