"""Questions about the toy world, with one or several right answers."""
