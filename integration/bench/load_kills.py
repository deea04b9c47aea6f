"""A server that is killed and restarted whenever it has ended, as systemd or Docker would do, and its behaviour then.

There are three ways: kill the engine's process, kill the server's own process, or send the server SIGTERM. After each
it must end by itself, with all its processes, and `/health` must not stay 200. Depends on processes and health;
independent of recall.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field

import httpx
import psutil

from integration.bench.load_watch import Watch
from llama_index_genret.serving.launch import ServedModel

KILLS = ("engine", "server", "stop")
ENDED_S = {"engine": 30.0, "server": 1.0, "stop": 30.0}
"""Seconds that the server may take to end, with the requests in flight."""

ORPHANED_S = 15.0
"""Seconds that its other processes may outlive it."""

UNNOTICED_S = 10.0
"""Seconds that `/health` may return 200 when the engine is dead."""

AFTERWARDS_S = 1.0
"""A request sent within these seconds of the next start may still meet a connection of the previous server."""


@dataclass
class Outage:
    """The time from a kill to the next start. Times are of `time.monotonic`, and infinite until the event happens."""

    kind: str
    began_s: float
    unhealthy_s: float = math.inf
    ended_s: float = math.inf
    alone_s: float = math.inf
    served_s: float = math.inf

    def record(self) -> dict[str, object]:
        """Return seconds since the kill, as JSON."""
        times = {"unhealthy": self.unhealthy_s, "ended": self.ended_s, "all gone": self.alone_s}
        times["served again"] = self.served_s
        since = {name: at - self.began_s for name, at in times.items()}
        return {"kind": self.kind, **{name: s if math.isfinite(s) else None for name, s in since.items()}}

    def problems(self) -> list[str]:
        """List the events that took too long."""
        limits = {
            f"/health was 200 for {self.unhealthy_s - self.began_s:.0f} s": self.unhealthy_s
            <= self.began_s + UNNOTICED_S,
            "the server did not end in time": self.ended_s <= self.began_s + ENDED_S[self.kind],
            "processes of the server outlived it": self.alone_s <= self.ended_s + ORPHANED_S,
        }
        return [f"after the kill of the {self.kind}: {what}" for what, kept in limits.items() if not kept]


@dataclass
class Supervisor:
    """Runs `serving`, a server as a context, again and again."""

    serving: Callable[[], AbstractContextManager[ServedModel]]
    lives: list[Watch] = field(default_factory=list)
    outages: list[Outage] = field(default_factory=list)
    address: str = ""

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Start the first server on entry, and end the last one on exit."""
        self._life = ExitStack()
        try:
            await self._begin()
            yield
        finally:
            await asyncio.to_thread(self._life.close)

    async def _begin(self) -> None:
        server = await asyncio.to_thread(self._life.enter_context, self.serving())
        self.address = server.api_base.removesuffix("/v1")
        self.lives.append(Watch(server.pid))

    def excuses(self, start_s: float, end_s: float) -> bool:
        """Return True if there was an outage while the request was in flight."""
        return any(start_s <= o.served_s + AFTERWARDS_S and end_s >= o.began_s for o in self.outages)

    async def kill(self, kind: str, *, again: bool = True) -> None:
        """End the server in one of the KILLS, watch its end, and start another."""
        main = psutil.Process(self.lives[-1].pid)
        children = main.children(recursive=True)
        outage = Outage(kind, time.monotonic())
        self.outages.append(outage)
        if kind == "engine":
            next(child for child in children if "EngineCore" in " ".join(child.cmdline())).kill()
        else:
            main.kill() if kind == "server" else main.terminate()
        await asyncio.gather(self._watch_health(outage), self._watch_processes(outage, main, children))
        await asyncio.to_thread(self._life.close)
        if again:
            self._life = ExitStack()
            await self._begin()
            outage.served_s = time.monotonic()

    async def _watch_health(self, outage: Outage) -> None:
        async with httpx.AsyncClient(timeout=UNNOTICED_S) as http:
            while time.monotonic() < outage.began_s + 2 * UNNOTICED_S:
                with suppress(httpx.HTTPError):
                    if (await http.get(f"{self.address}/health")).status_code == 200:
                        await asyncio.sleep(0.2)
                        continue
                outage.unhealthy_s = time.monotonic()
                return

    async def _watch_processes(self, outage: Outage, main: psutil.Process, children: Sequence[psutil.Process]) -> None:
        if await _gone([main], ENDED_S[outage.kind]):
            outage.ended_s = time.monotonic()
            if await _gone(children, ORPHANED_S):
                outage.alone_s = time.monotonic()
        for process in (main, *children):
            with suppress(psutil.NoSuchProcess):
                process.kill()


async def _gone(processes: Sequence[psutil.Process], timeout_s: float) -> bool:
    """Return True if all processes end in time."""
    end = time.monotonic() + timeout_s
    while any(map(_lives, processes)):
        if time.monotonic() > end:
            return False
        await asyncio.sleep(0.1)
    return True


def _lives(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
