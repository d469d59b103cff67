"""Full attention with RoPE against the hybrid, on the standard library's text, at up to 4 times the training length."""

from studies.text import parts

STUDY = parts.study("", "RoPE in every layer and the hybrid on text, up to 4 times the training length")
