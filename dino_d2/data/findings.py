"""What a check of data found: errors, drops, conversions and remarks, counted by reason."""

from typing import NamedTuple

LEVELS = ("error", "dropped", "converted", "note")
_EXAMPLES = 5  # places that are kept and named per reason


class DataError(ValueError):
    """Data is unusable; the message names the file, the entries and their fields."""


class Finding(NamedTuple):
    """One reason with the places where it holds."""

    level: str  # one of LEVELS
    reason: str
    count: int
    places: tuple[str, ...]  # the first few

    def __str__(self) -> str:
        where = "; ".join(self.places)
        more = (
            f"; and {self.count - len(self.places)} more" if self.count > len(self.places) else ""
        )
        return f"{self.level}: {self.reason}: {self.count}" + (f" ({where}{more})" if where else "")


class Findings:
    """Collects findings about one source, a json for example.

    "error" is what training cannot use or would misread; "dropped" is left out; "converted" is
    changed into what was probably meant; a "note" changes nothing.
    """

    def __init__(self, source: object):
        self.source = str(source)
        self._places: dict[tuple[str, str], list[str]] = {}
        self._counts: dict[tuple[str, str], int] = {}

    def add(self, level: str, reason: str, place: str = "", count: int = 1) -> None:
        """Count `reason` once more, at `place`."""
        key = (level, reason)
        self._counts[key] = self._counts.get(key, 0) + count
        places = self._places.setdefault(key, [])
        if place and len(places) < _EXAMPLES:
            # halves of characters, as in a json's "\\ud800", cannot be printed
            places.append(place.encode(errors="backslashreplace").decode())

    def all(self, *levels: str) -> list[Finding]:
        """Those of the given levels, or of all, the gravest first."""
        found = [
            Finding(*key, count, tuple(self._places[key])) for key, count in self._counts.items()
        ]
        wanted = levels or LEVELS
        found = [finding for finding in found if finding.level in wanted]
        return sorted(found, key=lambda finding: LEVELS.index(finding.level))

    def count(self, *levels: str) -> int:
        """How often anything of these levels was found."""
        return sum(finding.count for finding in self.all(*levels))

    def raise_errors(self) -> None:
        """Raise a DataError that lists the errors, if there are any."""
        errors = self.all("error")
        if errors:
            lines = "\n".join(f"  {finding}" for finding in errors)
            raise DataError(f"{self.source}: this data cannot be used.\n{lines}")
