"""What the transformer computes with, compiled for this machine's CPU where it can be.

`operators` is what its layers call in training, `decode` the passes of rollouts; `library` compiles
the C++ files and calls them.
"""
