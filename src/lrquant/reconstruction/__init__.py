"""The engine: for one block at a time, learn its transformations and clipping, then freeze it.

It imports nothing, so that the command line can import `callbacks` and `records` and still show help at once.
"""
