"""Solutions of lesson 11, Running out: each body stands where the exercise, ../11_running_out.py, has its stub."""


def never_fits(prompt: int, answer: int, num_blocks: int) -> bool:
    """lesson 11, task 1: never_fits"""
    return blocks_for(prompt + answer) > num_blocks - 1


def choose_victim(running: list[Request]) -> Request:
    """lesson 11, task 2: choose_victim"""
    return max(running, key=lambda request: request.arrival)


def recompute(engine: Engine, request: Request) -> None:
    """lesson 11, task 3: recompute"""
    engine.free.extend(reversed(request.table))
    request.table = []
    request.computed = 0
    engine.running.remove(request)
    engine.waiting.appendleft(request)


def swap_out(engine: Engine, request: Request) -> bool:
    """lesson 11, task 4: swap_out"""
    if len(request.table) > len(engine.free_host):
        return False
    for block in request.table:
        host_block = engine.free_host.popleft()
        engine.host[host_block] = list(engine.device[block])
        request.host_table.append(host_block)
    engine.free.extend(reversed(request.table))
    request.table = []
    engine.running.remove(request)
    engine.swapped.appendleft(request)
    return True


def swap_in(engine: Engine, request: Request) -> bool:
    """lesson 11, task 5: swap_in"""
    need = blocks_for(len(request.tokens))
    if need > len(engine.free):
        return False
    request.table = [engine.free.popleft() for _ in range(need)]
    for block, host_block in zip(request.table, request.host_table, strict=False):
        engine.device[block] = list(engine.host[host_block])
    engine.free_host.extend(request.host_table)
    request.host_table = []
    return True
