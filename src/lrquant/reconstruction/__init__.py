"""The engine: one block at a time, learn its transformation and clipping, freeze, go on.

Imports nothing by itself: the command line reads `callbacks` and `records`, and shows help at once.
"""
