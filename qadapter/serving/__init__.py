"""An OpenAI-compatible chat server for a base and its adapters: `python -m qadapter.serving --adapter FOLDER`."""
