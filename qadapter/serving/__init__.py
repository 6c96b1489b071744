"""An OpenAI-compatible chat server for a base and its adapters: `qadapter serve --adapter FOLDER`."""
