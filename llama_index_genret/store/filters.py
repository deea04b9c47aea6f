"""Metadata filters: which records they let pass, for a whole index at once.

The operators and their meaning are those of LlamaIndex's MetadataFilters, nesting included, and so is the JSON form;
this module does not need LlamaIndex, so that a server applies the same filters as a client.

Filters say who may see what: one that LlamaIndex would read as "everything" or "nothing" by mistake is an error here.
So is a text compared with numbers, a list where one value belongs or one value where a list does, no value, NaN, and an
"or" or "not" of nothing.

Knows metadata values and arrays; nothing of tries or identifiers. Each key's values are stored once, so that an
operator runs in Python over the distinct values only.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from llama_index_genret.corpus import Scalar
from llama_index_genret.errors import FilterError


def _encodable(text: str) -> str:
    text.encode()  # a half of a surrogate pair is refused: UnicodeEncodeError is a ValueError
    return text


Text = Annotated[str, AfterValidator(_encodable)]
Value = Text | int | FiniteFloat | bool
Operator = Literal[
    "==", "!=", ">", ">=", "<", "<=", "in", "nin", "any", "all", "contains",
    "text_match", "text_match_insensitive", "is_empty",
]  # fmt: skip
Mask = NDArray[np.bool_]


MAX_FILTERS = 1000
"""Conditions that hold together."""

TAKES_LIST = frozenset({"in", "nin", "any", "all"})
"""Operators of several values; the others take one, and `is_empty` none."""

COMPARES = frozenset({"==", "!=", "in", "nin"})
"""Operators that ask whether values are equal, which a text and a number never are."""

MAX_DEPTH = 32
"""Of nested filters: deeper ones could be read, but not written as JSON again."""


class RecordFilter(BaseModel):
    """One condition on one metadata key."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    key: Text
    value: Value | list[Value] | None = None
    operator: Operator = "=="

    @model_validator(mode="after")
    def _can_be_written(self) -> RecordFilter:
        for text in (self.key, *(self.value if isinstance(self.value, list) else [self.value])):
            str(text).encode()  # half a surrogate pair is a ValueError
        return self


class RecordFilters(BaseModel):
    """Conditions that hold together ("and"), one of them at least ("or"), or none of them ("not").

    No conditions let everything pass; of "or" and "not" there is one at least: a list of those who may see an image
    must not open it to all where it turns out empty. At most MAX_DEPTH lie in one another.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    filters: list[RecordFilter | RecordFilters] = Field(max_length=MAX_FILTERS)
    condition: Literal["and", "or", "not"] | None = "and"

    @property
    def depth(self) -> int:
        """How many conditions lie in one another."""
        return 1 + max((part.depth for part in self.filters if isinstance(part, RecordFilters)), default=0)

    @model_validator(mode="after")
    def _shallow_and_not_empty(self) -> RecordFilters:
        if not self.filters and self.condition in ("or", "not"):
            raise ValueError(f"{self.condition!r} of no filters says nothing: leave it out, or search for no image")
        if self.depth > MAX_DEPTH:
            raise ValueError(f"filters lie in one another at most {MAX_DEPTH} deep")
        return self

    @classmethod
    def equal(cls, wanted: Mapping[str, Value | list[Value]]) -> RecordFilters:
        """Every key equals its value, or one of a list of them.

        Raises:
            FilterError: a value cannot be one.
        """
        how = {key: "in" if isinstance(value, list) else "==" for key, value in wanted.items()}
        parts = [{"key": key, "value": value, "operator": how[key]} for key, value in wanted.items()]
        try:
            return cls.model_validate({"filters": parts})
        except ValidationError as error:
            raise FilterError(f"the filters {dict(wanted)!r} cannot be read: {error}") from error


@dataclass(frozen=True)
class Column:
    """The values of one key over n records.

    values: the distinct ones; None stands for "absent". codes: (n,) int32, which of them each record has.
    """

    values: Sequence[Scalar]
    codes: NDArray[np.int32]

    @classmethod
    def of(cls, values: Iterable[Scalar]) -> Column:
        """Of the value of each record."""
        places: dict[Scalar, int] = {}
        codes = np.fromiter((places.setdefault(value, len(places)) for value in values), np.int32)
        return cls(tuple(places), codes)


class Columns:
    """The metadata of n records, by key."""

    def __init__(self, rows: Sequence[Mapping[str, Scalar]]) -> None:
        self._n = len(rows)
        keys = dict.fromkeys(key for row in rows for key in row)
        self._columns = {key: Column.of(row.get(key) for row in rows) for key in keys}

    @property
    def keys(self) -> tuple[str, ...]:
        """Those that any record has."""
        return tuple(self._columns)

    def distinct(self, key: str) -> Sequence[Value]:
        """The values that the records have under `key`.

        Raises:
            FilterError: no record has the key.
        """
        if key not in self._columns:
            raise FilterError(f"no image has metadata {key!r}; the index knows {sorted(self._columns)}.")
        return [value for value in self._columns[key].values if value is not None]

    def record_mask(self, filters: RecordFilters) -> Mask:
        """(n,) bool: which records pass.

        Raises:
            FilterError: a key that no record has, or an operator that does not apply to its value or to theirs.
        """
        masks = [
            self.record_mask(part) if isinstance(part, RecordFilters) else self._matching(part)
            for part in filters.filters
        ]
        if not masks:
            return np.ones(self._n, np.bool_)
        together: Mask = (np.all if filters.condition in ("and", None) else np.any)(masks, axis=0)
        return ~together if filters.condition == "not" else together

    def _matching(self, part: RecordFilter) -> Mask:
        if not self._n:
            return np.zeros(0, np.bool_)
        self.distinct(part.key)
        column = self._columns[part.key]
        try:
            _check_value(part, column.values)
            matches = [_matches(part, value) for value in column.values]
        except TypeError as error:
            asked = f"{part.key} {part.operator} {part.value!r}"
            raise FilterError(f"the filter {asked} does not apply to the values of {part.key!r}: {error}.") from error
        return np.array(matches, np.bool_)[column.codes]


def _check_value(part: RecordFilter, known: Sequence[Scalar]) -> None:
    """Raise TypeError where the operator cannot mean anything with the value, whatever record it is asked of."""
    if part.operator == "is_empty":
        return
    if part.value is None:
        raise TypeError("it has no value; is_empty asks for records without one")
    if isinstance(part.value, list) != (part.operator in TAKES_LIST):
        raise TypeError(f"it takes {'a list of values' if part.operator in TAKES_LIST else 'one value'}")
    kinds = {isinstance(value, str) for value in known if value is not None}
    asked = part.value if isinstance(part.value, list) else [part.value]
    strange = [value for value in asked if isinstance(value, str) not in kinds]
    if part.operator in COMPARES and kinds and strange:
        raise TypeError(
            f"{strange[0]!r} is {'a text' if isinstance(strange[0], str) else 'a number'}, and they are not"
        )


def _matches(part: RecordFilter, found: Scalar) -> bool:
    if part.operator == "is_empty":
        return found is None or found == ""
    if found is None:
        return part.operator in ("!=", "nin")
    if part.operator.startswith("text_match") and not (isinstance(part.value, str) and isinstance(found, str)):
        raise TypeError(f"it compares texts, not {type(found).__name__} with {type(part.value).__name__}")
    return bool(_OPERATORS[part.operator](found, part.value))


_OPERATORS: Mapping[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
    "in": lambda found, value: found in value,
    "nin": lambda found, value: found not in value,
    "contains": operator.contains,
    "any": lambda found, value: any(one in found for one in value),
    "all": lambda found, value: all(one in found for one in value),
    "text_match": operator.contains,
    "text_match_insensitive": lambda found, value: value.lower() in found.lower(),
}
