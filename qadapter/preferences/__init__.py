"""Preference data: from any public format to validated prompt/chosen/rejected pairs."""
