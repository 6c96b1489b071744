"""Many settings of every method, compared: `make sweep`."""
