"""Text that grows token by token, stop strings, and text made safe to print."""
