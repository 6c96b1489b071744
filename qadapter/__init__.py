"""Customise a language model to new preferences without forgetting: the method, as a library."""
