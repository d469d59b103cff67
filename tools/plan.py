"""Says what a training step needs: python tools/plan.py --config=configs/hybrid_8k.py --target=cpu:8

The program is hybrid_attn/commands/plan.py; an installed package runs it as hybrid-plan.
"""

from hybrid_attn.commands import plan

if __name__ == "__main__":
    plan.start()
