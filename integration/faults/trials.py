"""Stop one command at each of its points in one of five ways, and check the result.

kill    killed there, or during the write: the old content is whole, or the new one. The same command then succeeds. It
        is tried once from each of the states that are left; "known" counts the others.
power   the same after a power cut there, which loses everything that no fsync has brought to the disk.
full    from there on nothing can be written: an error that names the folder, nothing is left, the old version is whole.
read    a reader loads the index there: it gets the old version or the new one.
race    another process removes an image there: it is refused, or the first command is. No change is lost of a command
        that reported success.
"""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from integration.faults.commands import Command, State, Workshop, fingerprint, genret, names_in, state_of
from integration.faults.power import Disk
from integration.faults.syscalls import GO, GROWS, KILL, KILL_HALF, Event, Outcome, supervised, wait_for_child
from llama_index_genret.store import manifest

UNFINISHED = ("index/training", "index/pseudo_queries.jsonl.part", "hits.jsonl.part")
"""Files of a run that can be resumed."""

LOCKS = ("index/write.lock", "index/training.lock")
"""Empty files of killed processes, which are free to be locked."""

IS_DONE = ("holds an index already", "no update to drop", "exists and is not empty", "unknown).", "hits.jsonl exists")
"""Errors of the same command after it was killed at its end, when its work is already done."""


@dataclass
class Found:
    """figures: count of points, and of each outcome. failures: a sentence each."""

    figures: dict[str, int] = field(default_factory=lambda: {"points": 0})
    failures: list[str] = field(default_factory=list)

    def count(self, name: str) -> None:
        self.figures[name] = self.figures.get(name, 0) + 1


class Trials:
    """A command, its folder before and after, and the points at which it changes files."""

    def __init__(self, workshop: Workshop, command: Command, *, few: bool = False) -> None:
        self.workshop, self.command, self.place = workshop, command, workshop.place
        workshop.lay(command)
        self.old = state_of(self.place)
        outcome = self._run()
        assert outcome.status == 0, outcome.said
        self.new, self.names = state_of(self.place), names_in(self.place)
        assert self.new != self.old, f"{command.name} changed nothing"
        self.events = outcome.events
        self.points = list(_some(outcome.events)) if few else list(outcome.events)

    def _run(self, decide: Callable[[Event], Any] = lambda event: GO) -> Outcome:
        return supervised(lambda: self.command.run(self.place), self.place, decide)

    def _again(self) -> tuple[int, str]:
        return wait_for_child(lambda: self.command.run(self.place))

    def _is_known(self, found: Found, tried: set[str]) -> bool:
        """Return True if this content also followed an earlier point, from where the same command does the same."""
        state = fingerprint(self.place)
        if state in tried:
            found.count("known")
            return True
        tried.add(state)
        return False

    def _version(self, found: Found, where: str, place: Any = None) -> str:
        """Return "old" or "new", the version in the folder."""
        try:
            state = state_of(place or self.place)
        except Exception as error:
            found.failures.append(f"{where}: {error!r}")
            return "broken"
        version = "new" if state == self.new else "old" if state == self.old else "mixed"
        if version == "mixed":
            found.failures.append(f"{where}: a mixture: {_difference(state, self.old)} {_difference(state, self.new)}")
        return version

    def kill(self) -> Found:
        found, tried = Found(), set[str]()
        for point in self.points:
            for how in (KILL, KILL_HALF) if point.size > 1 else (KILL,):
                self.workshop.lay(self.command)
                seen = self._run(lambda event, point=point, how=how: how if event.number == point.number else GO)
                found.count("points")
                where = f"{self.command.name}, {how} at {point}"
                if seen.status != -9:
                    found.failures.append(f"{where}: it ended with {seen.status}: {seen.said}")
                version = self._version(found, where)
                found.count(version)
                if self._is_known(found, tried):
                    continue
                status, said = self._again()
                if status and not (version == "new" and any(_joined(text) in _joined(said) for text in IS_DONE)):
                    found.failures.append(f"{where}: again ended with {status}: {said[-2000:]}")
                if self._version(found, f"{where}, again") != "new":
                    found.failures.append(f"{where}: again left the old version")
                if status == 0 and (left := set(names_in(self.place)) - {*self.names, *LOCKS}):
                    found.failures.append(f"{where}: again left {sorted(left)}")
        return found

    def power(self) -> Found:
        found = Found()
        points = {point.number for point in self.points}
        disk, copy = Disk(), self.workshop.root / "cut"

        def decide(event: Event) -> None:
            if event.number in points:
                for lost in disk.cuts(self.place, copy):
                    found.count("points")
                    found.count(self._version(found, f"{self.command.name}, power cut at {event}, lost {lost}", copy))
            disk.see(event)

        self.workshop.lay(self.command)
        self._run(decide)
        for lost in disk.cuts(self.place, copy):  # the command has reported success
            found.count("points")
            where = f"{self.command.name}, power cut after it, lost {lost}"
            if self._version(found, where, copy) != "new":
                found.failures.append(f"{where}: the old version")
        shutil.rmtree(copy, ignore_errors=True)
        return found

    def full(self) -> Found:
        found, tried = Found(), set[str]()
        self.workshop.lay(self.command)
        before = set(names_in(self.place))
        for point in self.points:
            if point.call not in GROWS:
                continue
            self.workshop.lay(self.command)

            def decide(event: Event, point: Event = point) -> Any:
                return errno.ENOSPC if event.number >= point.number and event.call in GROWS else GO

            seen = self._run(decide)
            found.count("points")
            where = f"{self.command.name}, disk full at {point}"
            version = self._version(found, where)
            found.count(version)
            if seen.status == 0 and version != "new":
                found.failures.append(f"{where}: nothing was said")
            if seen.status and version != "new":
                line = _joined(seen.said)
                if "Traceback" in line or "error:" not in line or str(self.place) not in line:
                    found.failures.append(f"{where}: it ended with {seen.status}: {seen.said[-1500:]}")
                left = {name for name in set(names_in(self.place)) - before if not name.startswith(UNFINISHED)}
                if left:
                    found.failures.append(f"{where}: left {sorted(left)}")
            if self._is_known(found, tried):
                continue
            status, said = self._again()
            if status and version != "new":
                found.failures.append(f"{where}: again ended with {status}: {said[-2000:]}")
            if self._version(found, f"{where}, again") != "new":
                found.failures.append(f"{where}: again left the old version")
        return found

    def read(self) -> Found:
        found, order = Found(), []

        def decide(event: Event) -> None:
            found.count("points")
            order.append(self._version(found, f"{self.command.name}, read at {event}"))
            found.count(order[-1])

        self.workshop.lay(self.command)
        self._run(decide)
        if order != sorted(order, reverse=True):
            found.failures.append(f"{self.command.name}: read {order}")
        return found

    def race(self) -> Found:
        found = Found()
        if "ids" not in self.old:
            return found
        for point in self.points:
            self.workshop.lay(self.command)
            other: list[tuple[int, str]] = []

            def decide(event: Event, point: Event = point, other: list[tuple[int, str]] = other) -> None:
                if event.number == point.number:
                    other.append(wait_for_child(lambda: _remove_one(self)))

            first = self._run(decide)
            found.count("points")
            where = f"{self.command.name}, another at {point}"
            (status, said), state = other[0], _state(found, where, self)
            for name, (code, text) in {"first": (first.status, first.said), "other": (status, said)}.items():
                if code and ("error:" not in text or "Traceback" in text):
                    found.failures.append(f"{where}: the {name} ended with {code}: {text[-1500:]}")
            if state:
                removed = REMOVED not in state["ids"]
                done = {key for key in self.new if self.new[key] != self.old.get(key) and key != "ids"}
                kept = first.status != 0 or self._same_change(state, done)
                # If both succeeded and the other's removal is missing, it came before the index was rebuilt.
                undone = self.command.rebuilds and status == first.status == 0 and state == self.new
                if (status == 0) != (removed or undone) or not kept:
                    statuses = f"first {first.status}, other {status}"
                    found.failures.append(f"{where}: {statuses}, but removed={removed}, kept={kept}")
            codes = {"first": first.status, "other": status}
            found.count(", ".join(f"{who} {'refused' if code else 'won'}" for who, code in codes.items()))
        return found

    def _same_change(self, state: State, keys: set[str]) -> bool:
        """Return True if the change of the first command is there, except where the other changes it too."""
        of_edits = {"identifiers", "trained", "queries"}
        if "ids" in self.new and set(self.new["ids"]) - {REMOVED} != set(state["ids"]) - {REMOVED}:
            return False
        return all(state.get(key) == self.new[key] for key in keys - of_edits)


REMOVED = "green-circle"
KINDS: dict[str, Callable[[Trials], Found]] = {
    "kill": Trials.kill,
    "power": Trials.power,
    "full": Trials.full,
    "read": Trials.read,
    "race": Trials.race,
}


def _remove_one(trials: Trials) -> None:
    manifest.LOCK_WAIT_S = 0.0
    genret("remove", trials.place / "index", REMOVED)


def _state(found: Found, where: str, trials: Trials) -> State | None:
    try:
        return state_of(trials.place)
    except Exception as error:
        found.failures.append(f"{where}: {error!r}")
        return None


def _joined(said: str) -> str:
    """Remove the spaces and line breaks that depend on a terminal's width."""
    return "".join(said.split())


def _some(events: list[Event]) -> Iterator[Event]:
    """Yield the first and the last of the calls of one kind to files of one name."""
    kinds: dict[tuple[str, str], list[Event]] = {}
    for event in events:
        kinds.setdefault((event.call, re.sub(r"[0-9a-f]{8,}|\d+", "*", event.path.name)), []).append(event)
    chosen = {event.number: event for group in kinds.values() for event in (group[0], group[-1])}
    yield from (chosen[number] for number in sorted(chosen))


def _difference(state: State, other: State) -> list[str]:
    return [key for key in state.keys() | other.keys() if state.get(key) != other.get(key)]
