"""The command `qadapter`: train, generate, score, chat, serve, eval; in a checkout the pipeline's commands too."""
