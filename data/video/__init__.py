"""Video files: what is in one, its frames, read in processes of their own, and written."""
