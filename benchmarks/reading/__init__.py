"""How fast videos and token stores are read and written."""
