"""Read and write video files; hostile files are decoded in separate processes."""
