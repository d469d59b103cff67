"""Trains the model of a config: hybrid_attn/commands/train.py, which pip installs as hybrid-train."""

from hybrid_attn.commands import train

if __name__ == "__main__":
    train.start()
