"""The transformer's basic operations, compiled for this machine's CPU if possible.

The transformer's layers call `operators` in training. Rollouts use the passes of `decode`.
`library` compiles the C++ files and calls their functions.
"""
