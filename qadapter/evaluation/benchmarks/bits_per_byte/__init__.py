"""How well a model predicts texts, in bits per byte."""
