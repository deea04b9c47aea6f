"""A clock that tests set: no pause lasts, and no slow machine reaches a deadline."""


class SimulatedClock:
    """Satisfies `http_client.Clock`. pauses: seconds of each sleep, none of which was waited for."""

    def __init__(self):
        self.seconds, self.pauses = 0.0, []

    def now(self):
        return self.seconds

    def advance(self, seconds):
        self.seconds += seconds

    def sleep(self, seconds):
        self.pauses.append(seconds)
        self.advance(seconds)

    async def asleep(self, seconds):
        self.sleep(seconds)
