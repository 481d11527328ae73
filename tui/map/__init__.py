"""The block map: where each block lies (layout), how it looks (cells), its rows (model), and the widget over them (blockmap)."""
