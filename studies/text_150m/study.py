"""studies/text with 150M parameters and your text, for one GPU: studies/text/README.md."""

from studies.text import parts

STUDY = parts.study("-150m", "RoPE in every layer and the hybrid, 150M parameters, up to 4 times the training length")
