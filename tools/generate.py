"""Answers prompts: python tools/generate.py --checkpoint=runs/hybrid_8k --prompt='def main('

The program is hybrid_attn/commands/generate.py; an installed package runs it as hybrid-generate.
"""

from hybrid_attn.commands import generate

if __name__ == "__main__":
    generate.start()
