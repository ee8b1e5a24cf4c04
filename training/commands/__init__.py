"""The commands of `python -m training`, a file each; `training.cli` puts them together."""
