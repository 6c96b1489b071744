"""The method on the command line, without the pipeline: `python -m qadapter train|generate|score|chat`."""
