"""Other systems' memory: how each holds keys and values, whom it admits, and shadows of them beside a real run. README.md is the map."""
