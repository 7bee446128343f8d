"""The transformer's basic operations, compiled for this machine's CPU if possible.

In training, the transformer's layers call the functions in `operators`. In rollouts, `decode`
computes the passes. `library` compiles the C++ files and calls their functions.
"""
