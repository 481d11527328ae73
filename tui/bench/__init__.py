"""`minipaged bench screen`: the engine with the screen on and off, and pictures of that run."""
