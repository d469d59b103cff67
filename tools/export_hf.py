"""Makes a Hugging Face directory from a checkpoint: python tools/export_hf.py --checkpoint=DIR --out=DIR

The program is hybrid_attn/commands/export_hf.py; an installed package runs it as hybrid-export.
"""

from hybrid_attn.commands import export_hf

if __name__ == "__main__":
    export_hf.start()
