"""Solutions of lesson 18, Serving: each body stands where the exercise, ../18_serving.py, has its stub."""


def timing(came: float, stamps: list[float]) -> Timing:
    """lesson 18, task 1: timing"""
    gaps = len(stamps) - 1
    return Timing(stamps[0] - came, (stamps[-1] - stamps[0]) / gaps if gaps else 0.0)


def goodput(timings: list[Timing], seconds: float, limits: Timing) -> float:
    """lesson 18, task 2: goodput"""
    good = [each for each in timings if each.first <= limits.first and each.per_token <= limits.per_token]
    return len(good) / seconds


class Server:
    async def run(self) -> None:
        """lesson 18, task 3: Server.run"""
        while True:
            await self.work.wait()
            self.work.clear()
            while self.engine.has_work:
                for growth in await asyncio.to_thread(self.engine.step):
                    if growth.number in self.queues:
                        self.queues[growth.number].put_nowait(growth)

    async def answer(self, prompt: str, max_tokens: int, send: Send) -> None:
        """lesson 18, task 4: Server.answer"""
        number = self.engine.add(prompt, max_tokens)
        queue = self.queues[number] = asyncio.Queue()
        self.work.set()
        complete = False
        try:
            while not complete:
                growth = await queue.get()
                complete = growth.finished
                await send(growth.text)
        finally:
            del self.queues[number]
            if not complete:
                self.engine.cancel(number)
