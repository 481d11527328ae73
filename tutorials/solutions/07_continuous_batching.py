"""Solutions of lesson 7, Continuous batching: each body stands where the exercise, ../07_continuous_batching.py, has its stub."""


def tokens_left(request: Request) -> int:
    """lesson 7, task 1: tokens_left"""
    return request.prompt + request.written - request.computed


def schedule(running: list[Request], waiting: deque[Request], budget: int = 256) -> list[tuple[Request, int]]:
    """lesson 7, task 2: schedule"""
    plan: list[tuple[Request, int]] = []
    for request in running:
        count = min(tokens_left(request), budget)
        if count:
            plan.append((request, count))
            budget -= count
    while budget and waiting and len(running) < MAX_RUNNING:
        request = waiting.popleft()
        running.append(request)
        count = min(tokens_left(request), budget)
        plan.append((request, count))
        budget -= count
    return plan
