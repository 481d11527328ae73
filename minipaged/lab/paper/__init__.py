"""The figures of the PagedAttention paper, and the claims that circulate, each beside our own numbers."""
