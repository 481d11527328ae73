"""The terminal screen (minipaged.tui). How a step gets to the eye, from below:

    serving.live or a file -> trace.player -> playback (where in the trace, and how it goes on) -> session (what is shown of it)
    -> view (one moment, as every pane is given it) -> map/ and panes/ (rows of text and colour) -> screen (paints them, 30 times a second)

app starts it all; actions is what the keys do; scripted/ moves a playback without keys (the tour, lessons, branches); reading/ finds what
a snapshot does not hold (a past event, the cause of another, what other systems would hold); words/ says it in sentences.
"""
