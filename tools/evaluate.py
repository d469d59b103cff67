"""Measures what models can read: hybrid_attn/commands/evaluate.py, which pip installs as hybrid-evaluate."""

from hybrid_attn.commands import evaluate

if __name__ == "__main__":
    evaluate.start()
