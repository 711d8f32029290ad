"""A small mixture of experts of our own: model, corpus, training, recordings, scores.

May import anything in `runtime`.
"""
