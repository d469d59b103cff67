"""Measures what models can read: python tools/evaluate.py --checkpoint=runs/hybrid_8k --suite=quick --out=evals/hybrid_8k

The program is hybrid_attn/commands/evaluate.py; an installed package runs it as hybrid-evaluate.
"""

from hybrid_attn.commands import evaluate

if __name__ == "__main__":
    evaluate.start()
