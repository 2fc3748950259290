"""A web page to generate sound: `wavflow serve`."""
