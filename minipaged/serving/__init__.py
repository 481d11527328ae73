"""An engine as a process of its own, and the pipe to it."""
