"""The machinery behind the lessons: a learner's folder, checking, replays, and the small parts that lessons share."""
