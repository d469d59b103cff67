"""Makes a checkpoint from a Hugging Face directory: python tools/import_hf.py --model=DIR --out=DIR

The program is hybrid_attn/commands/import_hf.py; an installed package runs it as hybrid-import.
"""

from hybrid_attn.commands import import_hf

if __name__ == "__main__":
    import_hf.start()
