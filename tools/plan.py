"""Says what a training step needs: hybrid_attn/commands/plan.py, which pip installs as hybrid-plan."""

from hybrid_attn.commands import plan

if __name__ == "__main__":
    plan.start()
