"""From names, folders and files to a model that is ready to run."""
