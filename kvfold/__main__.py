"""`python -m kvfold`: the command line."""

from kvfold.cli import app

app(prog_name="kvfold")
