"""Answers prompts: hybrid_attn/commands/generate.py, which pip installs as hybrid-generate."""

from hybrid_attn.commands import generate

if __name__ == "__main__":
    generate.start()
