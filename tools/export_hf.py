"""Makes a Hugging Face directory from a checkpoint: hybrid_attn/commands/export_hf.py, which pip installs as hybrid-export."""

from hybrid_attn.commands import export_hf

if __name__ == "__main__":
    export_hf.start()
