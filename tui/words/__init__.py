"""Text: sentences on a step, the help, and cutting text to cells."""
