"""The pipeline's subcommands of `qadapter`; `table.py` lists them."""
