"""What moves a playback without keys: the tour of a first run, lessons, and branches of a run."""
