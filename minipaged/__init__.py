"""minipaged: a small, complete PagedAttention engine that one can see through."""
