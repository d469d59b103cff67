"""Makes a token store from text: python tools/prepare_data.py --input='raw/**/*.jsonl.gz' --out=STORE

The program is hybrid_attn/commands/prepare_data.py; an installed package runs it as hybrid-prepare-data.
"""

from hybrid_attn.commands import prepare_data

if __name__ == "__main__":
    prepare_data.start()
