"""Results as tables, plots, pages and Markdown."""
