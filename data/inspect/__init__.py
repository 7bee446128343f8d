"""What is in a folder of drives, and what is wrong with it."""
