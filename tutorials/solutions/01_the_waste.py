"""Solutions of lesson 1, The waste: each body stands where the exercise, ../01_the_waste.py, has its stub."""


def split(request: Request, written: int, reservation: int) -> Split:
    """lesson 1, task 1: split"""
    needed = request.prompt + request.answer
    return Split(token=written, reserved=needed - written, internal=reservation - needed)


def waste(requests: list[Request], pool_size: int, max_len: int) -> float:
    """lesson 1, task 2: waste"""
    rows = pool_size // max_len
    token_steps = sum(r.answer * r.prompt + r.answer * (r.answer + 1) // 2 for r in requests)
    average_row = token_steps / sum(r.answer for r in requests)
    return 1 - rows * average_row / pool_size
