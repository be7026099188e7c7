"""Regular expressions and lists of names from a `quantization_config`, matched in a bounded time.

A pattern that backtracks without end ("(?:[a-z.]+)+!") would keep a loader busy for hours. So
patterns are checked by `re`, whose language the field's tools use, and run by `regex`, which has
the same language and a time limit.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from typing import NamedTuple

import regex

#: seconds of this thread that all patterns of one config may take together
SECONDS = 2.0
#: of a match, which are for nothing: names and patterns of a large mixture come to millions
_HARMLESS = 5e-6
#: patterns tried as one
_TOGETHER = 64
#: what means something else beside other patterns: references to groups, names of groups, flags
_ALONE = re.compile(r"\\[1-9gk]|\(\?(?![:=!]|<[=!])")
_MAX_PATTERN = 1000
#: of a{n} within b{m} there are n * m in memory, once compiled
_MAX_COUNTS = 20_000
#: what a text without escapes says of counts: {3}, {1,3}, {,3}; `re` reads other braces as
#: themselves, `regex` as
#: fuzzy matches
_COUNTS = re.compile(r"(\)?)\{(\d*)(?:,(\d*))?\}")
_PLAIN = re.compile(r"[A-Za-z0-9_.]+")
#: where a component of a name ends, or the dot behind it
_BOUNDARY = r"(?:(?<=\.)|(?=\.|$))"


class Patterns:
    """The time that the patterns of one config have left."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self._all = self._left = seconds

    def spend(self, seconds: float, field: str, text: str) -> None:
        """ValueError if there is not so much."""
        self._left -= max(0.0, seconds)
        if self._left <= 0:
            raise ValueError(
                f"{field}: expected patterns that take at most {self._all:g} s in all, got more at {text!r:.60}"
            )

    def match(self, pattern: Pattern, name: str, tries: int = 1) -> bool:
        """Whether it matches the beginning of `name`. tries: of patterns in it. ValueError if the
        time is up.
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
        """A pattern. ValueError for none, one of more than 1000 characters, or one that repeats too
        much.
        """
        if len(text) > _MAX_PATTERN:
            raise ValueError(
                f"{field}: expected patterns of at most {_MAX_PATTERN} characters, got {len(text)}"
            )
        bare = re.sub(r"\\.", "", text, flags=re.DOTALL)
        # counts of groups may be nested, those of single characters only add up
        groups, atoms = (
            1,
            1,
        )
        for group, least, most in _COUNTS.findall(bare):
            count = max(1, *(int(count[:9]) for count in (least, most) if count))
            groups, atoms = (groups * count, atoms) if group else (groups, atoms + count)
        counts = groups * atoms
        if counts > _MAX_COUNTS:
            raise ValueError(
                f"{field}: expected counts of at most {_MAX_COUNTS} together, got {counts} in {text!r:.60}"
            )
        rest = _COUNTS.sub("", bare)
        if "{" in rest or "[:" in rest:  # where `re` and `regex` differ
            raise ValueError(
                f"{field}: expected no braces but counts and no [:class:], got {text!r:.60}"
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
    """A regular expression of module names, and the field that it comes from."""

    field: str
    text: str
    compiled: regex.Pattern[str]


class Rules:
    """Names and patterns in an order; the first that fits a name counts."""

    def __init__(self, patterns: Patterns) -> None:
        self._all = patterns
        self._names: dict[str, int] = {}
        self._patterns: list[tuple[int, Pattern]] = []
        self._together: dict[int, Pattern | None] = {}

    def add_name(self, name: str, place: int) -> None:
        self._names.setdefault(name, place)

    def add_pattern(self, field: str, text: str, place: int) -> None:
        """`place` must not be less than of those before it."""
        if (
            name := _literal(text)
        ) is not None:  # ours of many layers that differ are such: one each
            self.add_name(name, place)
        else:
            self._patterns.append((place, self._all.compile(field, text)))

    def first(self, name: str) -> int | None:
        """The least place of what fits `name`."""
        known = self._names.get(name)
        for begin in range(0, len(self._patterns), _TOGETHER):
            if known is not None and self._patterns[begin][0] > known:
                break
            union = self._union(begin)
            if union is not None and not self._all.match(union, name, _TOGETHER):
                continue
            for place, pattern in self._patterns[begin : begin + _TOGETHER]:
                if known is not None and place > known:
                    break
                if self._all.match(pattern, name):
                    return place
        return known

    def _union(self, begin: int) -> Pattern | None:
        """What matches if one of _TOGETHER patterns does: most names match none. None if they do
        not go together.
        """
        if begin not in self._together:
            own = [pattern for _, pattern in self._patterns[begin : begin + _TOGETHER]]
            together = len(own) > 1 and not any(_ALONE.search(pattern.text) for pattern in own)
            text = "|".join(f"(?:{pattern.text})" for pattern in own)
            self._together[begin] = (
                own[0]._replace(compiled=regex.compile(text, regex.VERSION0)) if together else None
            )
        return self._together[begin]


def _literal(text: str) -> str | None:
    """The one name that "^name$" matches, special characters escaped; None of any other pattern."""
    if len(text) < 3 or text[0] != "^" or text[-1] != "$":
        return None
    name = re.sub(r"\\(.)", r"\1", text[1:-1])
    return name if re.escape(name) == text[1:-1] else None


class Skipped:
    """Modules left alone, by entries as transformers reads them: by the first components of a name,
    in which an entry is a pattern, or by the end of it, in which it is text."""

    def __init__(self, patterns: Patterns, field: str, entries: Iterable[str]) -> None:
        self._ends = set(entries)
        self._lengths = sorted({len(entry) for entry in self._ends})
        self._patterns = Rules(patterns)
        #: entries without special characters: length -> places of dots, which match any character
        #: -> the rest
        self._plain: dict[int, dict[tuple[int, ...], set[str]]] = {}
        for entry in dict.fromkeys(entries):
            if _PLAIN.fullmatch(entry):
                dots = tuple(i for i, letter in enumerate(entry) if letter == ".")
                self._plain.setdefault(len(entry), {}).setdefault(dots, set()).add(entry)
            else:
                self._patterns.add_pattern(field, f"(?:{entry}){_BOUNDARY}", 0)

    def __call__(self, name: str) -> bool:
        """Whether the module called `name` is left alone."""
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
        """Whether a plain entry matches the first `end` characters, and a component ends there."""
        groups = self._plain.get(end)
        if groups is None or not (end == len(name) or "." in name[end - 1 : end + 1]):
            return False
        return any(_dotted(name[:end], dots) in group for dots, group in groups.items())


def _dotted(text: str, dots: tuple[int, ...]) -> str:
    letters = list(text)
    for i in dots:
        letters[i] = "."
    return "".join(letters)
