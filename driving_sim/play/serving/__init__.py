"""Serve the page of `drivesim play`, and drive as its messages say."""
