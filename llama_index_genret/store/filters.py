"""Evaluate metadata filters over all records of an index at once.

Operators, nesting and the JSON form equal LlamaIndex's MetadataFilters. A server without LlamaIndex applies the same
filters as a client.

Filters may enforce access rights. A filter that LlamaIndex would by mistake evaluate to "everything" or "nothing" is
therefore an error here. So are a text compared with numbers, a list in place of one value, one value in place of a
list, a missing value, NaN, and an "or" or "not" without conditions.

Depends on metadata values and arrays; independent of tries and identifiers. Each key's distinct values are stored
once, so that an operator runs in Python over the distinct values only.
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
    text.encode()  # a lone surrogate raises UnicodeEncodeError, which is a ValueError
    return text


Text = Annotated[str, AfterValidator(_encodable)]
Value = Text | int | FiniteFloat | bool
Operator = Literal[
    "==", "!=", ">", ">=", "<", "<=", "in", "nin", "any", "all", "contains",
    "text_match", "text_match_insensitive", "is_empty",
]  # fmt: skip
Mask = NDArray[np.bool_]


MAX_FILTERS = 1000
"""Maximum number of conditions in one `RecordFilters`."""

TAKES_LIST = frozenset({"in", "nin", "any", "all"})
"""Operators that take a list of values. The others take one value, and `is_empty` takes none."""

COMPARES = frozenset({"==", "!=", "in", "nin"})
"""Operators that compare values for equality. A text never equals a number."""

MAX_DEPTH = 32
"""Maximum nesting depth of filters. Deeper filters could be parsed, but not serialised to JSON again."""


class RecordFilter(BaseModel):
    """One condition on one metadata key."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    key: Text
    value: Value | list[Value] | None = None
    operator: Operator = "=="

    @model_validator(mode="after")
    def _can_be_written(self) -> RecordFilter:
        for text in (self.key, *(self.value if isinstance(self.value, list) else [self.value])):
            str(text).encode()  # a lone surrogate is a ValueError
        return self


class RecordFilters(BaseModel):
    """Conditions of which all ("and"), at least one ("or"), or none ("not") must hold.

    An empty "and" lets every record pass. An empty "or" or "not" is an error: an empty list of permitted users must not
    make an image visible to everybody. Conditions nest at most MAX_DEPTH deep.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    filters: list[RecordFilter | RecordFilters] = Field(max_length=MAX_FILTERS)
    condition: Literal["and", "or", "not"] | None = "and"

    @property
    def depth(self) -> int:
        """Return the nesting depth of the conditions."""
        return 1 + max((part.depth for part in self.filters if isinstance(part, RecordFilters)), default=0)

    @model_validator(mode="after")
    def _shallow_and_not_empty(self) -> RecordFilters:
        if not self.filters and self.condition in ("or", "not"):
            raise ValueError(f"{self.condition!r} has no filters: omit it, or do not search")
        if self.depth > MAX_DEPTH:
            raise ValueError(f"filters may be nested at most {MAX_DEPTH} deep, got {self.depth}: flatten them")
        return self

    @classmethod
    def equal(cls, wanted: Mapping[str, Value | list[Value]]) -> RecordFilters:
        """Return filters that require every key to equal its value, or one of its list of values.

        Raises:
            FilterError: a value has an unsupported type.
        """
        how = {key: "in" if isinstance(value, list) else "==" for key, value in wanted.items()}
        parts = [{"key": key, "value": value, "operator": how[key]} for key, value in wanted.items()]
        try:
            return cls.model_validate({"filters": parts})
        except ValidationError as error:
            raise FilterError(f"the filters {dict(wanted)!r} cannot be parsed: {error}") from error


@dataclass(frozen=True)
class Column:
    """The values of one metadata key over n records.

    values: the distinct values; None stands for "absent".
    codes: (n,) int32, the position in `values` of each record's value.
    """

    values: Sequence[Scalar]
    codes: NDArray[np.int32]

    @classmethod
    def of(cls, values: Iterable[Scalar]) -> Column:
        """Build the column from the value of each record."""
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
        """Return the keys that at least one record has."""
        return tuple(self._columns)

    def distinct(self, key: str) -> Sequence[Value]:
        """Return the distinct values that the records have under `key`.

        Raises:
            FilterError: no record has the key.
        """
        if key not in self._columns:
            raise FilterError(f"no image has metadata {key!r}; the index knows {sorted(self._columns)}.")
        return [value for value in self._columns[key].values if value is not None]

    def record_mask(self, filters: RecordFilters) -> Mask:
        """Return a mask, (n,) bool, that is True for each record that passes.

        Raises:
            FilterError: no record has a key, or an operator does not apply to its value or to the records' values.
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
            condition = f"{part.key} {part.operator} {part.value!r}"
            raise FilterError(
                f"the filter {condition} does not apply to the values of {part.key!r}: {error}."
            ) from error
        return np.array(matches, np.bool_)[column.codes]


def _check_value(part: RecordFilter, known: Sequence[Scalar]) -> None:
    """Raise TypeError if the operator does not apply to the filter's value, independent of any record."""
    if part.operator == "is_empty":
        return
    if part.value is None:
        raise TypeError("it has no value; use is_empty to find records without a value")
    if isinstance(part.value, list) != (part.operator in TAKES_LIST):
        raise TypeError(f"it takes {'a list of values' if part.operator in TAKES_LIST else 'one value'}")
    kinds = {isinstance(value, str) for value in known if value is not None}
    values = part.value if isinstance(part.value, list) else [part.value]
    mismatched = [value for value in values if isinstance(value, str) not in kinds]
    if part.operator in COMPARES and kinds and mismatched:
        expected, got = ("numbers", "a text") if isinstance(mismatched[0], str) else ("texts", "a number")
        raise TypeError(f"they are {expected}, and {mismatched[0]!r} is {got}")


def _matches(part: RecordFilter, found: Scalar) -> bool:
    if part.operator == "is_empty":
        return found is None or found == ""
    if found is None:
        return part.operator in ("!=", "nin")
    if part.operator.startswith("text_match") and not (isinstance(part.value, str) and isinstance(found, str)):
        raise TypeError(f"it compares two texts, got {type(found).__name__} and {type(part.value).__name__}")
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
