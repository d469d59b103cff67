"""Makes a checkpoint from a Hugging Face directory: hybrid_attn/commands/import_hf.py, which pip installs as hybrid-import."""

from hybrid_attn.commands import import_hf

if __name__ == "__main__":
    import_hf.start()
