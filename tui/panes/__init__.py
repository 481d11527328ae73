"""The panes around the map, the bars above and below, and the windows over them. Each is a pure function of a View and a size."""
