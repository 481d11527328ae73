"""What a snapshot does not hold and is read from the trace: past events, causes, moves between queues, other systems."""
