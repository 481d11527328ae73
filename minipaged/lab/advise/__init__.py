"""What fits, how fast it can be, and which techniques help: sums that need no run."""
