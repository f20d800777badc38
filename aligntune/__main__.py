"""`python -m aligntune`: the command line."""

from aligntune.cli import console

console()
