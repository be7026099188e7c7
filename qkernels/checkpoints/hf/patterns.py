"""Regular expressions and name lists from a `quantization_config`, matched in bounded time.

A pattern that backtracks without end ("(?:[a-z.]+)+!") would keep a loader busy for hours. So `re`
checks each pattern, because other tools use its syntax, and `regex` runs it, because `regex` has
the same syntax and a time limit.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from typing import NamedTuple

import regex

#: CPU seconds of this thread that all patterns of one config may take together
SECONDS = 2.0
#: seconds of each match that do not count: names times patterns of a large mixture are millions
_HARMLESS = 5e-6
#: patterns that are tried in one alternation
_UNION_SIZE = 64
#: pattern syntax whose meaning changes inside an alternation: references to groups, group names,
#: flags
_ALONE = re.compile(r"\\[1-9gk]|\(\?(?![:=!]|<[=!])")
_MAX_PATTERN = 1000
#: product of nested counts: a compiled (a{n}){m} holds n * m copies in memory
_MAX_COUNTS = 20_000
#: counts in a pattern without escapes: {3}, {1,3}, {,3}. `re` reads other braces literally, `regex`
#: reads them as fuzzy matches.
_COUNTS = re.compile(r"(\)?)\{(\d*)(?:,(\d*))?\}")
_PLAIN = re.compile(r"[A-Za-z0-9_.]+")
#: the end of a component of a name, or the position after the dot behind it
_BOUNDARY = r"(?:(?<=\.)|(?=\.|$))"


class Patterns:
    """Compiles and matches the patterns of one config within a common time limit."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self._all = self._left = seconds

    def spend(self, seconds: float, field: str, text: str) -> None:
        """Subtract `seconds` from the time left. ValueError if none is left."""
        self._left -= max(0.0, seconds)
        if self._left <= 0:
            raise ValueError(
                f"{field}: expected patterns that take at most {self._all:g} s in all, got more at "
                f"{text!r:.60}"
            )

    def match(self, pattern: Pattern, name: str, tries: int = 1) -> bool:
        """Whether `pattern` matches at the beginning of `name`. ValueError if the time is up.

        tries: how many patterns the alternation holds.
        """
        begin = time.thread_time()
        try:
            matched = pattern.compiled.match(name, timeout=self._left) is not None
        except TimeoutError:
            self.spend(self._all, pattern.field, pattern.text)
            raise
        self.spend(time.thread_time() - begin - _HARMLESS * tries, pattern.field, pattern.text)
        return matched

    def compile(self, field: str, text: str) -> Pattern:
        """The pattern `text`, compiled.

        Raises ValueError for an invalid pattern, one of more than 1000 characters, or too many
        repeats.
        """
        if len(text) > _MAX_PATTERN:
            raise ValueError(
                f"{field}: expected patterns of at most {_MAX_PATTERN} characters, got {len(text)}"
            )
        bare = re.sub(r"\\.", "", text, flags=re.DOTALL)
        # counts of groups multiply, because they may be nested; counts of characters add up
        groups, atoms = 1, 1
        for group, least, most in _COUNTS.findall(bare):
            count = max(1, *(int(count[:9]) for count in (least, most) if count))
            groups, atoms = (groups * count, atoms) if group else (groups, atoms + count)
        counts = groups * atoms
        if counts > _MAX_COUNTS:
            raise ValueError(
                f"{field}: expected counts of at most {_MAX_COUNTS} together, got {counts} in "
                f"{text!r:.60}"
            )
        rest = _COUNTS.sub("", bare)
        if "{" in rest or "[:" in rest:  # `re` and `regex` read these differently
            raise ValueError(
                f"{field}: expected no braces except counts and no [:class:], got {text!r:.60}"
            )
        begin = time.thread_time()
        try:
            re.compile(text)
            compiled = regex.compile(text, regex.VERSION0)
        except (re.error, regex.error, OverflowError, RecursionError) as error:
            raise ValueError(
                f"{field}: expected a regular expression, got {text!r:.60} ({error})"
            ) from None
        self.spend(time.thread_time() - begin, field, text)
        return Pattern(field, text, compiled)


class Pattern(NamedTuple):
    """A regular expression of module names, and the config field that it comes from."""

    field: str
    text: str
    compiled: regex.Pattern[str]


class Rules:
    """Names and patterns, each with a place in an order; the first match counts."""

    def __init__(self, patterns: Patterns) -> None:
        self._all = patterns
        self._names: dict[str, int] = {}
        self._patterns: list[tuple[int, Pattern]] = []
        self._unions: dict[int, Pattern | None] = {}

    def add_name(self, name: str, place: int) -> None:
        """Add a name that must match exactly."""
        self._names.setdefault(name, place)

    def add_pattern(self, field: str, text: str, place: int) -> None:
        """Add a pattern. Its `place` must not be less than those of earlier patterns."""
        # Our own writer makes one such pattern for each layer that differs.
        if (name := _literal(text)) is not None:
            self.add_name(name, place)
        else:
            self._patterns.append((place, self._all.compile(field, text)))

    def first(self, name: str) -> int | None:
        """The least place of all names and patterns that match `name`; None if none does."""
        name_place = self._names.get(name)
        for begin in range(0, len(self._patterns), _UNION_SIZE):
            if name_place is not None and self._patterns[begin][0] > name_place:
                break
            union = self._union(begin)
            if union is not None and not self._all.match(union, name, _UNION_SIZE):
                continue
            for place, pattern in self._patterns[begin : begin + _UNION_SIZE]:
                if name_place is not None and place > name_place:
                    break
                if self._all.match(pattern, name):
                    return place
        return name_place

    def _union(self, begin: int) -> Pattern | None:
        """An alternation of _UNION_SIZE patterns from `begin` on; most names match none of them.

        None if these patterns cannot be combined.
        """
        if begin not in self._unions:
            patterns = [pattern for _, pattern in self._patterns[begin : begin + _UNION_SIZE]]
            combinable = len(patterns) > 1 and not any(
                _ALONE.search(pattern.text) for pattern in patterns
            )
            text = "|".join(f"(?:{pattern.text})" for pattern in patterns)
            self._unions[begin] = (
                patterns[0]._replace(compiled=regex.compile(text, regex.VERSION0))
                if combinable
                else None
            )
        return self._unions[begin]


def _literal(text: str) -> str | None:
    """The only name that "^name$" matches, special characters escaped; else None."""
    if len(text) < 3 or text[0] != "^" or text[-1] != "$":
        return None
    name = re.sub(r"\\(.)", r"\1", text[1:-1])
    return name if re.escape(name) == text[1:-1] else None


class Skipped:
    """Modules to skip, by entries that match as in transformers.

    An entry matches a module if it matches the first components of its name as a pattern, or equals
    the end of its name as text.
    """

    def __init__(self, patterns: Patterns, field: str, entries: Iterable[str]) -> None:
        self._ends = set(entries)
        self._lengths = sorted({len(entry) for entry in self._ends})
        self._patterns = Rules(patterns)
        #: entries without special characters: length -> positions of dots, which match any
        #: character -> entries
        self._plain: dict[int, dict[tuple[int, ...], set[str]]] = {}
        for entry in dict.fromkeys(entries):
            if _PLAIN.fullmatch(entry):
                dots = tuple(i for i, letter in enumerate(entry) if letter == ".")
                self._plain.setdefault(len(entry), {}).setdefault(dots, set()).add(entry)
            else:
                self._patterns.add_pattern(field, f"(?:{entry}){_BOUNDARY}", 0)

    def __call__(self, name: str) -> bool:
        """Whether to skip the module called `name`."""
        if not self._ends:
            return False
        if any(
            name[len(name) - length :] in self._ends
            for length in self._lengths
            if length <= len(name)
        ):
            return True
        if any(self._begins(name, end) for end in range(1, len(name) + 1)):
            return True
        return self._patterns.first(name) is not None

    def _begins(self, name: str, end: int) -> bool:
        """Whether an entry matches the first `end` characters, and a component ends there."""
        groups = self._plain.get(end)
        if groups is None or not (end == len(name) or "." in name[end - 1 : end + 1]):
            return False
        return any(_dotted(name[:end], dots) in group for dots, group in groups.items())


def _dotted(text: str, dots: tuple[int, ...]) -> str:
    """`text` with dots at these positions."""
    letters = list(text)
    for i in dots:
        letters[i] = "."
    return "".join(letters)
