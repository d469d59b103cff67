"""Trains the model of a config: python launch/train.py --config=configs/hybrid_8k.py

The program is hybrid_attn/commands/train.py; an installed package runs it as hybrid-train.
"""

from hybrid_attn.commands import train

if __name__ == "__main__":
    train.start()
